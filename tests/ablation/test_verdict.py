"""Verdicts: their words, their error rates over many simulated ablations, what they never claim."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from lmjax.ablation.statistics import Estimate, Interval
from lmjax.ablation.verdict import (
    Comparison,
    Criteria,
    compare_arms,
    difference,
    seeds_to_add,
)
from lmjax.ablation.words import plus_minus

BASE = (2.31, 2.26, 2.28, 2.30, 2.24)


def compared(*differences: float, monitoring: str = "fixed", margin: float = 0.005) -> Comparison:
    """One arm that differs from its control by those amounts, seed by seed."""
    values = {
        "control": dict(enumerate(BASE)),
        "arm": {seed: BASE[seed] + d for seed, d in enumerate(differences)},
    }
    criteria = Criteria(margin, monitoring=monitoring)
    return compare_arms(values, {"arm": "control"}, criteria)["arm"]


@pytest.mark.parametrize(
    ("differences", "text"),
    [
        ((0.164, 0.166, 0.165, 0.169, 0.161), "worse by 0.165 ± 0.004 nats (5 seeds)"),
        ((-0.049, -0.045, -0.053), "better by 0.049 ± 0.010 nats (3 seeds)"),
        (
            (0.0012, 0.0006, 0.0009),
            "equivalent within 0.005; smallest detectable effect 0.00098 (3 seeds)",
        ),
        ((0.0040, -0.0020, 0.0030), "undecided: needs about 8 seeds"),
        ((0.0,) * 5, "equivalent within 0.005; equal in every seed (5 seeds)"),
        ((0.164, 0.166), "worse by 0.165 ± 0.013 nats (only 2 seeds, provisional)"),
        ((0.5,), "undecided: needs about 3 seeds"),
        ((0.0,), "undecided: needs about 3 seeds"),
        ((), "undecided: needs about 3 seeds"),
    ],
)
def test_verdicts_in_words(differences, text):
    comparison = compared(*differences)
    assert comparison.verdict.text == text
    assert text.startswith(comparison.verdict.kind)


def test_identical_runs_differ_by_exactly_nothing():
    comparison = compared(0.0, 0.0, 0.0)
    assert comparison.estimate.mean == 0.0
    assert comparison.interval == (0.0, 0.0)


def test_what_is_certain_but_smaller_than_the_margin_is_equivalent():
    comparison = compared(0.0020, 0.0021, 0.0019, 0.0020)
    assert comparison.p < 0.001
    assert comparison.verdict.kind == "equivalent"


def test_a_certain_difference_as_large_as_the_margin_is_not_equivalent():
    assert compared(0.0049, 0.0051, 0.0050, margin=0.005).verdict.kind == "worse"


def test_a_difference_is_shown_with_the_interval_that_its_verdict_rests_on():
    """Never `+0.000 ± 0.044` beside `equivalent within 0.01`."""
    comparison = compared(0.0010, -0.0012, margin=0.01)
    assert comparison.verdict.kind == "equivalent"
    assert not comparison.interval.inside(0.01)
    assert comparison.decisive.inside(0.01)
    assert comparison.level == 0.9
    assert difference(comparison) == "-0.0001 ± 0.0069"
    for differences in ((0.164, 0.166, 0.165), (0.004, -0.002, 0.003)):
        comparison = compared(*differences)
        assert comparison.decisive == comparison.interval
        assert comparison.level == 0.95


@pytest.mark.parametrize("monitoring", ["fixed", "anytime"])
def test_the_interval_that_is_shown_agrees_with_every_verdict(monitoring):
    generator = np.random.default_rng(5)
    kinds = set()
    for _ in range(150):
        values = {"control": dict.fromkeys(range(4), 0.0)}
        for arm in "abc":
            mean = generator.choice([0.0, 0.004, 0.02])
            values[arm] = dict(enumerate(generator.normal(mean, 0.002, 4)))
        criteria = Criteria(0.01, monitoring=monitoring)
        for found in compare_arms(values, dict.fromkeys("abc", "control"), criteria).values():
            kind, shown = found.verdict.kind, found.decisive
            kinds.add(kind)
            if kind == "equivalent":
                assert shown.inside(0.01), found
            elif kind == "undecided":
                assert shown.contains(0.0), found
                assert not shown.inside(0.01), found
            else:
                assert not shown.contains(0.0), found
    assert {"worse", "equivalent", "undecided"} <= kinds


def test_for_a_claim_each_comparison_stands_alone_with_the_interval_of_its_findings():
    values = {"control": dict.fromkeys(range(3), 0.0)} | {
        arm: dict(enumerate((0.01, 0.013, 0.008))) for arm in "ab"
    }
    criteria = Criteria(0.005, alone=True)
    found = compare_arms(values, dict.fromkeys("ab", "control"), criteria)["a"]
    assert found.decisive == pytest.approx(Estimate.of((0.01, 0.013, 0.008)).interval(0.1))
    assert found.level == 0.9


def failing(arm: dict[int, float], control: dict[int, float], **reasons: str) -> Comparison:
    said = {"arm": {int(seed[1:]): reason for seed, reason in reasons.items()}}
    values = {"control": control, "arm": arm}
    return compare_arms(values, {"arm": "control"}, Criteria(0.005), said)["arm"]


def test_an_arm_that_fails_everywhere_is_a_result():
    nan = dict.fromkeys(range(3), math.nan)
    comparison = failing(
        nan, dict(enumerate(BASE)), s0="skipped 100", s1="loss is nan", s2="loss is nan"
    )
    assert comparison.verdict == ("failed", "failed on 3 of 3 seeds: loss is nan")
    assert comparison.interval == Interval(-math.inf, math.inf)


def test_an_arm_that_fails_on_one_seed_is_compared_on_the_others():
    comparison = failing({0: math.inf, 1: 2.46, 2: 2.482, 3: 2.501}, dict(enumerate(BASE)))
    assert comparison.verdict == (
        "failed",
        "failed on 1 of 4 seeds: its value is inf; "
        "on the other 3: worse by 0.201 ± 0.002 nats (3 seeds)",
    )


def test_a_control_that_fails_leaves_its_arms_undecided():
    comparison = failing({0: 2.0, 1: 2.0}, {0: math.nan, 1: math.nan})
    assert comparison.verdict.kind == "undecided"
    assert "control control failed on 2 of 2 seeds" in comparison.verdict.text


def test_only_seeds_of_both_arms_are_paired():
    comparison = failing({0: 2.32, 2: 2.29, 3: 2.31, 7: 9.0}, dict(enumerate(BASE)))
    assert list(comparison.differences) == [0, 2, 3]


def test_many_arms_make_each_verdict_harder():
    differences = (0.010, 0.013, 0.008)
    alone = compared(*differences)
    values = {"control": dict(enumerate(BASE))} | {
        name: {s: BASE[s] + d for s, d in enumerate(differences)} for name in "abcd"
    }
    together = compare_arms(values, dict.fromkeys("abcd", "control"), Criteria(0.005))
    assert alone.verdict.kind == "worse"
    assert {c.verdict.kind for c in together.values()} == {"undecided"}
    assert together["a"].p == pytest.approx(4 * alone.p)
    assert together["a"].interval.low < 0 < alone.interval.low
    assert together["a"].smallest_detectable > alone.smallest_detectable


@pytest.mark.parametrize(
    ("value", "half_width", "text"),
    [
        (0.16512, 0.00412, "0.165 ± 0.004"),
        (0.16512, 0.00142, "0.1651 ± 0.0014"),
        (0.0098, 0.0097, "0.0098 ± 0.0097"),
        (1.06, 0.2, "1.1 ± 0.2"),
        (160.0, 23.0, "160 ± 20"),
        (0.25, 0.0, "0.25 ± 0"),
    ],
)
def test_rounding_keeps_what_the_interval_leaves_certain(value, half_width, text):
    assert plus_minus(value, half_width) == text


def test_a_margin_of_zero_is_refused():
    with pytest.raises(ValueError, match=r"margin is 0\.0; it must be positive"):
        Criteria(0.0)


def share(kinds: list[str], *wanted: str) -> float:
    return sum(kind in wanted for kind in kinds) / len(kinds)


@pytest.mark.parametrize("sd", [0.0025, 0.02])
def test_identical_arms_are_called_different_in_at_most_5_percent_of_200_ablations(sd):
    generator = np.random.default_rng(0)
    kinds = [compared(*generator.normal(0.0, sd, 5)).verdict.kind for _ in range(200)]
    assert share(kinds, "worse", "better") <= stats.binom.ppf(0.999, 200, 0.05) / 200


@pytest.mark.parametrize(("sd", "seeds"), [(0.0025, 4), (0.004, 5), (0.005, 5)])
def test_a_gap_of_a_hundredth_nat_is_found(sd, seeds):
    generator = np.random.default_rng(1)
    kinds = [compared(*generator.normal(0.01, sd, seeds)).verdict.kind for _ in range(200)]
    assert share(kinds, "worse") >= 0.8


def sequential(true_difference: float, generator: np.random.Generator, budget: int = 16) -> str:
    """The verdict of an ablation that adds seeds until it is settled or the budget is spent."""
    draws = generator.normal(true_difference, 0.004, budget)
    comparison, seeds = None, 0
    while True:
        values = {
            "control": dict.fromkeys(range(seeds), 0.0),
            "arm": dict(enumerate(draws[:seeds])),
        }
        criteria = Criteria(0.005, monitoring="anytime")
        comparison = compare_arms(values, {"arm": "control"}, criteria)
        adding = seeds_to_add(comparison, budget)
        if not adding:
            return comparison["arm"].verdict.kind
        seeds += adding["arm"]


@pytest.mark.parametrize(
    ("true_difference", "wrong"),
    [(0.0, ("worse", "better")), (0.005, ("equivalent", "better"))],
)
def test_adding_seeds_until_it_is_settled_is_wrong_in_at_most_5_percent(true_difference, wrong):
    generator = np.random.default_rng(2)
    kinds = [sequential(true_difference, generator) for _ in range(300)]
    assert share(kinds, *wrong) <= stats.binom.ppf(0.999, 300, 0.05) / 300


def test_adding_seeds_finds_a_planted_gap_and_equality_within_the_budget():
    generator = np.random.default_rng(3)
    assert share([sequential(0.010, generator) for _ in range(100)], "worse") >= 0.9
    assert share([sequential(0.0, generator) for _ in range(100)], "equivalent") >= 0.6


def test_seeds_are_added_carefully_and_within_the_budget():
    undecided = compared(0.0040, -0.0020, 0.0030, monitoring="anytime")
    assert undecided.seeds_needed > 6
    assert seeds_to_add({"arm": undecided}, budget=20) == {"arm": 3}
    assert seeds_to_add({"arm": undecided}, budget=5) == {"arm": 2}
    assert seeds_to_add({"arm": undecided}, budget=3) == {}
    assert seeds_to_add({"arm": compared(monitoring="anytime")}, budget=20) == {"arm": 3}
    settled = compared(0.164, 0.166, 0.165, 0.165, 0.166, monitoring="anytime")
    assert seeds_to_add({"arm": settled}, budget=20) == {}
