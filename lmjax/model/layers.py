"""The smallest parts of a Transformer: linear layer, table, norm and dropout.

A layer is a Flax nnx module for one reason: building and naming parameters. Each parameter carries
`axes`, the logical name of each of its dimensions, from which `lmjax.parallel.sharding` derives
where it lives. Calling a layer is a pure function of its parameters, its input and the formats of
its sites.

Shapes: B batch, T positions, D width. Knows Flax, JAX and policies; no mesh, no optimizer, no data.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final, Protocol

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import AbstractMesh, Mesh, PartitionSpec

from lmjax.model.config import ModelConfig
from lmjax.model.normalisation import normalise
from lmjax.model.parametrisation import IDENTITY, Parametrisation, parametrisation_of
from lmjax.model.sites import QUIET, Context, Sites, at_site, give, take, within_site
from lmjax.precision.asides import aside
from lmjax.precision.backend import Backend, this_backend
from lmjax.precision.broadcast import add_to_rows
from lmjax.precision.matmul import RandomKey, einsum, hand_on
from lmjax.precision.policy import SitePolicy


class Constrain(Protocol):
    """Where activations live, by the logical names of their axes."""

    def __call__(self, x: jax.Array, axes: tuple[str, ...]) -> jax.Array:
        """The activation, placed."""
        ...

    def parts(self, axis: str, size: int) -> int:
        """Into how many parts devices divide a logical axis of this size."""
        ...

    def spec(self, axes: tuple[str, ...], shape: tuple[int, ...]) -> PartitionSpec:
        """How devices divide an array of this shape."""
        ...

    @property
    def mesh(self) -> Mesh | AbstractMesh | None:
        """The devices, where a kernel has to be told which part each of them computes."""
        ...

    @property
    def backend(self) -> Backend:
        """What the devices are."""
        ...


class Anywhere:
    """Activations live where they are computed, whole."""

    def __call__(self, x: jax.Array, axes: tuple[str, ...]) -> jax.Array:
        """The activation as it is."""
        return x

    def parts(self, axis: str, size: int) -> int:
        """1."""
        return 1

    def spec(self, axes: tuple[str, ...], shape: tuple[int, ...]) -> PartitionSpec:
        """Not at all."""
        return PartitionSpec()

    @property
    def mesh(self) -> None:
        """None."""
        return None

    @property
    def backend(self) -> Backend:
        """That of JAX's default device."""
        return this_backend()


ANYWHERE: Final = Anywhere()


def normal(key: jax.Array, shape: tuple[int, ...], std: float, axes: tuple[str, ...]) -> nnx.Param:
    """A parameter drawn from N(0, std^2), in f32; the policy's storage format comes later."""
    return nnx.Param(std * jax.random.normal(key, shape, jnp.float32), axes=axes)


def constant(value: float, shape: tuple[int, ...], axes: tuple[str, ...]) -> nnx.Param:
    """A parameter filled with one number, in f32."""
    return nnx.Param(jnp.full(shape, value, jnp.float32), axes=axes)


class Dense(nnx.Module):
    """`x @ kernel + bias`, in the compute format of its site."""

    def __init__(
        self,
        key: jax.Array,
        fan_in: int,
        fan_out: int,
        *,
        axes: tuple[str, str],
        std: float,
        bias: bool,
        scales: Parametrisation = IDENTITY,
    ):
        self.scales = scales
        self.kernel = normal(key, (fan_in, fan_out), std, axes)
        self.bias = constant(0.0, (fan_out,), axes[1:]) if bias else None

    def __call__(self, x: jax.Array, site: SitePolicy, context: Context) -> jax.Array:
        """`[B, T, fan_in]` to `[B, T, fan_out]`."""
        probe, kernel = context.probe, self.kernel[...]
        unit = self.scales.unit_products
        y = einsum("btk,kn->btn", x, kernel, site, key=context.key, probe=probe, unit=unit)
        return hand_on(_biased(y, self.bias, site, self.scales), site, probe)


