"""Loss scaling: none, static, dynamic or predictive, as one optax transformation around all others.

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
they were, and a dynamic scale is lowered. Under a dynamic or predictive scale, cotangents beyond
the range of a format without infinities become NaN instead of being clamped, so that they count as
an overflow (`precision/rounding.py` states the rule). A step is also skipped, without touching the
scale, if its gradients are finite but their norm, an update or a new moment is not: a second moment
that has become infinite would freeze its parameter for good, and nothing in the loss would show it.
A predictive scale is told in step 3 how cotangents spread (`cotangents=...`, see
`optim/forecast.py`).

There may be a scale for each block of the model (`per_block`). Then the scale is a vector: one
number a block, and last that of everything outside of the blocks, which the loss is multiplied by;
the model multiplies cotangents by the ratio where they pass from one block into the next.

Knows JAX, optax, formats and how forecasts are made.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Annotated, Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from lmjax.checks import at_least, housekeeping, power_of_two, validate
from lmjax.optim.forecast import Forecast, initial_forecast, predict, remember
from lmjax.precision import paths
from lmjax.precision.exact import at_least_f32
from lmjax.precision.formats import Format, parse_format
from lmjax.precision.probes import Spread
from lmjax.precision.sites import Stack
from lmjax.precision.squares import Root, tree_root

ScaleKind = Literal["auto", "none", "static", "dynamic", "predictive"]

Scale = Annotated[
    float, power_of_two(2.0**-64, 2.0**64, hint="scaling by it is exact and keeps f32 in range")
]


@dataclass(frozen=True)
class LossScaleConfig:
    """How the loss is scaled. Every number is a power of two, so that scaling is exact."""

    kind: ScaleKind = "auto"
    """none, static, dynamic, predictive; auto: dynamic where parameters, compute or cotangents
    without a factor have fewer than 8 exponent bits, unless the model is unit scaled, else none."""
    initial: Scale = 2.0**15
    """The scale of the first step, and of every step when static."""
    per_block: bool = False
    """A dynamic or predictive scale for each block, instead of one for all."""
    growth_interval: Annotated[int, at_least(1)] = 2000
    """Finite steps in a row after which a dynamic scale grows."""
    factor: Annotated[float, power_of_two(2, 2.0**64)] = 2.0
    """A dynamic scale grows by this factor, and shrinks by it after a non-finite gradient."""
    minimum: Scale = 1.0
    """A dynamic or predictive scale never falls below this."""
    maximum: Scale = 2.0**24
    """A dynamic or predictive scale never rises above this."""
    overflow_probability: Annotated[float, at_least(1e-12, 0.5)] = 1e-4
    """A predictive scale keeps the chance that a step overflows below this."""
    memory: Annotated[int, at_least(1)] = 20
    """Steps over which a predictive scale forgets what it saw by a factor e."""
    format: str = "auto"
    """What a predictive scale keeps cotangents in the range of; auto: the policy's narrowest."""
    max_consecutive_skips: Annotated[
        int, at_least(1), housekeeping("it decides when a run gives up, not what its steps compute")
    ] = 50
    """Training stops with an error after this many skipped steps in a row."""

    def __post_init__(self) -> None:
        """Refuses scales that would round, and bounds that contradict each other."""
        validate(self, "loss_scale")
        if not self.minimum <= self.initial <= self.maximum:
            raise ValueError(
                f"loss_scale.initial is {self.initial}; it must be from loss_scale.minimum, "
                f"{self.minimum}, to loss_scale.maximum, {self.maximum}; change one of the three"
            )
        if self.format != "auto":
            parse_format(self.format)
        if self.per_block and self.kind in ("none", "static"):
            raise ValueError(
                f"loss_scale.per_block needs a scale that adapts, but loss_scale.kind is "
                f"{self.kind}; use dynamic or predictive"
            )


