"""How a run sums over devices: gradients, their norm and evaluations.

`reductions(parts)` gives one object that decides all of it, from `deterministic_reductions`:
`Reductions` sums as XLA pleases, `InOrder` in an order that no mesh changes. They also say how such
programs are compiled, and which meshes, batches and devices they accept.

Gradients are summed in the format that the policy names (its key `r`). In f32 there is nothing to
do: XLA's partitioner cuts each weight gradient, a product that sums over the batch, into one
product per device and a sum over devices, before the product is rounded. Any other format needs the
devices' own gradients first. These are the gradients of parts of the batch, one part for each
device that holds one, so `r` has no effect on a single device. The cost: each device holds its own
gradient of every parameter, whole, until they are summed.

Knows JAX, the mesh through `sharding`, and a parameter's policy.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from lmjax.parallel import sharding
from lmjax.parallel.sharding import HerePlacement, PartPlacement, Placement
from lmjax.precision import exact, paths, probes
from lmjax.precision.exact import at_least_f32
from lmjax.precision.policy import F32, NATIVE, SitePolicy, carrier
from lmjax.precision.rounding import quantize
from lmjax.precision.squares import Root, tree_root

Gradient = Callable[..., tuple[tuple[Any, Any], jax.Array]]
"""`(params, batch, key, scale, slots, factors) -> (gradients, measured), loss`."""

ParamSites = Mapping[str, SitePolicy]


@dataclass(frozen=True)
class Reductions:
    """Sums as XLA's partitioner arranges them: equal on all meshes up to rounding."""

    parts: int = 1
    """Number of parts of a batch that are computed apart; they divide its rows."""

    in_order = False
    """Whether no sum depends on the number of devices."""

    @property
    def threads(self) -> int | None:
        """Number of threads that a process on CPU must use for equal sums; None: any."""
        return None

    def refuse_mesh(self, mesh: Any) -> None:
        """Raises `ValueError` for a mesh that these sums do not fit."""

    def refuse_rows(self, rows: int) -> None:
        """Raises `ValueError` for a number of rows that cannot be cut into the parts."""

    def multiple(self, mesh: Any) -> int:
        """What the rows of an evaluation batch must be a multiple of."""
        return math.lcm(sharding.batch_parts(mesh), self.parts)

    def devices(self, available: Sequence[jax.Device]) -> Sequence[jax.Device]:
        """Those of the available devices that can share the parts."""
        return available

    def jit(self, function: Callable[..., Any], mesh: Any, **options: Any) -> Any:
        """Compiles a program that sums on a mesh; takes the options of `jax.jit`."""
        platform = sharding.backend_of(mesh).platform
        how = {"fixed_order" if self.in_order else "weights_in_loop": platform}
        return exact.jit(function, **how, **options)

    def gradient(
        self, of_loss: Callable[[Placement], Gradient], sites: ParamSites, mesh: Any
    ) -> Gradient:
        """The gradient of a batch's loss.

        Args:
          of_loss: makes the gradient of one part, whose activations it pins as told.
          sites: the site of each parameter.
          mesh: where it is computed.
        """
        if not reduces_narrow(sites, mesh):
            return of_loss(Placement(mesh))
        return reduced_gradient(of_loss(PartPlacement(mesh)), sites, mesh)

    def gathered(self, gradients: Any, mesh: Any) -> Any:
        """Gradients as the optimizer and the norm read them."""
        return gradients

    def norm(self, tree: Any) -> Root:
        """The norm of everything in a tree."""
        return tree_root(tree, in_order=self.in_order)

    def evaluation(
        self, of_part: Callable[[Placement], Callable[[Any, Any], Any]], mesh: Any
    ) -> Callable[[Any, Any], Any]:
        """`(params, batch) -> sums` over a batch.

        Args:
          of_part: makes that of one part, whose activations it pins as told.
          mesh: where it is computed.
        """
        return of_part(Placement(mesh))


class InOrder(Reductions):
    """Sums `parts` (2^n) in an order that depends only on their number, wherever they live.

    Losses and parameters are then bit-identical on every mesh that `refuse_mesh` accepts, as far as
    the parts themselves are; see `exact.ORDER_OPTIONS`.
    """

    in_order = True

    @property
    def threads(self) -> int:
        """On CPU, sums inside a part also depend on the size of XLA's thread pool."""
        return self.parts

    def refuse_mesh(self, mesh: Any) -> None:
        """See `sharding.refuse_unordered`."""
        sharding.refuse_unordered(mesh, self.parts)

    def refuse_rows(self, rows: int) -> None:
        """Raises `ValueError` unless each part has as many rows as the others."""
        if rows % self.parts:
            raise ValueError(
                f"batch_size / micro_batches is {rows}, which deterministic_reductions "
                f"{self.parts} does not divide; choose a multiple"
            )

    def devices(self, available: Sequence[jax.Device]) -> Sequence[jax.Device]:
        """As many as divide the parts."""
        return available[: 1 << min(self.parts, len(available)).bit_length() - 1]

    def gradient(
        self, of_loss: Callable[[Placement], Gradient], sites: ParamSites, mesh: Any
    ) -> Gradient:
        """See `ordered_gradient`."""
        return ordered_gradient(of_loss(HerePlacement(mesh)), sites, mesh, self.parts)

    def gathered(self, gradients: Any, mesh: Any) -> Any:
        """Whole on every device, else fsdp would cut the sum of squares of the norm."""
        return sharding.whole(mesh, gradients)

    def evaluation(
        self, of_part: Callable[[Placement], Callable[[Any, Any], Any]], mesh: Any
    ) -> Callable[[Any, Any], Any]:
        """Evaluates the parts apart, and adds their sums in order."""
        step = of_part(HerePlacement(mesh))
        indexed = lambda index, rows, params: step(params, rows)
        add = functools.partial(jax.tree.map, jnp.add)
        over_parts = sharding.in_order(mesh, self.parts, indexed, add)
        return lambda params, batch: over_parts(batch, params)


