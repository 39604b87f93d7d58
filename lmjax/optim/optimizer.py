"""From an optimizer config to one optax transformation, its arithmetic in f32 throughout.

Order, outermost first: loss scale (finite test, skip) -> clip -> direction -> weight decay ->
learning rate. Gradients arrive unscaled, in f32 and summed over micro-batches.

Knows JAX, optax and paths of parameters.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Annotated, Any, Literal, cast, get_args

import jax
import jax.numpy as jnp
import optax

from lmjax.checks import above, at_least, from_to_below, validate
from lmjax.optim import muon
from lmjax.optim.loss_scale import LossScaleConfig, with_loss_scale
from lmjax.optim.pruning import PruningConfig, with_pruning
from lmjax.optim.storage import ParamSites, with_stored_moments
from lmjax.precision import paths
from lmjax.precision.exact import at_least_f32
from lmjax.precision.policy import STORED_AS_F32
from lmjax.precision.sites import Stack
from lmjax.precision.squares import Root, tree_root

TreeNorm = Callable[[Any], Root]
"""From a tree of arrays to f32[], the root of the sum of their squares, and its scale."""


@dataclass(frozen=True)
class OptimizerConfig:
    """Optimizer and learning-rate schedule."""

    name: Literal["adamw", "lion", "muon"] = "adamw"
    """AdamW (Loshchilov and Hutter 2019), Lion (Chen et al. 2023), Muon (Jordan et al. 2024)."""
    learning_rate: Annotated[float, above(0)] = 1e-3
    """Peak learning rate. For muon, that of the weight matrices."""
    schedule: Literal["cosine", "wsd", "constant"] = "cosine"
    """After the warm-up: cosine decay, stable then linear decay (warmup-stable-decay), constant."""
    warmup_steps: Annotated[int, at_least(0)] = 100
    """Steps of linear warm-up."""
    final_fraction: Annotated[float, at_least(0, 1)] = 0.1
    """Where the decay of cosine and wsd ends after the last step, as a share of the peak."""
    decay_fraction: Annotated[float, at_least(0, 1)] = 0.2
    """Share of all steps that wsd spends decaying."""
    extensions: tuple[str, ...] = ()
    """Where --extend-steps prolonged a finished run, and how: STEPS:constant or STEPS:rewarm."""
    b1: Annotated[float, from_to_below(0, 1)] = 0.9
    """Decay of the first moment; momentum of muon."""
    b2: Annotated[float, from_to_below(0, 1)] = 0.99
    """Decay of the second moment."""
    eps: Annotated[float, above(0)] = 1e-8
    """Added to the root of the second moment."""
    weight_decay: Annotated[float, at_least(0)] = 0.1
    """Decoupled weight decay, times the learning rate. With muon, of its matrices alone."""
    no_decay: tuple[str, ...] = ("**/bias", "**/scale")
    """Parameters that are not decayed, by path."""
    adam_learning_rate: Annotated[float, above(0)] = 1e-3
    """Muon only: peak learning rate of all parameters other than weight matrices of blocks."""
    clip_norm: Annotated[float, at_least(0, hint="0 switches clipping off")] = 1.0
    """Largest global norm of the gradients, or in a unit-scaled model largest root mean square; 0
    switches clipping off."""

    def __post_init__(self) -> None:
        """Refuses values outside the range where the formulas mean anything."""
        validate(self, "optimizer")
        starts = [start for start, _ in extensions(self)]
        if starts != sorted({*starts}) or 0 in starts:
            raise ValueError(
                f"optimizer.extensions is {', '.join(self.extensions)}; each must start later than "
                "the one before"
            )


Extension = Literal["constant", "rewarm"]
"""How a finished run is prolonged: at the learning rate where its schedule ended, or by another
warm-up, from there to the peak, and another decay (Ibrahim et al. 2024, section 4)."""


def extensions(config: OptimizerConfig) -> list[tuple[int, Extension]]:
    """The step at which each extension starts, and its kind.

    Raises:
      ValueError: one is not written as STEPS:constant or STEPS:rewarm.
    """
    found: list[tuple[int, Extension]] = []
    for text in config.extensions:
        start, _, kind = text.partition(":")
        if not start.isdecimal() or kind not in get_args(Extension):
            raise ValueError(
                f"optimizer.extensions has {text!r}; write STEPS:constant or STEPS:rewarm, or "
                "leave it to --extend-steps"
            )
        found.append((int(start), cast(Extension, kind)))
    return found


def learning_rate_schedule(
    config: OptimizerConfig, steps: int, peak: float | None = None
) -> optax.Schedule:
    """The learning rate as a function of the number of steps taken; skipped steps do not count.

    Args:
      config: shape of the schedule.
      steps: planned length of the run, its extensions included.
      peak: learning rate after the warm-up; by default `config.learning_rate`.
    """
    peak = config.learning_rate if peak is None else peak
    starts = [start for start, _ in extensions(config)]
    if not starts:
        return _planned(config, steps, peak)
    last = peak if config.schedule == "constant" else peak * config.final_fraction
    parts, ends = [_planned(config, starts[0], peak)], [*starts[1:], steps]
    for (start, kind), end in zip(extensions(config), ends, strict=True):
        rewarmed = _planned(config, end - start, peak, first=last)
        parts.append(optax.constant_schedule(last) if kind == "constant" else rewarmed)
    return optax.join_schedules(parts, starts)


def _planned(
    config: OptimizerConfig, steps: int, peak: float, first: float = 0.0
) -> optax.Schedule:
    """The schedule of so many steps without extensions, which starts to rise at `first`."""
    warmup = min(config.warmup_steps, steps)
    final = peak * config.final_fraction
    rest = max(steps - warmup, 1)
    # The first step already moves: the ramp is (step + 1) / warmup, not step / warmup.
    start = first + (peak - first) / max(warmup, 1)
    ramp = optax.linear_schedule(start, peak, max(warmup - 1, 1))
    if config.schedule == "cosine":
        after = optax.cosine_decay_schedule(peak, rest, alpha=config.final_fraction)
    elif config.schedule == "wsd":
        decay = min(max(round(config.decay_fraction * steps), 1), rest)
        stable = optax.constant_schedule(peak)
        fall = optax.linear_schedule(peak, final, decay)
        after = optax.join_schedules([stable, fall], [rest - decay])
    else:
        after = optax.constant_schedule(peak)
    return optax.join_schedules([ramp, after], [warmup]) if warmup else after


def make_optimizer(
    config: OptimizerConfig,
    loss_scale: LossScaleConfig,
    steps: int,
    sites: ParamSites,
    stack: Stack | None = None,
    rates: Mapping[str, float] = MappingProxyType({}),
    norm: TreeNorm = tree_root,
    pruning: PruningConfig = PruningConfig(),  # noqa: B008 - frozen
) -> optax.GradientTransformationExtraArgs:
    """The whole chain; its state is a `LossScaleState` with everything else inside.

    Args:
      config: optimizer and schedule.
      loss_scale: with its kind resolved.
      steps: planned length of the run, for the schedule.
      sites: the formats of each parameter, by its path; they say how moments are stored.
      stack: the blocks of the model, for Muon and for loss scales of their own.
      rates: what the learning rates of parameters are multiplied by, by path; by default 1.
      norm: of all gradients, by which they are clipped; a step where it is not finite is skipped.
      pruning: which weights of the blocks become zero, and when.

    Returns:
      A transformation of unscaled f32 gradients into f32 updates. Parameters are widened to f32
      before they reach it, so moments and decay never see a narrow format: eps = 1e-8 is 0 in f16.
    """
    clipped = [optax.identity()] if config.clip_norm else []  # its place in checkpoints
    multiply = [_multiply(rates)] if rates else []
    chain = optax.chain(*clipped, _direction(config, steps, stack), *multiply)
    inner = _in_f32(with_stored_moments(chain, sites))
    if pruning.pattern != "none":
        if stack is None:
            raise ValueError("pruning needs `stack`, the blocks of the model")
        inner = with_pruning(inner, pruning, sites, stack)
    clip = functools.partial(_clip, config.clip_norm)
    stays_finite = functools.partial(_stays_finite, config.clip_norm)
    bounded = _is_bounded(config, sites) and pruning.pattern == "none"
    return with_loss_scale(inner, loss_scale, stack, norm, clip, stays_finite if bounded else None)


def _is_bounded(config: OptimizerConfig, sites: ParamSites) -> bool:
    """Whether moments and updates are finite as long as the squares of gradients are.

    A moment in f32 is a mean of gradients or of their squares, and so no larger than the largest of
    them; with settings no stranger than these, a quotient of moments is far from overflow.
    """
    usual = (
        max(config.b1, config.b2) <= 1 - 2.0**-20
        and config.eps >= 1e-15
        and max(config.learning_rate, config.weight_decay) <= 1
    )
    wide = all(s.mu == s.nu == STORED_AS_F32 for s in sites.values())
    return usual and wide and config.name in ("adamw", "lion")


def _stays_finite(limit: float, root: Root) -> jax.Array:
    """bool[]: the norm is finite, and so is the square of every clipped gradient."""
    largest = jnp.minimum(root.value, limit) if limit else root.value
    return jnp.isfinite(root.value) & jnp.isfinite(jnp.square(largest))


def _direction(
    config: OptimizerConfig, steps: int, stack: Stack | None
) -> optax.GradientTransformation:
    schedule = learning_rate_schedule(config, steps)
    decayed = lambda params: _by_path(
        lambda p, _: not paths.matches_any(config.no_decay, p), params
    )
    if config.name == "muon":
        matrices = optax.chain(
            muon.scale_by_muon(config.b1, config.eps),
            muon.scale_by_shape(),
            optax.add_decayed_weights(config.weight_decay, mask=decayed),
            optax.scale_by_learning_rate(schedule),
        )
        others = optax.nadamw(
            learning_rate_schedule(config, steps, config.adam_learning_rate),
            b1=config.b1,
            b2=config.b2,
            eps=config.eps,
            weight_decay=0.0,
            mu_dtype=jnp.float32,
        )
        label = functools.partial(_muon_or_adam, stack)
        return optax.partition({"muon": matrices, "adam": others}, label)
    if config.name == "lion":
        scale = optax.scale_by_lion(config.b1, config.b2, mu_dtype=jnp.float32)
    else:
        scale = optax.scale_by_adam(config.b1, config.b2, config.eps, mu_dtype=jnp.float32)
    return optax.chain(
        scale,
        optax.add_decayed_weights(config.weight_decay, mask=decayed),
        optax.scale_by_learning_rate(schedule),
    )


def _clip(limit: float, root: Root) -> tuple[jax.Array, ...]:
    """Factors, at most 1 each, that make the norm of gradients at most `limit`; none for 0.

    XLA may write x / sqrt(s) as x rsqrt(s), which rounds otherwise, and does so where it sees both;
    that depends on how arrays are cut. Behind a barrier the factor is one number for all of them.

    A large norm is compared with the limit, and gradients are multiplied, after both were scaled as
    for the squares: the quotient of limit and norm alone may be too small for f32.
    """
    if not limit:
        return ()
    lowered = jnp.minimum(root.scale, 1.0)
    factor = limit / jnp.maximum(root.scaled * (lowered / root.scale), limit * lowered)
    return jax.lax.optimization_barrier((lowered, factor))


def _multiply(rates: Mapping[str, float]) -> optax.GradientTransformation:
    """Multiplies the update of each parameter, its weight decay included, by a number."""
    return optax.stateless(
        lambda updates, _: _by_path(lambda path, u: u * rates.get(path, 1.0), updates)
    )


def _muon_or_adam(stack: Stack | None, params: Any) -> Any:
    """Muon turns the matrices of blocks, stacked `[layers, in, out]`, one for each layer."""
    is_matrix = lambda path, leaf: stack is not None and stack.holds(path) and leaf.ndim == 3
    return _by_path(lambda path, leaf: "muon" if is_matrix(path, leaf) else "adam", params)


def _by_path(choose: Any, params: Any) -> Any:
    return jax.tree_util.tree_map_with_path(
        lambda keys, leaf: choose(paths.path_string(keys), leaf), params
    )


def _in_f32(inner: optax.GradientTransformation) -> optax.GradientTransformation:
    """Shows the inner transformation parameters in at least f32, so that its moments are too.

    Products that a library multiplies in there are those of f32 as well, unless it says otherwise
    itself: without a word, GPUs would use TF32 and TPUs bf16.
    """

    def widen(params: Any) -> Any:
        return jax.tree.map(lambda p: p.astype(at_least_f32(p.dtype)), params)

    def update(gradients: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        with jax.default_matmul_precision("highest"):
            return inner.update(gradients, state, widen(params))

    return optax.GradientTransformation(lambda params: inner.init(widen(params)), update)
