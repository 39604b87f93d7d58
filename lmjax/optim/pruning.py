"""Pruning during training: weights are set to zero, and a zero stays zero.

A pruned weight needs no mask beside it: it is the number 0, which no update changes any more. It
therefore survives checkpoints, another optimizer, quantization (all formats here have an exact
zero) and whatever reads the parameters.

    unstructured   a share of the inputs of each output is zero
    N:M            of M inputs in a row, at most N are not

The share grows along a cubic from nothing at `start` to its end at `end` (Zhu and Gupta 2018,
arXiv 1710.01878, equation 1); whatever has the least magnitude goes. With `end` no later than
`start`, everything goes at once, and the remaining steps are fine-tuning.

Knows JAX, optax and paths of parameters.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from lmjax.checks import at_least, from_to_below, validate
from lmjax.optim.storage import ParamSites
from lmjax.precision import paths
from lmjax.precision.sites import Stack


@dataclass(frozen=True)
class PruningConfig:
    """Which weights of blocks become zero during training, and when."""

    pattern: str = "none"
    """none; unstructured; or N:M such as 2:4: at most N of M inputs in a row are not zero."""
    sparsity: Annotated[float, from_to_below(0, 1)] = 0.5
    """Share of zeros in the end, if unstructured."""
    start: Annotated[int, at_least(0)] = 0
    """Number of steps before the first weights are pruned."""
    end: Annotated[int, at_least(0)] = 0
    """Number of steps after which no more are; at or before the start: all at once."""
    every: Annotated[int, at_least(1)] = 10
    """Steps between one choice of weights and the next, from start to end."""
    dense: tuple[str, ...] = ()
    """Weights that are not pruned, by path, such as blocks/mlp/down/kernel."""

    def __post_init__(self) -> None:
        """Rejects patterns that nothing follows from."""
        validate(self, "pruning")
        if self.pattern != "none":
            parse_pattern(self.pattern)

    def zeros(self, count: jax.Array, size: int) -> jax.Array:
        """Zeros in each group after `count` steps, int32[], of `size` inputs of an output."""
        kept, group = parse_pattern(self.pattern)
        last = (group - kept) if group else int(self.sparsity * size)
        span = max(self.end - self.start, 1)
        progress = jnp.clip((count - self.start) / span, 0.0, 1.0) if self.end > self.start else 1.0
        share = 1.0 - (1.0 - progress) ** 3
        # The end is exact: 2:4 has two zeros, not 1.9999 rounded down.
        zeros = jnp.floor(last * share + 1e-4).astype(jnp.int32)
        return jnp.where(count >= self.start, zeros, 0)


def parse_pattern(pattern: str) -> tuple[int, int]:
    """N and M of a pattern N:M; 0 and 0 of `unstructured`.

    Raises:
      ValueError: it is neither.
    """
    if pattern == "unstructured":
        return 0, 0
    match = re.fullmatch(r"([1-9]\d?):([1-9]\d?)", pattern)
    if match is None or not int(match[1]) < int(match[2]):
        raise ValueError(
            f"'{pattern}' is not a pattern of pruning; write unstructured, or N:M with N below M, "
            "such as 2:4"
        )
    return int(match[1]), int(match[2])


def refuse_uneven(pattern: str, inputs: Mapping[str, int], dense: Sequence[str]) -> list[str]:
    """Rejects a pattern whose groups do not divide the inputs of a weight.

    Args:
      pattern: of pruning.
      inputs: paths of weights, and how many inputs each has.
      dense: which of them are not pruned.

    Returns:
      The paths of those that are.

    Raises:
      ValueError: names the first that the pattern does not divide; or no weight is to stay dense by
        one of these paths, or all are.
    """
    _, group = parse_pattern(pattern)
    for own in dense:
        if not any(paths.matches_any((own,), path) for path in inputs):
            raise ValueError(f"dense is {own}, but the weights are {', '.join(inputs)}")
    pruned = [path for path in inputs if not paths.matches_any(dense, path)]
    for path in pruned:
        if group and inputs[path] % group:
            raise ValueError(
                f"pruning {pattern} cuts inputs into groups of {group}, which do not divide the "
                f"{inputs[path]} inputs of {path}; choose another pattern, or name that weight "
                "among those to leave dense"
            )
    if not pruned:
        raise ValueError("all weights are to stay dense, so nothing is pruned")
    return pruned


def refuse_unfit(config: PruningConfig, steps: int, inputs: Mapping[str, int]) -> None:
    """Rejects a pattern that does not divide weights, or is never reached.

    Args:
      config: which weights are pruned, and when.
      steps: planned length of the run.
      inputs: paths of the matrices of blocks, and how many inputs each has.

    Raises:
      ValueError: says what to change.
    """
    if config.pattern == "none":
        return
    last = max(config.start + 1, config.end)
    if last > steps:
        raise ValueError(
            f"pruning ends after step {last}, but the run ends after {steps} steps; prune earlier "
            "or raise --steps"
        )
    refuse_uneven(config.pattern, inputs, config.dense)


def keep_mask(score: jax.Array, zeros: jax.Array | int, group: int = 0) -> jax.Array:
    """Which weights stay: in each group all but those with the lowest scores, earlier ones first.

    Args:
      score: `[..., K, N]`, K the inputs of N outputs.
      zeros: how many go in each group, int32[].
      group: inputs in a row that make a group; 0: all inputs of an output.

    Returns:
      bool `[..., K, N]`.
    """
    length = score.shape[-2]
    cut = score.reshape(*score.shape[:-2], -1, group or length, score.shape[-1])
    rank = jnp.argsort(jnp.argsort(cut, axis=-2), axis=-2)
    return (rank >= zeros).reshape(score.shape)


class PruningState(NamedTuple):
    """State of pruning around that of an optimizer.

    Attributes:
      taken: int32[], steps taken; skipped ones do not count.
      inner: the optimizer's state.
    """

    taken: jax.Array
    inner: Any


def with_pruning(
    inner: optax.GradientTransformation,
    config: PruningConfig,
    sites: ParamSites,
    stack: Stack,
) -> optax.GradientTransformation:
    """Wraps an optimizer so that its updates make weights zero, and keep zeros.

    Args:
      inner: from gradients to f32 updates.
      config: which weights, and when.
      sites: how each parameter is stored.
      stack: the blocks; their matrices `[layers, K, N]` are pruned, each layer by itself.

    Raises:
      ValueError: a pruned weight is stored with what its updates lost, which would revive it.
    """
    _, group = parse_pattern(config.pattern)
    for path, site in sites.items():
        if stack.holds(path) and path.endswith("kernel") and site.update == "kahan":
            raise ValueError(f"{path} is stored as .kahan, which would revive pruned weights")

    def init(params: optax.Params) -> PruningState:
        return PruningState(jnp.zeros((), jnp.int32), inner.init(params))

    def update(gradients: Any, state: PruningState, params: Any = None) -> tuple[Any, PruningState]:
        """The updates of `inner`; weights that are pruned become zero and stay zero."""
        updates, kept = inner.update(gradients, state.inner, params)
        count = state.taken + 1
        due = (count > config.start) & (
            (count <= max(config.end, config.start + 1))
            & ((count - config.start - 1) % config.every == 0)
            | (count == max(config.end, config.start + 1))
        )

        def one(keys: Any, param: jax.Array, update: jax.Array) -> jax.Array:
            """The update of one parameter, with which pruned weights become or stay zero."""
            path = paths.path_string(keys)
            if not _is_pruned(path, param, config, stack):
                return update
            wide = param.astype(update.dtype)
            zeros = config.zeros(count, param.shape[-2])
            choose = lambda p: keep_mask(jnp.abs(p), zeros, group) & (p != 0)
            keep = jax.lax.cond(due, choose, lambda p: p != 0, wide)
            keep = keep | (count <= config.start)
            return jnp.where(keep, update, -wide)

        updates = jax.tree_util.tree_map_with_path(one, params, updates)
        return updates, PruningState(count, kept)

    return optax.GradientTransformation(init, update)


def _is_pruned(path: str, param: jax.Array, config: PruningConfig, stack: Stack) -> bool:
    is_matrix = stack.holds(path) and param.ndim == 3
    return is_matrix and not paths.matches_any(config.dense, path)
