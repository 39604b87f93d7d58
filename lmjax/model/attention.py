"""Attention: from queries, keys and values to what each token reads of the others.

Shapes: B batch, T query positions, S key positions, D width, K key/value heads, G query heads per
key/value head, H head width. Knows Flax, JAX and policies; no mesh, no optimizer, no data.
"""

from __future__ import annotations

import functools
import math
from typing import Final

import jax
import jax.numpy as jnp
from flax import nnx

from lmjax.model import blockwise, kernels
from lmjax.model.attention_form import CUDNN, SPLASH, WHOLE, Form, Situation, form_of
from lmjax.model.cache import LayerCache
from lmjax.model.config import ModelConfig, RopeScaling
from lmjax.model.layers import ANYWHERE, Constrain, Dense, Norm, dropout
from lmjax.model.mask import CAUSAL, Mask, Position, indices_from
from lmjax.model.parametrisation import parametrisation_of
from lmjax.model.sheet import Given, Rules
from lmjax.model.sites import QUIET, Context, Sites, at_site, give, take, within_site
from lmjax.precision.asides import aside
from lmjax.precision.matmul import einsum, hand_on
from lmjax.precision.policy import SitePolicy
from lmjax.precision.probes import Rounded, report
from lmjax.precision.taps import taps_in

KERNELS: Final = {CUDNN: kernels.cudnn, SPLASH: kernels.splash}

FEW_QUERIES: Final = 16
"""Beside a cache, so many queries at most are read with all their scores at once."""


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
    frequencies = _lowered(jnp.float32(config.rope_base) ** -exponents, config.rope_scaling)
    frequencies = site.to_compute(frequencies)
    turns = site.to_compute(positions.astype(jnp.float32))
    angles = turns[..., None] * frequencies
    return jnp.cos(angles), jnp.sin(angles)


def _lowered(frequencies: jax.Array, scaling: RopeScaling) -> jax.Array:
    """Frequencies f32[H/2] in radians per position, as a longer context needs them.

    With `llama3`, the share that stays grows from 0 to 1 between two numbers of turns in the
    original context (Meta 2024, `apply_scaling` of llama-models).
    """
    if scaling.kind == "none":
        return frequencies
    if scaling.kind == "linear":
        return frequencies / scaling.factor
    turns = frequencies * (scaling.original_positions / (2 * math.pi))
    span = scaling.high_frequency - scaling.low_frequency
    stays = jnp.clip((turns - scaling.low_frequency) / span, 0.0, 1.0)
    return (1.0 - stays) * (frequencies / scaling.factor) + stays * frequencies


@at_site
def rotate(
    x: jax.Array, angles: tuple[jax.Array, jax.Array], site: SitePolicy, context: Context = QUIET
) -> jax.Array:
    """Turns the pairs (i, i + H/2) of `[B, T, heads, H]` by the angles of their position."""
    cos, sin = (a[..., None, :] for a in angles)
    first, second = jnp.split(take(x, site, context.probe), 2, axis=-1)
    turned = [first * cos - second * sin, second * cos + first * sin]
    return give(jnp.concatenate(turned, axis=-1), site, context.probe)


