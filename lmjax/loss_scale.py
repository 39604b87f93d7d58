"""Loss scaling: none, static or dynamic, as one optax transformation around all the others.

f16 has no numbers below 2^-24, and the gradients of a language model are mostly smaller. Loss
scaling multiplies the loss by a power of two, so that every cotangent of the backward pass is
shifted up into the range of f16, and divides the gradients by the same number afterwards, in f32
(Micikevicius et al. 2018, section 3.2).

The scale lives in the optimizer state, so it is checkpointed, sharded and donated with it. One
training step uses it three times:

    scale = loss_scale.current(opt_state)                    # 1. multiply the loss by it
    gradients = loss_scale.unscale(scaled_gradients, scale)  # 2. divide by the same value, in f32
    updates, opt_state = optimizer.update(gradients, opt_state, params)   # 3. skip or step; adjust

Every kind takes the same path: with `none` the scale is the constant 1. A step whose gradients are
not all finite is skipped whatever the kind: parameters, moments, counts and the schedule stay what
they were, and a dynamic scale is lowered.

Knows JAX, optax and which dtypes are wide.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from lmjax.precision.exact import at_least_f32

Kind = Literal["auto", "none", "static", "dynamic"]


@dataclass(frozen=True)
class LossScaleConfig:
    """How the loss is scaled. Every number is a power of two, so that scaling is exact."""

    kind: Kind = "auto"
    """none, static, dynamic; auto is dynamic where the policy uses f16 and none elsewhere."""
    initial: float = 2.0**15
    """The scale of the first step, and of every step when static."""
    growth_interval: int = 2000
    """Finite steps in a row after which a dynamic scale grows."""
    factor: float = 2.0
    """A dynamic scale grows by this factor, and shrinks by it after a non-finite gradient."""
    minimum: float = 1.0
    """A dynamic scale never falls below this."""
    maximum: float = 2.0**24
    """A dynamic scale never rises above this: far beyond it, its reciprocal would be 0."""
    max_consecutive_skips: int = 50
    """Training stops with an error after this many skipped steps in a row."""

    def __post_init__(self) -> None:
        """Refuses scales that would round, and bounds that contradict each other."""
        for name in ("initial", "factor", "minimum", "maximum"):
            value = getattr(self, name)
            if not (value > 0 and math.isfinite(value) and math.frexp(value)[0] == 0.5):
                raise ValueError(
                    f"loss_scale.{name} is {value}; use a power of two, so that scaling is exact"
                )
        if not self.minimum <= self.initial <= self.maximum:
            raise ValueError(
                f"loss_scale.initial is {self.initial}, outside minimum {self.minimum} to maximum "
                f"{self.maximum}; change one of the three"
            )
        if not 2.0**-64 <= self.minimum <= self.maximum <= 2.0**64:
            raise ValueError(
                "loss_scale.minimum and maximum must lie between 2^-64 and 2^64: beyond, the scale "
                "or its reciprocal drowns gradients in f32"
            )
        if self.factor <= 1:
            raise ValueError(f"loss_scale.factor is {self.factor}; use 2 or more")
        if self.growth_interval < 1 or self.max_consecutive_skips < 1:
            raise ValueError(
                "loss_scale.growth_interval and max_consecutive_skips must be at least 1"
            )


class LossScaleState(NamedTuple):
    """State of the loss scale, around the state of the transformation it wraps.

    Attributes:
      scale: f32[], what the next step multiplies its loss by.
      good_steps: int32[], finite steps since the scale last changed.
      skipped_steps: int32[], steps skipped so far.
      consecutive_skips: int32[], steps skipped since the last finite one.
      inner: the wrapped transformation's state.
    """

    scale: jax.Array
    good_steps: jax.Array
    skipped_steps: jax.Array
    consecutive_skips: jax.Array
    inner: Any


def with_loss_scale(
    inner: optax.GradientTransformation, config: LossScaleConfig
) -> optax.GradientTransformation:
    """Wraps an optimizer so that non-finite gradients skip the step and adjust the scale.

    Args:
      inner: everything that may only see finite, unscaled f32 gradients: clipping, the optimizer.
      config: with `kind` resolved; see `resolve_kind`.

    Returns:
      A transformation whose `update` takes *unscaled* f32 gradients (see `unscale`), over all
      micro-batches. On a skipped step the updates are zeros and `inner`'s state is unchanged.
    """
    if config.kind == "auto":
        raise ValueError("loss_scale.kind is 'auto'; resolve it against a policy first")
    initial = 1.0 if config.kind == "none" else config.initial

    def init(params: optax.Params) -> LossScaleState:
        scale = jnp.asarray(initial, jnp.float32)
        # An array each: a buffer that stands in the state twice could not be donated.
        zero = lambda: jnp.zeros((), jnp.int32)
        return LossScaleState(scale, zero(), zero(), zero(), inner.init(params))

    def update(
        gradients: optax.Updates, state: optax.OptState, params: optax.Params | None = None
    ) -> tuple[optax.Updates, LossScaleState]:
        """Unscaled f32 gradients to f32 updates, zeros where the step is skipped."""
        finite = all_finite(gradients)
        updates, inner_state = inner.update(gradients, state.inner, params)
        # A select, not a branch: it costs nothing beside the arithmetic, works under vmap, and
        # never multiplies a NaN by 0.
        updates = jax.tree.map(lambda u: jnp.where(finite, u, jnp.zeros_like(u)), updates)
        kept = jax.tree.map(lambda new, old: jnp.where(finite, new, old), inner_state, state.inner)
        return updates, _adjust(state, finite, config)._replace(inner=kept)

    return optax.GradientTransformation(init, update)


def _adjust(state: LossScaleState, finite: jax.Array, config: LossScaleConfig) -> LossScaleState:
    """The counters, and for a dynamic scale the scale, after one step."""
    skipped = 1 - finite.astype(jnp.int32)
    good_steps = (state.good_steps + 1) * (1 - skipped)
    scale = state.scale
    if config.kind == "dynamic":
        grow = good_steps >= config.growth_interval
        grown = jnp.minimum(scale * config.factor, config.maximum)
        shrunk = jnp.maximum(scale / config.factor, config.minimum)
        scale = jnp.where(finite, jnp.where(grow, grown, scale), shrunk)
        good_steps = jnp.where(grow, 0, good_steps)
    return state._replace(
        scale=scale,
        good_steps=good_steps,
        skipped_steps=state.skipped_steps + skipped,
        consecutive_skips=(state.consecutive_skips + 1) * skipped,
    )


def current(state: LossScaleState) -> jax.Array:
    """f32[]: what this step multiplies its loss by and divides its gradients by."""
    return state.scale


def unscale(gradients: Any, scale: jax.Array) -> Any:
    """Gradients of the scaled loss, widened to f32 (f64 stays) and then divided by the scale."""

    def one(gradient: jax.Array) -> jax.Array:
        wide = at_least_f32(gradient.dtype)
        return gradient.astype(wide) / scale.astype(wide)

    return jax.tree.map(one, gradients)


def all_finite(tree: Any) -> jax.Array:
    """bool[]: no leaf anywhere, on any device, holds an infinity or a NaN."""
    return jnp.all(jnp.stack([jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves(tree)]))


def resolve_kind(kind: Kind, exponent_bits: int) -> Kind:
    """What `auto` stands for, given the fewest exponent bits that parameters or compute have.

    bf16 shares the 8 exponent bits of f32 and needs no scaling; f16 has 5.
    """
    if kind != "auto":
        return kind
    return "dynamic" if exponent_bits < 8 else "none"