def reductions(parts: int) -> Reductions:
    """How to sum for this value of `deterministic_reductions`: 0 is as XLA pleases."""
    return InOrder(parts) if parts else Reductions()


def reduces_narrow(sites: ParamSites, mesh: Any) -> bool:
    """Whether gradients are summed over devices in a format other than f32."""
    return sharding.batch_parts(mesh) > 1 and any(site.reduce != F32 for site in sites.values())


def reduced_gradient(gradient: Gradient, sites: ParamSites, mesh: Any) -> Gradient:
    """Computes the gradient of a whole batch from the gradients of its parts.

    Args:
      gradient: of one part, whose activations are pinned by `PartPlacement`.
      sites: the site of each parameter.
      mesh: where the parts live.

    Returns:
      A function with the arguments of `gradient`. Each gradient is divided by the number of parts
      and rounded to its format, and so is each sum.
    """
    parts = sharding.batch_parts(mesh)
    each = sharding.each_part(mesh, gradient, (None, 0, 0, None, None, None))

    def whole(
        params: Any, batch: Any, key: jax.Array, scale: jax.Array, slots: Any, factors: Any
    ) -> tuple[tuple[Any, Any], jax.Array]:
        """Gradients and measurements of all parts together, and the mean of their losses, f32[]."""
        # The rows of one device are adjacent, so this moves nothing.
        cut = jax.tree.map(lambda rows: rows.reshape(parts, -1, *rows.shape[1:]), batch)
        keys = jax.random.split(key, parts)
        (gradients, measured), losses = each(params, cut, keys, scale, slots, factors)
        summed = {
            path: _sum(gradient, parts, sites[path])
            for path, gradient in paths.flatten(gradients).items()
        }
        first, *others = (jax.tree.map(lambda m, i=i: m[i], measured) for i in range(parts))
        together = functools.reduce(probes.combine, others, first)
        return (paths.unflatten(summed), together), jnp.mean(losses)

    return whole


def ordered_gradient(gradient: Gradient, sites: ParamSites, mesh: Any, parts: int) -> Gradient:
    """Like `reduced_gradient`, but summed in the order of `sharding.in_order`.

    Args:
      gradient: of one part, with unpinned activations.
      sites: the site of each parameter.
      mesh: where the parts live.
      parts: their number, independent of the number of devices.
    """

    def of_part(
        index: jax.Array, rows: Any, params: Any, key: Any, scale: Any, slots: Any, factors: Any
    ) -> tuple[Any, Any, jax.Array]:
        """The contribution of one part: gradients with their measurements, and loss."""
        key = jax.random.fold_in(key, index)
        (gradients, measured), loss = gradient(params, rows, key, scale, slots, factors)
        shares = {
            path: _rounded(g.astype(at_least_f32(g.dtype)) / parts, sites[path])
            for path, g in paths.flatten(gradients).items()
        }
        return shares, measured, loss / parts

    def combine(one: tuple[Any, Any, jax.Array], other: tuple[Any, Any, jax.Array]) -> Any:
        summed = {path: _rounded(g + other[0][path], sites[path]) for path, g in one[0].items()}
        return summed, probes.combine(one[1], other[1]), one[2] + other[2]

    over_parts = sharding.in_order(mesh, parts, of_part, combine)

    def whole(
        params: Any, batch: Any, key: jax.Array, scale: jax.Array, slots: Any, factors: Any
    ) -> tuple[tuple[Any, Any], jax.Array]:
        gradients, measured, loss = over_parts(batch, params, key, scale, slots, factors)
        return (paths.unflatten(gradients), measured), loss

    return whole


@jax.named_scope("reduction")
def _rounded(gradient: jax.Array, site: SitePolicy) -> jax.Array:
    """Rounds a gradient to the site's `reduce` format, in an array no narrower than before."""
    if site.reduce == F32:
        return gradient
    return quantize(gradient, site.reduce, overflow="fail").astype(gradient.dtype)


@jax.named_scope("reduction")
def _sum(gradients: jax.Array, parts: int, site: SitePolicy) -> jax.Array:
    """Sums `[parts, ...]` in the site's `reduce` format, which is also the dtype of the result."""
    wide = gradients.astype(at_least_f32(gradients.dtype)) / parts
    dtype = jnp.dtype(carrier(site.reduce))
    if site.reduce.name in NATIVE:
        # Not `jnp.sum`, which would widen bf16 and f16 internally.
        return jax.lax.reduce(wide.astype(dtype), jnp.zeros((), dtype), jax.lax.add, (0,))
    rounded = quantize(wide, site.reduce, overflow="fail")
    return quantize(jnp.sum(rounded, axis=0), site.reduce, overflow="fail")
