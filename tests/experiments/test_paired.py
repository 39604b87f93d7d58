"""Contestants take turns, and their ratio has the interval that it says."""

from __future__ import annotations

import math

import numpy as np

from experiments.benchmarks.paired import paired_ratio, take_turns


def test_the_order_rotates_and_times_are_kept_by_round():
    turns: list[tuple[str, int]] = []

    def contestant(name: str):
        return lambda steps: turns.append((name, steps)) or float(len(turns))

    seconds = take_turns({name: contestant(name) for name in "abc"}, 4, 7)
    assert "".join(name for name, _ in turns) == "abcbcacababc"
    assert {steps for _, steps in turns} == {7}
    assert seconds == {"a": [1, 6, 8, 10], "b": [2, 4, 9, 11], "c": [3, 5, 7, 12]}


def test_a_ratio_is_paired_by_round():
    # The machine halves its speed for some rounds; the ratio of each round is 2 all the same.
    theirs = [100.0, 50.0, 100.0, 50.0, 50.0, 100.0, 50.0, 100.0]
    ratio = paired_ratio([2 * speed for speed in theirs], theirs)
    assert ratio == (2.0, 2.0, 2.0, 1 - 2 / 2**8)


def test_the_interval_is_that_of_the_sign_test():
    # Of 10 rounds, the second and the ninth: 1 - 2 (1 + 10) / 2^10.
    ratio = paired_ratio([float(n) for n in range(1, 11)], [1.0] * 10)
    assert (ratio.low, ratio.high) == (2.0, 9.0)
    assert ratio.confidence == 1 - 22 / 1024


def test_the_interval_holds_the_median_as_often_as_it_says():
    generator = np.random.default_rng(0)
    draws = generator.normal(1.0, 0.1, (2000, 10))
    ratios = [paired_ratio(draw, np.ones(10)) for draw in draws]
    held = np.mean([ratio.low <= 1.0 <= ratio.high for ratio in ratios])
    promised = ratios[0].confidence
    assert abs(held - promised) < 4 * math.sqrt(promised * (1 - promised) / 2000)
