"""The parts of a Transformer block.

A layer is a Flax nnx module for one reason: building and naming parameters. Each parameter carries
`axes`, the logical name of each of its dimensions, from which `lmjax.parallel.sharding` derives
where it lives. Calling a layer is a pure function of its parameters, its input and the formats of
its sites.

Shapes: B batch, T query positions, S key positions, D width, K key/value heads, G query heads per
key/value head, H head width. Knows Flax, JAX and policies; no mesh, no optimizer, no data.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx

from lmjax.model import unit_scaling
from lmjax.model.cache import LayerCache
from lmjax.model.config import ModelConfig
from lmjax.model.mask import CAUSAL, Mask, Position, indices_from
from lmjax.model.sites import QUIET, Context, Sites, at_site, give, take, within
from lmjax.model.unit_scaling import BranchWeights
from lmjax.precision.bits import largest_magnitude
from lmjax.precision.broadcast import add_to_rows
from lmjax.precision.matmul import Key, einsum, hand_on
from lmjax.precision.policy import SitePolicy
from lmjax.precision.squares import scale_for_squares

Constrain = Callable[[jax.Array, tuple[str, ...]], jax.Array]


def normal(key: jax.Array, shape: tuple[int, ...], std: float, axes: tuple[str, ...]) -> nnx.Param:
    """A parameter drawn from N(0, std^2), in f32; the policy's storage format comes later."""
    return nnx.Param(std * jax.random.normal(key, shape, jnp.float32), axes=axes)


def constant(value: float, shape: tuple[int, ...], axes: tuple[str, ...]) -> nnx.Param:
    """A parameter filled with one number, in f32."""
    return nnx.Param(jnp.full(shape, value, jnp.float32), axes=axes)


def _used(parameter: nnx.Param, uses: int, unit: bool) -> jax.Array:
    """The value of a parameter that is used so many times."""
    value = parameter[...]
    return unit_scaling.shared(value, uses) if unit else value


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
        unit: bool = False,
    ):
        self.unit = unit
        self.kernel = normal(key, (fan_in, fan_out), std, axes)
        self.bias = constant(0.0, (fan_out,), axes[1:]) if bias else None

    def __call__(self, x: jax.Array, site: SitePolicy, context: Context) -> jax.Array:
        """`[B, T, fan_in]` to `[B, T, fan_out]`."""
        probe, kernel = context.probe, self.kernel[...]
        y = einsum("btk,kn->btn", x, kernel, site, key=context.key, probe=probe, unit=self.unit)
        if self.bias is not None:
            with site.scope:
                bias = _used(self.bias, y.size // self.bias.size, self.unit)
                y = add_to_rows(y, site.to_compute(bias))
        return hand_on(y, site, probe)


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
        unit: bool = False,
    ):
        self.unit = unit
        self.table = normal(key, (rows, width), std, axes)

    @at_site
    def __call__(self, indices: jax.Array, site: SitePolicy, context: Context = QUIET) -> jax.Array:
        """`int32[...]` to `[..., D]`.

        Rows are gathered first and cast afterwards, so that the gradients of a token that occurs
        many times are summed in the format of the table and not in the compute format.
        """
        rows = self.table[...][indices]
        if self.unit:
            rows = unit_scaling.shared(rows, rows.size / self.table.size)
        return give(take(rows, site, context.probe), site, context.probe)


