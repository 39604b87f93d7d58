"""Times contestants in turn in one process and computes paired ratios.

In each round every contestant takes a few steps, and the order rotates from round to round, so that
other load on the machine affects all of them alike. Times are compared within a round: a ratio is
paired by round.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from statistics import median
from typing import Any, NamedTuple

import jax
import numpy as np

from lmjax.train import Config

Contestant = Callable[[int], float]
"""Takes a number of steps and returns the seconds per step."""


def random_batch(config: Config, seed: int = 0) -> dict[str, np.ndarray]:
    """`inputs` and `targets`, `int32[batch_size, context]`: uniformly random tokens."""
    shape = (config.batch_size, config.context + 1)
    tokens = np.random.default_rng(seed).integers(0, config.model.vocab_size, shape, np.int32)
    return {"inputs": tokens[:, :-1], "targets": tokens[:, 1:]}


def stepper(step: Callable[[Any, Any], Any], state: Any, batch: Any) -> Contestant:
    """Returns a contestant that repeats a train step on one batch; compiles it immediately."""

    def run(steps: int) -> float:
        nonlocal state
        start = time.perf_counter()
        for _ in range(steps):
            state, metrics = step(state, batch)
        jax.block_until_ready((state, metrics))
        return (time.perf_counter() - start) / steps

    run(1)
    return run


def take_turns(
    contestants: Mapping[str, Contestant], rounds: int, steps: int
) -> dict[str, list[float]]:
    """The seconds of a step in each round, by contestant.

    Args:
      contestants: by name; the first begins the first round.
      rounds: how often each has its turn.
      steps: of a turn.
    """
    names = list(contestants)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for index in range(rounds):
        first = index % len(names)
        for name in (*names[first:], *names[:first]):
            seconds[name].append(contestants[name](steps))
    return seconds


class Ratio(NamedTuple):
    """A paired ratio: its median, and the interval that holds the true median at `confidence`."""

    median: float
    low: float
    high: float
    confidence: float

    def __str__(self) -> str:
        """As in docs/speed.md: `1.13 (1.06 to 1.15, 96%)`."""
        return f"{self.median:.2f} ({self.low:.2f} to {self.high:.2f}, {self.confidence:.0%})"


def paired_ratio(ours: Sequence[float], theirs: Sequence[float]) -> Ratio:
    """The ratio of two contestants, round by round.

    The narrowest interval between order statistics of at least 95% confidence (Conover 1999,
    section 3.2), or the whole range where there are too few rounds for that.
    """
    ratios = sorted(a / b for a, b in zip(ours, theirs, strict=True))
    count = len(ratios)
    confidences = [
        1 - 2 * sum(math.comb(count, i) for i in range(below + 1)) / 2**count
        for below in range((count + 1) // 2)
    ]
    below = max((i for i, confidence in enumerate(confidences) if confidence >= 0.95), default=0)
    return Ratio(median(ratios), ratios[below], ratios[count - 1 - below], confidences[below])