class Attention(nnx.Module):
    """Multi-head attention with grouped key/value heads.

    `norm` is the norm of its half of the block, which calls it where it stands.
    """

    def __init__(self, key: jax.Array, config: ModelConfig):
        keys = iter(jax.random.split(key, 4))
        c, scales = config, parametrisation_of(config)
        queries, keys_values = c.heads * c.head_size, c.kv_head_count * c.head_size
        inward = functools.partial(
            Dense,
            fan_in=c.width,
            axes=("embed", "heads"),
            std=scales.weight_std,
            bias=c.qkv_bias,
            scales=scales,
        )
        self.config, self.scales = config, scales
        self.norm = Norm(c.width, c)
        self.query = inward(next(keys), fan_out=queries)
        self.key = inward(next(keys), fan_out=keys_values)
        self.value = inward(next(keys), fan_out=keys_values)
        self.out = Dense(
            next(keys),
            queries,
            c.width,
            axes=("heads", "embed"),
            bias=c.out_bias,
            std=scales.last_weight_std,
            scales=scales,
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
        constrain: Constrain = ANYWHERE,
        cache: LayerCache | None = None,
        start: Position = 0,
    ) -> tuple[jax.Array, LayerCache | None]:
        """`[B, T, D]` to `[B, T, D]`, and the cache with what was read here.

        Args:
          x: what the block reads for the tokens of index `start` to `start + T`.
          sites: formats.
          angles: of the positions of these tokens, for rotary embeddings.
          context: randomness and probes.
          mask: which keys each of these tokens attends to.
          constrain: where activations live.
          cache: keys and values of the tokens before; None: there are none.
          start: index of the first token; 0 without a cache.
        """
        c = self.config
        batch, length, _ = x.shape
        q, k, v = self.inputs(x, sites, angles, context)
        if cache is not None:
            cache = cache.extended(k, v, start, sites)
            k, v = cache.read(sites)
        situation = Situation(
            constrain.backend,
            type(mask),
            length,
            k.shape[1],
            c.head_size,
            parts=constrain.parts("length", length),
            from_start=isinstance(start, int) and start == 0,
            unit=self.scales.unit_products,
            dropout=c.dropout > 0 and context.key is not None,
            watched=any(context.at(name).slots for name in blockwise.MEASURED),
        )
        form = form_of(sites, situation)
        # A few queries have few scores; they read a cache as it stands.
        few = cache is not None and length <= FEW_QUERIES
        if few or form.name == WHOLE or _is_tapped(context):
            y = self.read_whole(q, k, v, sites, context, mask, start)
        else:
            y = self.read(form, q, k, v, sites, context, mask, start, constrain)
        combine = context.at("combine")
        y = hand_on(y, sites["combine"], combine.probe)
        y = y.reshape(batch, length, c.heads * c.head_size)
        return self.out(y, sites["out"], context.at("out")), cache

    def inputs(
        self,
        x: jax.Array,
        sites: Sites,
        angles: tuple[jax.Array, jax.Array] | None,
        context: Context,
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Queries `[B, T, K, G, H]`, with the heads that share keys side by side; keys and values.

        Those are `[B, T, K, H]`. Arguments are those of a call.
        """
        c = self.config
        batch, length, _ = x.shape
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
            k = within_site(k, sites["rope"], context.at("rope").probe, "keys")
        q = q.reshape(batch, length, c.kv_head_count, c.heads // c.kv_head_count, c.head_size)
        return q, k, v

    def read(
        self,
        form: Form,
        q: jax.Array,
        k: jax.Array,
        v: jax.Array,
        sites: Sites,
        context: Context,
        mask: Mask,
        start: Position = 0,
        constrain: Constrain = ANYWHERE,
    ) -> jax.Array:
        """What queries `[B, T, K, G, H]` read of keys and values `[B, S, K, H]`.

        In blocks or by a fused kernel, as `form` says.
        """
        scores, combine = sites["scores"], sites["combine"]
        with scores.scope, aside("entering"):
            q = self.scales.queries(q)
        entering = (q, "scores", "x"), (k, "scores", "w"), (v, "combine", "w")
        q, k, v = (_entering(x, sites[name], context.at(name), role) for x, name, role in entering)
        rules = Rules(
            scores,
            sites["softmax"],
            combine,
            score_factor=self.scales.score_factor,
            weight_factor=self.scales.weight_factor(k.shape[1]),
            unit=self.scales.unit_products,
            dropout=self.config.dropout,
            start=start if isinstance(start, int) else None,
            parts=constrain.parts("length", q.shape[1]),
        )
        if form.name in KERNELS:
            return KERNELS[form.name](rules, q, k, v, mask, constrain)
        key = context.at("dropout").key
        keys = None if key is None else jax.random.split(key, (k.shape[0], k.shape[2]))
        slots = {
            name: {role: asked[role] for role in roles if role in asked}
            for name, roles in blockwise.MEASURED.items()
            if (asked := (context.at(name).slots or {}))
        }
        given = Given(mask, start, keys)
        return blockwise.attend(rules, q, k, v, given, slots)

    def read_whole(
        self,
        q: jax.Array,
        k: jax.Array,
        v: jax.Array,
        sites: Sites,
        context: Context,
        mask: Mask,
        start: Position = 0,
    ) -> jax.Array:
        """The same by way of all weights at once."""
        weights = self.weights(q, k, sites, context, mask, start)
        with sites["softmax"].scope:
            weights = dropout(weights, self.config.dropout, context.at("dropout").key)
        combine = context.at("combine")
        return einsum(
            "bkgts,bskh->btkgh",
            weights,
            v,
            sites["combine"],
            key=combine.key,
            probe=combine.probe,
            unit=self.scales.unit_products,
        )

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
        """
        site, products = sites["scores"], context.at("scores")
        with site.scope, aside("entering"):
            q = self.scales.queries(q)
        scores = einsum(
            "btkgh,bskh->bkgts",
            q,
            k,
            site,
            key=products.key,
            probe=products.probe,
            unit=self.scales.unit_products,
        )
        scores = hand_on(scores, site, products.probe)
        visible = mask.visible(indices_from(start, q.shape[1]), indices_from(0, k.shape[1]))
        return self.softmax(scores, visible, sites["softmax"], context)

    @at_site
    def softmax(
        self,
        scores: jax.Array,
        visible: jax.Array,
        site: SitePolicy,
        context: Context,
    ) -> jax.Array:
        """Attention weights of scores `[B, K, G, T, S]`, over visible keys alone."""
        probe = context.at("softmax").probe
        scores = take(scores, site, probe) * self.scales.score_factor
        # As in `blockwise.py`: no finite number is below all scores of f16.
        scores = jnp.where(visible, scores, -jnp.inf)
        weights = jax.nn.softmax(scores, axis=-1) * self.scales.weight_factor(scores.shape[-1])
        return give(weights, site, probe)


def _is_tapped(context: Context) -> bool:
    """Whether a tap takes a tensor of which blocks never hold more than a part."""
    slots = (context.at(name).slots or {} for name in blockwise.MEASURED)
    return any(taps_in(asked) for roles in slots for asked in roles.values())


def _entering(x: jax.Array, site: SitePolicy, context: Context, role: str) -> jax.Array:
    """An operand of a product that is not quantized, in its compute format, measured before."""
    slots = (context.slots or {}).get(role, {})
    with site.scope:
        cast = site.to_compute(x)
        return report(cast, slots, lambda: Rounded(x, x, cast, site.compute))