class LossScaleState(NamedTuple):
    """State of the loss scale, around the state of the transformation it wraps.

    Attributes:
      scale: f32[], what the next step multiplies its loss by; f32[blocks + 1] with a scale for each
        block.
      good_steps: int32, of the same shape, finite steps since the scale last changed.
      skipped_steps: int32[], steps skipped so far.
      consecutive_skips: int32[], steps skipped since the last finite one.
      forecast: what a predictive scale remembers; nothing for the other kinds.
      inner: the wrapped transformation's state.
    """

    scale: jax.Array
    good_steps: jax.Array
    skipped_steps: jax.Array
    consecutive_skips: jax.Array
    forecast: Forecast | tuple[()]
    inner: Any


def with_loss_scale(
    inner: optax.GradientTransformation,
    config: LossScaleConfig,
    stack: Stack | None = None,
    norm: Callable[[Any], Root] = tree_root,
    clip: Callable[[Root], tuple[jax.Array, ...]] = lambda _: (),
    stays_finite: Callable[[Root], jax.Array] | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Wraps an optimizer so that non-finite gradients skip the step and adjust the scale.

    Args:
      inner: everything that may only see finite, unscaled and clipped f32 gradients.
      config: with `kind` and `format` resolved; see `resolve_kind`.
      stack: the blocks of the model, for `per_block`.
      norm: of all gradients; a step where it is not finite is skipped as well.
      clip: from their norm to what gradients are multiplied by, one factor after another.
      stays_finite: from their norm, whether everything that `inner` makes of them is finite;
        `inner` then works in place. None: its results decide, and exist beside the old state.

    Returns:
      A transformation whose `update` takes *unscaled* f32 gradients (see `unscale`), over all
      micro-batches, and for a predictive scale `cotangents`, a `Spread` with the shape of the scale
      in front. On a skipped step the updates are zeros and `inner`'s state is unchanged. Given
      `take` and `kept`, it returns `take(updates)`, and `kept` on a skipped step.
    """
    if config.kind == "auto":
        raise ValueError("loss_scale.kind is 'auto'; resolve it against a policy first")
    shape = (_of(stack).size + 1,) if config.per_block else ()

    def init(params: optax.Params) -> LossScaleState:
        return _initial_state(config, shape, inner.init(params))

    def update(
        gradients: optax.Updates,
        state: optax.OptState,
        params: optax.Params | None = None,
        *,
        cotangents: Spread | None = None,
        take: Callable[[Any], Any] = lambda updates: updates,
        kept: Any = None,
        **extra: Any,
    ) -> tuple[Any, LossScaleState]:
        """Unscaled f32 gradients to f32 updates, zeros where the step is skipped."""
        root = norm(gradients)
        finite_groups = _finite_by_scale(gradients, root, state.scale, stack)
        kept = jax.tree.map(jnp.zeros_like, gradients) if kept is None else kept
        attempt = functools.partial(_attempt, inner, clip(root), gradients, state.inner, params)
        sound, skipped = jnp.all(finite_groups) & jnp.isfinite(root.value), (kept, state.inner)
        if stays_finite is None:
            finite, (result, kept) = _side_by_side(sound, attempt, take, skipped, params)
        else:
            finite = sound & stays_finite(root)
            result, kept = _in_place(finite, attempt, take, skipped)
        if config.kind == "predictive":
            state = _foresee(state, finite_groups, cotangents, config)
        else:
            state = _adjust(state, finite_groups, config)
        return result, _counted(state, finite)._replace(inner=kept)

    return optax.GradientTransformationExtraArgs(init, update)


def _initial_state(config: LossScaleConfig, shape: tuple[int, ...], inner: Any) -> LossScaleState:
    initial = 1.0 if config.kind == "none" else config.initial
    forecast = initial_forecast(shape) if config.kind == "predictive" else ()
    # Separate arrays: a buffer that occurs twice in the state cannot be donated.
    good, skipped, consecutive = (jnp.zeros(s, jnp.int32) for s in (shape, (), ()))
    scale = jnp.full(shape, initial, jnp.float32)
    return LossScaleState(scale, good, skipped, consecutive, forecast, inner)


Attempt = Callable[[], tuple[Any, Any]]
"""The updates of an optimizer and its state after them."""


def _attempt(
    inner: optax.GradientTransformation,
    factors: Iterable[jax.Array],
    gradients: Any,
    state: Any,
    params: Any,
) -> tuple[Any, Any]:
    """What an optimizer makes of gradients times these factors."""
    for factor in factors:
        gradients = jax.tree.map(lambda g, f=factor: g * f, gradients)
    return inner.update(gradients, state, params)


def _in_place(
    finite: jax.Array, attempt: Attempt, take: Callable[[Any], Any], skipped: tuple[Any, Any]
) -> tuple[Any, Any]:
    """What is taken of an attempt and the state after it, or `skipped`.

    A branch, in which XLA writes over the arrays that it reads: a select would compute parameters
    from moments that it has to copy first.
    """

    def taken() -> tuple[Any, Any]:
        updates, state = attempt()
        # Behind a select, products that make an update are not fused with the sum that it enters,
        # so that it has the same bits whether something else reads it or not.
        return take(jax.tree.map(lambda u: jnp.where(finite, u, jnp.zeros_like(u)), updates)), state

    return jax.lax.cond(finite, taken, lambda: skipped)


def _side_by_side(
    sound: jax.Array,
    attempt: Attempt,
    take: Callable[[Any], Any],
    skipped: tuple[Any, Any],
    params: Any,
) -> tuple[jax.Array, tuple[Any, Any]]:
    """Whether all that an attempt computes is finite, and the same as `_in_place`."""
    updates, state = attempt()
    # Weight decay of a non-finite parameter does not skip the step: the broken embedding of a token
    # that never occurs harms nothing else.
    fresh = updates if params is None else jax.tree.map(_where_finite, updates, params)
    finite = sound & all_finite((fresh, state))
    # A select never multiplies a NaN by 0.
    select = lambda new, old: jnp.where(finite, new, old)
    return finite, jax.tree.map(select, (take(updates), state), skipped)


def _counted(state: LossScaleState, finite: jax.Array) -> LossScaleState:
    skipped = 1 - finite.astype(jnp.int32)
    return state._replace(
        skipped_steps=state.skipped_steps + skipped,
        consecutive_skips=(state.consecutive_skips + 1) * skipped,
    )


def _where_finite(update: jax.Array, param: jax.Array) -> jax.Array:
    return jnp.where(jnp.isfinite(param), update, jnp.zeros_like(update))


@jax.named_scope("loss_scale")
def _adjust(state: LossScaleState, finite: jax.Array, config: LossScaleConfig) -> LossScaleState:
    """The count of finite steps, and for a dynamic scale the scale, after one step."""
    good_steps = (state.good_steps + 1) * finite.astype(jnp.int32)
    scale = state.scale
    if config.kind == "dynamic":
        grow = good_steps >= config.growth_interval
        grown = jnp.minimum(scale * config.factor, config.maximum)
        shrunk = jnp.maximum(scale / config.factor, config.minimum)
        scale = jnp.where(finite, jnp.where(grow, grown, scale), shrunk)
        good_steps = jnp.where(grow, 0, good_steps)
    return state._replace(scale=scale, good_steps=good_steps)


@jax.named_scope("loss_scale")
def _foresee(
    state: LossScaleState, finite: jax.Array, cotangents: Spread | None, config: LossScaleConfig
) -> LossScaleState:
    """The forecast after one step, and the scale that follows from it."""
    if cotangents is None:
        raise ValueError("a predictive loss scale needs cotangents=..., how they spread")
    assert isinstance(state.forecast, Forecast)
    number_format = parse_format(config.format)
    maximum = jnp.where(finite, cotangents.maximum, np.float32(np.inf))
    spread = cotangents._replace(maximum=maximum)
    forecast = remember(state.forecast, spread, state.scale, number_format, config.memory)
    best = predict(
        forecast, number_format, config.overflow_probability, config.minimum, config.maximum
    )
    best = jnp.where(forecast.weight > 0, best, state.scale)
    # A scale that overflowed must fall, whatever the model of the tail predicts.
    lower = jnp.maximum(state.scale / config.factor, config.minimum)
    scale = jnp.where(finite, best, jnp.minimum(best, lower))
    good_steps = (state.good_steps + 1) * (finite & (scale == state.scale)).astype(jnp.int32)
    return state._replace(scale=scale, good_steps=good_steps, forecast=forecast)


def metrics(scale: jax.Array, state: LossScaleState) -> dict[str, jax.Array]:
    """What a step reports: the scale that it used, and the counts after it."""
    return {
        "loss_scale": of_the_loss(scale),
        "skipped_steps": state.skipped_steps,
        "consecutive_skips": state.consecutive_skips,
    }


def current(state: LossScaleState, kind: ScaleKind = "auto") -> jax.Array:
    """f32[] or f32[blocks + 1]: what this step multiplies its loss (and its cotangents) by.

    Without a scale, a constant, so that XLA divides nothing by 1.
    """
    return jnp.ones_like(state.scale) if kind == "none" else state.scale


def of_the_loss(scale: jax.Array) -> jax.Array:
    """f32[]: what the loss is multiplied by, out of the scales of all blocks."""
    return scale[-1] if scale.ndim else scale


@jax.named_scope("loss_scale")
def unscale(gradients: Any, scale: jax.Array, stack: Stack | None = None) -> Any:
    """Gradients of the scaled loss, widened to f32 (f64 stays) and then divided by the scale.

    Args:
      gradients: by the paths of parameters.
      scale: f32[], or f32[blocks + 1] with a scale for each block.
      stack: the blocks, where each has a scale.
    """

    def one(keys: Any, gradient: jax.Array) -> jax.Array:
        wide = at_least_f32(gradient.dtype)
        divisor = scale.astype(wide)
        if scale.ndim:
            stacked = _of(stack).holds(paths.path_string(keys))
            shape = (-1, *[1] * (gradient.ndim - 1))
            divisor = divisor[:-1].reshape(shape) if stacked else divisor[-1]
        return gradient.astype(wide) / divisor

    return jax.tree_util.tree_map_with_path(one, gradients)


@jax.named_scope("measuring")
def all_finite(tree: Any) -> jax.Array:
    """bool[]: no floating-point leaf, on any device, holds an infinity or a NaN.

    0 times either is NaN, and so is every sum with it: one fast pass, where XLA's CPU backend first
    writes out a predicate of each element.
    """
    floats = (x for x in jax.tree.leaves(tree) if jnp.issubdtype(x.dtype, jnp.floating))
    return jnp.all(jnp.stack([jnp.isfinite(jnp.sum(leaf * 0)) for leaf in floats]))


def _of(stack: Stack | None) -> Stack:
    if stack is None:
        raise ValueError("a loss scale for each block needs `stack`, the blocks of the model")
    return stack


@jax.named_scope("loss_scale")
def _finite_by_scale(
    gradients: Any, root: Root, scale: jax.Array, stack: Stack | None
) -> jax.Array:
    """bool, of the shape of `scale`: the gradients that each scale applies to are all finite.

    Their norm is finite, before it is scaled back, just where all of them are.
    """
    if not scale.ndim:
        return jnp.isfinite(root.scaled)
    flat = paths.flatten(gradients)
    holds = _of(stack).holds
    outside = [leaf for path, leaf in flat.items() if not holds(path)]
    inside = [
        jnp.all(jnp.isfinite(leaf), axis=tuple(range(1, leaf.ndim)))
        for path, leaf in flat.items()
        if holds(path)
    ]
    blocks = jnp.all(jnp.stack(inside), axis=0)
    return jnp.concatenate([blocks, all_finite(outside)[None]])


def resolve_kind(kind: ScaleKind, exponent_bits: int) -> ScaleKind:
    """What `auto` stands for, given the fewest exponent bits of parameters, compute and cotangents.

    bf16 shares the 8 exponent bits of f32 and needs no scaling; f16 has 5.
    """
    if kind != "auto":
        return kind
    return "dynamic" if exponent_bits < 8 else "none"


def narrowest(formats: Iterable[Format]) -> Format:
    """The format that spans the fewest binades: what `format='auto'` stands for."""
    return min(formats, key=lambda f: f.largest_exponent - f.smallest_exponent + f.mantissa_bits)