class Norm(nnx.Module):
    """LayerNorm or RMSNorm over the last dimension.

    Statistics, normalisation, scale and bias are one site, rounded once at its end. Rows are scaled
    by a power of two where sums or squares of their elements would leave the range of f32, which
    no normalised number feels. In f16, where a rule asks for it, squares overflow beyond 255.
    """

    def __init__(self, width: int, config: ModelConfig, *, kind: str | None = None):
        self.kind = kind or config.norm
        self.epsilon = config.norm_epsilon
        self.unit = config.unit
        self.scale = constant(1.0, (width,), ("norm",))
        biased = self.kind == "layer" and config.bias
        self.bias = constant(0.0, (width,), ("norm",)) if biased else None

    @at_site
    def __call__(self, x: jax.Array, site: SitePolicy, context: Context = QUIET) -> jax.Array:
        """`[..., D]` to `[..., D]`."""
        x = take(x, site, context.probe)
        scale = _scale_of_rows(x, self.epsilon)
        x = x * scale
        if self.kind == "layer":
            x = x - jnp.mean(x, axis=-1, keepdims=True)
        mean_square = jnp.mean(jnp.square(x), axis=-1, keepdims=True)
        total = mean_square + self.epsilon * scale * scale
        total = jnp.where(total > 0, total, jnp.ones_like(total))  # a row of equal numbers
        used = functools.partial(_used, uses=x.size // x.shape[-1], unit=self.unit)
        y = x * jax.lax.rsqrt(total) * site.to_compute(used(self.scale))
        if self.bias is not None:
            y = y + site.to_compute(used(self.bias))
        return give(y, site, context.probe)


def _scale_of_rows(x: jax.Array, epsilon: float) -> jax.Array:
    """What rows `[..., D]` are multiplied by before they are squared, `[..., 1]`; no gradient."""
    if x.dtype == jnp.float16:  # as narrow as asked: half of the ordinary numbers would be scaled
        return jnp.ones((*x.shape[:-1], 1), x.dtype)
    largest = largest_magnitude(jax.lax.stop_gradient(x), axis=-1)[..., None]
    floor = jnp.asarray(math.sqrt(epsilon), largest.dtype)
    return scale_for_squares(jnp.maximum(largest, floor)).astype(x.dtype)


@at_site
def rotary_angles(
    config: ModelConfig, positions: jax.Array, site: SitePolicy
) -> tuple[jax.Array, jax.Array]:
    """Cosine and sine of position times frequency (Su et al. 2021, eq. 15).

    Args:
      config: the model.
      positions: `int32[T]`, or `int32[B, T]` where they differ between rows.
      site: the formats of the site `rope`.

    Returns:
      Two arrays `[T, H/2]`, or `[B, T, H/2]`.
    """
    half = config.head_size // 2
    exponents = jnp.arange(half, dtype=jnp.float32) / half
    frequencies = site.to_compute(jnp.float32(config.rope_base) ** -exponents)
    turns = site.to_compute(positions.astype(jnp.float32))
    angles = turns[..., None] * frequencies
    return jnp.cos(angles), jnp.sin(angles)


@at_site
def rotate(
    x: jax.Array, angles: tuple[jax.Array, jax.Array], site: SitePolicy, context: Context = QUIET
) -> jax.Array:
    """Turns the pairs (i, i + H/2) of `[B, T, heads, H]` by the angles of their position."""
    cos, sin = (a[..., None, :] for a in angles)
    first, second = jnp.split(take(x, site, context.probe), 2, axis=-1)
    turned = [first * cos - second * sin, second * cos + first * sin]
    return give(jnp.concatenate(turned, axis=-1), site, context.probe)


def dropout(x: jax.Array, rate: float, key: Key) -> jax.Array:
    """Zeroes elements at `rate` and rescales the rest; without a key, the identity."""
    if key is None or rate == 0.0:
        return x
    keep = jax.random.bernoulli(key, 1.0 - rate, x.shape)
    return jnp.where(keep, x / (1.0 - rate), jnp.zeros_like(x))


class Attention(nnx.Module):
    """Multi-head attention with grouped key/value heads, from pre-norm to output."""

    def __init__(self, key: jax.Array, config: ModelConfig):
        keys = iter(jax.random.split(key, 4))
        c = config
        queries, keys_values = c.heads * c.head_size, c.kv_head_count * c.head_size
        inward = functools.partial(
            Dense,
            fan_in=c.width,
            axes=("embed", "heads"),
            std=c.weight_std,
            bias=c.bias,
            unit=c.unit,
        )
        self.config = config
        self.norm = Norm(c.width, c)
        self.query = inward(next(keys), fan_out=queries)
        self.key = inward(next(keys), fan_out=keys_values)
        self.value = inward(next(keys), fan_out=keys_values)
        self.out = Dense(
            next(keys),
            queries,
            c.width,
            axes=("heads", "embed"),
            bias=c.bias,
            std=c.last_weight_std,
            unit=c.unit,
        )
        self.query_norm = Norm(c.head_size, c, kind="rms") if c.qk_norm else None
        self.key_norm = Norm(c.head_size, c, kind="rms") if c.qk_norm else None

    def __call__(
        self,
        x: jax.Array,
        sites: Sites,
        angles: tuple[jax.Array, jax.Array] | None,
        context: Context,
        mask: Mask,
        cache: LayerCache | None = None,
        start: Position = 0,
    ) -> tuple[jax.Array, LayerCache | None]:
        """`[B, T, D]` to `[B, T, D]`, and the cache with what was read here.

        Args:
          x: what the residual stream holds for the tokens of index `start` to `start + T`.
          sites: formats.
          angles: of the positions of these tokens, for rotary embeddings.
          context: randomness and probes.
          mask: which keys each of these tokens attends to.
          cache: keys and values of the tokens before; None: there are none.
          start: index of the first token; 0 without a cache.
        """
        c = self.config
        batch, length, _ = x.shape
        x = self.norm(x, sites["norm"], context.at("norm"))
        q = self.query(x, sites["query"], context.at("query"))
        k = self.key(x, sites["key"], context.at("key"))
        v = self.value(x, sites["value"], context.at("value"))
        q = q.reshape(batch, length, c.heads, c.head_size)
        k = k.reshape(batch, length, c.kv_head_count, c.head_size)
        v = v.reshape(batch, length, c.kv_head_count, c.head_size)
        if self.query_norm is not None and self.key_norm is not None:
            q = self.query_norm(q, sites["query_norm"], context.at("query_norm"))
            k = self.key_norm(k, sites["key_norm"], context.at("key_norm"))
        if angles is not None:
            # One site, but two tensors: probes look at the queries, which are as large as the keys.
            q = rotate(q, angles, sites["rope"], context.at("rope"))
            k = rotate(k, angles, sites["rope"])
        q = q.reshape(batch, length, c.kv_head_count, c.heads // c.kv_head_count, c.head_size)
        if cache is not None:
            cache = cache.extended(k, v, start, sites)
            k, v = cache.read(sites)
        weights = self.weights(q, k, sites, context, mask, start)
        with sites["softmax"].scope:
            weights = dropout(weights, c.dropout, context.at("dropout").key)
        combine = context.at("combine")
        y = einsum(
            "bkgts,bskh->btkgh",
            weights,
            v,
            sites["combine"],
            key=combine.key,
            probe=combine.probe,
            unit=c.unit,
        )
        y = hand_on(y, sites["combine"], combine.probe)
        y = y.reshape(batch, length, c.heads * c.head_size)
        return self.out(y, sites["out"], context.at("out")), cache

    def weights(
        self,
        q: jax.Array,
        k: jax.Array,
        sites: Sites,
        context: Context,
        mask: Mask = CAUSAL,
        start: Position = 0,
    ) -> jax.Array:
        """Attention weights `[B, K, G, T, S]` of `q [B, T, K, G, H]` over `k [B, S, K, H]`.

        Keys have the indices 0 to S, queries `start` to `start + T`; `mask` says which keys a query
        sees, at least one each.
        The factor 1/sqrt(H) is split: its power of two goes to the queries, where it is exact in
        every format and keeps f16 scores in range; the rest is applied in the softmax's format.
        Unit scaling leaves all of it to the product.
        """
        unit, size = self.config.unit, self.config.head_size
        power = 2.0 ** -math.floor(math.log2(size) / 2)
        rest = 1.0 / (math.sqrt(size) * power)
        site, products = sites["scores"], context.at("scores")
        with site.scope:
            q = q if unit else q * power
        scores = einsum(
            "btkgh,bskh->bkgts",
            q,
            k,
            site,
            key=products.key,
            probe=products.probe,
            unit=unit,
        )
        scores = hand_on(scores, site, products.probe)
        visible = mask.visible(indices_from(start, q.shape[1]), indices_from(0, k.shape[1]))
        return self.softmax(scores, visible, 1.0 if unit else rest, sites["softmax"], context)

    @at_site
    def softmax(
        self,
        scores: jax.Array,
        visible: jax.Array,
        factor: float,
        site: SitePolicy,
        context: Context,
    ) -> jax.Array:
        """Attention weights of scores `[B, K, G, T, S]` times `factor`, over visible keys alone."""
        probe = context.at("softmax").probe
        scores = take(scores, site, probe)
        scores = scores if self.config.unit else scores * factor
        # Selected, not added: a large negative number added to a score can overflow f16. Infinite,
        # not large: should all real scores of a row overflow, it becomes NaN and the step is
        # skipped, where a finite mask would win and let the row attend to what it must not see.
        scores = jnp.where(visible, scores, -jnp.inf)
        weights = jax.nn.softmax(scores, axis=-1)
        if self.config.unit:
            weights = weights * unit_scaling.softmax_gain(self.config, scores.shape[-1])
        return give(weights, site, probe)


class Mlp(nnx.Module):
    """Two linear layers around a GELU, or three around a gated SiLU, from pre-norm to output."""

    def __init__(self, key: jax.Array, config: ModelConfig):
        keys = iter(jax.random.split(key, 3))
        c = config
        inward = functools.partial(
            Dense,
            fan_in=c.width,
            fan_out=c.mlp_size,
            axes=("embed", "mlp"),
            std=c.weight_std,
            bias=c.bias,
            unit=c.unit,
        )
        self.norm = Norm(c.width, c)
        self.up = inward(next(keys))
        self.down = Dense(
            next(keys),
            c.mlp_size,
            c.width,
            axes=("mlp", "embed"),
            bias=c.bias,
            std=c.last_weight_std,
            unit=c.unit,
        )
        self.config = c
        gated = c.activation == "swiglu"
        self.gate = inward(next(keys)) if gated else None

    def __call__(self, x: jax.Array, sites: Sites, context: Context) -> jax.Array:
        """`[B, T, D]` to `[B, T, D]`."""
        x = self.norm(x, sites["norm"], context.at("norm"))
        hidden = self.up(x, sites["up"], context.at("up"))
        gate = None if self.gate is None else self.gate(x, sites["gate"], context.at("gate"))
        hidden = self.activated(hidden, gate, sites["activation"], context.at("activation"))
        return self.down(hidden, sites["down"], context.at("down"))

    @at_site
    def activated(
        self, hidden: jax.Array, gate: jax.Array | None, site: SitePolicy, context: Context
    ) -> jax.Array:
        """GELU of `hidden [B, T, M]`, or `hidden` times SiLU of a gate of that shape."""
        hidden = take(hidden, site, context.probe)
        if gate is None:
            hidden = jax.nn.gelu(hidden, approximate=True)
        else:
            hidden = jax.nn.silu(site.to_compute(gate)) * hidden
        if self.config.unit:
            hidden = hidden * unit_scaling.activation_gain(self.config)
        return give(hidden, site, context.probe)


def branched(x: jax.Array, weights: BranchWeights | None) -> jax.Array:
    """The residual stream as a branch reads it."""
    return x if weights is None else weights.enter(x)


def joined(x: jax.Array, y: jax.Array, weights: BranchWeights | None) -> jax.Array:
    """The residual stream with the result of a branch, in its format, added."""
    return x + y if weights is None else weights.add(x, y)


class Block(nnx.Module):
    """One layer: attention, then the MLP, each added to the residual stream."""

    def __init__(self, key: jax.Array, config: ModelConfig):
        attention_key, mlp_key = jax.random.split(key)
        self.rate = config.dropout
        self.attention = Attention(attention_key, config)
        self.mlp = Mlp(mlp_key, config)

    def __call__(
        self,
        x: jax.Array,
        sites: Sites,
        angles: tuple[jax.Array, jax.Array] | None,
        context: Context,
        mask: Mask,
        weights: BranchWeights | None = None,
        cache: LayerCache | None = None,
        start: Position = 0,
    ) -> tuple[jax.Array, LayerCache | None]:
        """`[B, T, D]` to `[B, T, D]`, in the format of the residual stream; see `Attention`.

        Both branches are added as they are, or with unit scaling by `weights`, f32[2] each.
        """
        residual, probe = sites["residual"], context.at("residual").probe
        first, second = (jax.tree.map(lambda w, i=i: w[i], weights) for i in range(2))
        inside = within(sites, "attention"), angles, context.at("attention"), mask
        with residual.scope:
            x = take(x, residual, probe)
            entering = branched(x, first)
        y, cache = self.attention(entering, *inside, cache, start)
        with residual.scope:
            y = residual.to_compute(dropout(y, self.rate, context.at("dropout 1").key))
            x = joined(x, y, first)
            entering = branched(x, second)
        y = self.mlp(entering, within(sites, "mlp"), context.at("mlp"))
        with residual.scope:
            y = residual.to_compute(dropout(y, self.rate, context.at("dropout 2").key))
            x = joined(x, y, second)
            return give(x, residual, probe), cache