def _biased(
    y: jax.Array, bias: nnx.Param | None, site: SitePolicy, scales: Parametrisation
) -> jax.Array:
    """A product `[..., N]` with its bias, if it has one."""
    if bias is None:
        return y
    with site.scope:
        used = scales.shared(bias[...], y.size // bias.size)
        return add_to_rows(y, site.to_compute(used))


class Embedding(nnx.Module):
    """A table with one row per token or position."""

    def __init__(
        self,
        key: jax.Array,
        rows: int,
        width: int,
        *,
        axes: tuple[str, str],
        std: float,
        scales: Parametrisation = IDENTITY,
    ):
        self.scales = scales
        self.table = normal(key, (rows, width), std, axes)

    @at_site
    def __call__(self, indices: jax.Array, site: SitePolicy, context: Context = QUIET) -> jax.Array:
        """`int32[...]` to `[..., D]`.

        Rows are gathered first and cast afterwards, so that the gradients of a token that occurs
        many times are summed in the format of the table and not in the compute format.
        """
        rows = self.table[...][indices]
        rows = self.scales.shared(rows, rows.size / self.table.size)
        return give(take(rows, site, context.probe), site, context.probe)

    def logits(
        self, x: jax.Array, site: SitePolicy, context: Context, bias: nnx.Param | None = None
    ) -> jax.Array:
        """`[B, T, D]` to `[B, T, rows]`: the table as a head that is tied to it."""
        table, unit = self.table[...], self.scales.unit_products
        y = einsum("btd,vd->btv", x, table, site, key=context.key, probe=context.probe, unit=unit)
        return hand_on(_biased(y, bias, site, self.scales), site, context.probe)


def embedded(
    tables: Mapping[str, tuple[Embedding, jax.Array]],
    sites: Sites,
    context: Context,
    constrain: Constrain,
    scales: Parametrisation,
) -> jax.Array:
    """The sum of the rows of tables, `[B, T, D]`, in the output format of the site `embed`.

    Args:
      tables: with the indices of their rows, by site: first `embed`, with tokens `int32[B, T]`,
        then others, with `int32[T]`, or `int32[B, T]` where they differ between rows of the batch.
      sites: the formats of every site.
      context: randomness and probes.
      constrain: places an activation, given the logical names of its axes.
      scales: the parametrisation of the model.
    """
    total, site = None, sites["embed"]
    for name, (table, indices) in tables.items():
        # Where a mesh cuts the table, tokens travel to its columns and rows travel back, in the
        # compute format. Left to itself, XLA gathers the whole table on some meshes.
        by_row = indices.ndim > 1
        if by_row:
            indices = constrain(indices, ("replicas", "length"))
        rows = table(indices, sites[name], context.at(name))
        if by_row:
            rows = constrain(rows, ("replicas", "length", "columns"))
        if total is None:
            total = rows
            continue
        with site.scope:
            total = site.to_output(scales.sum_of_embeddings(total, site.to_output(rows)))
    assert total is not None
    if len(tables) == 1:
        return total
    with site.scope:
        return within_site(total, site, context.at("embed").probe, "sum")


class Norm(nnx.Module):
    """LayerNorm or RMSNorm over the last dimension.

    Statistics, normalisation, scale and bias are one site, rounded once at its end.
    """

    def __init__(self, width: int, config: ModelConfig, *, kind: str | None = None):
        self.kind = kind or config.norm
        self.epsilon = config.norm_epsilon
        self.scales = parametrisation_of(config)
        self.scale = constant(1.0, (width,), ("norm",))
        biased = self.kind == "layer" and config.bias
        self.bias = constant(0.0, (width,), ("norm",)) if biased else None

    @at_site
    def __call__(self, x: jax.Array, site: SitePolicy, context: Context = QUIET) -> jax.Array:
        """`[..., D]` to `[..., D]`."""
        shape = x.shape
        if context.probe is not None:  # otherwise it is cast below
            x = take(x, site, context.probe)
        x = _without_ones(x)
        shared = lambda p: self.scales.shared(p[...], x.size // x.shape[-1])
        used = lambda p: site.to_compute(shared(p))
        beta = None if self.bias is None else used(self.bias)
        layer = self.kind == "layer"
        y = normalise(x, used(self.scale), beta, site, layer=layer, epsilon=self.epsilon)
        return give(y.reshape(shape), site, context.probe)


def _without_ones(x: jax.Array) -> jax.Array:
    """`[..., D]` without leading axes of length 1.

    With them, XLA's CPU backend sums over rows, and over products in a row, in kernels that are 25
    to a hundred times as slow.
    """
    return jnp.squeeze(x, tuple(axis for axis in range(x.ndim - 1) if x.shape[axis] == 1))


def dropout(x: jax.Array, rate: float, key: RandomKey) -> jax.Array:
    """Zeroes elements at `rate` and rescales the rest; without a key, the identity."""
    if key is None or rate == 0.0:
        return x
    with aside("random"):
        keep = jax.random.bernoulli(key, 1.0 - rate, x.shape)
    return jnp.where(keep, x / (1.0 - rate), jnp.zeros_like(x))
