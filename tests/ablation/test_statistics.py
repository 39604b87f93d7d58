"""Intervals, tests and power against scipy, against known values, and by simulation."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import integrate, stats

from lmjax.ablation.statistics import (
    MIXTURE_VARIANCE,
    Estimate,
    Interval,
    bootstrap_interval,
    critical_value,
    e_value,
    gap_test,
    holm,
    power_of_difference,
    power_of_equivalence,
    seeds_needed,
    smallest_detectable,
)

DIFFERENCES = (0.0021, -0.0004, 0.0013, 0.0009, 0.0030)
BOTH = pytest.mark.parametrize("monitoring", ["fixed", "anytime"])


def at_most(rate: float, draws: int, certainty: float = 0.999) -> float:
    """What the share of hits stays below with that certainty if their probability is `rate`."""
    return stats.binom.ppf(certainty, draws, rate) / draws


def test_interval_and_p_are_those_of_the_paired_t_test():
    scipy = stats.ttest_1samp(DIFFERENCES, 0.0)
    estimate = Estimate.of(DIFFERENCES)
    assert estimate.p_value() == pytest.approx(scipy.pvalue, rel=1e-12)
    assert estimate.interval() == pytest.approx(tuple(scipy.confidence_interval()), rel=1e-12)


def test_equivalence_is_two_one_sided_t_tests():
    low = stats.ttest_1samp(DIFFERENCES, -0.005, alternative="greater").pvalue
    high = stats.ttest_1samp(DIFFERENCES, 0.005, alternative="less").pvalue
    p = Estimate.of(DIFFERENCES).equivalence_p_value(0.005)
    assert p == pytest.approx(max(low, high), rel=1e-12)


@BOTH
def test_p_values_and_intervals_decide_alike(monitoring):
    generator = np.random.default_rng(0)
    decisions = set()
    for n in (2, 3, 5, 12):
        for mean in (0.0, 1.0, 4.0):
            estimate = Estimate.of(generator.normal(mean, 1.0, n))
            different = not estimate.interval(0.05, monitoring).contains(0.0)
            equivalent = estimate.equivalence_interval(0.05, monitoring).inside(3.0)
            assert different == (estimate.p_value(0.0, monitoring) <= 0.05)
            assert equivalent == (estimate.equivalence_p_value(3.0, monitoring) <= 0.05)
            decisions.add((different, equivalent))
    assert len(decisions) == 4


@BOTH
@pytest.mark.parametrize("differences", [(), (0.7,), (0.0,)])
def test_below_two_differences_nothing_is_said(differences, monitoring):
    estimate = Estimate.of(differences)
    assert estimate.interval(0.05, monitoring) == (-math.inf, math.inf)
    assert estimate.p_value(0.0, monitoring) == 1.0
    assert estimate.equivalence_p_value(0.005, monitoring) == 1.0
    assert smallest_detectable(estimate.sd, estimate.n, monitoring=monitoring) == math.inf
    assert bootstrap_interval(differences) == (-math.inf, math.inf)


@BOTH
def test_identical_runs_are_equal_beyond_doubt(monitoring):
    estimate = Estimate.of((0.0, 0.0))
    assert estimate.interval(0.05, monitoring) == (0.0, 0.0)
    assert estimate.p_value(0.0, monitoring) == 1.0
    assert estimate.equivalence_p_value(1e-9, monitoring) == 0.0
    assert bootstrap_interval((0.0, 0.0, 0.0)) == (0.0, 0.0)


def test_a_difference_that_is_not_finite_is_refused():
    with pytest.raises(ValueError, match="must be finite"):
        Estimate.of((0.1, math.nan))


@pytest.mark.parametrize("n", [2, 3, 5, 30])
def test_e_value_is_the_likelihood_ratio_of_a_mixture_of_effect_sizes(n):
    def mixed_density(t: float) -> float:
        density = lambda effect: (
            stats.nct.pdf(t, n - 1, effect * math.sqrt(n))
            * stats.norm.pdf(effect, scale=math.sqrt(MIXTURE_VARIANCE))
        )
        return integrate.quad(density, -20, 20, points=[0.0], limit=400, epsabs=1e-12)[0]

    for t in (0.0, 0.8, 2.5):
        expected = mixed_density(t) / stats.t.pdf(t, n - 1)
        assert e_value(t, n) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("n", [2, 3, 5, 30])
def test_e_value_is_expected_to_be_1_where_there_is_no_difference(n):
    weighed = lambda t: e_value(t, n) * stats.t.pdf(t, n - 1)
    assert integrate.quad(weighed, -np.inf, np.inf)[0] == pytest.approx(1.0, rel=1e-7)


@pytest.mark.parametrize("n", [4, 5, 10, 50])
def test_anytime_critical_value_is_where_the_evidence_suffices(n):
    assert e_value(critical_value(n, 0.05, "anytime"), n) == pytest.approx(20.0, rel=1e-9)
    assert critical_value(n, 0.05, "anytime") > critical_value(n, 0.05, "fixed")


@pytest.mark.parametrize("n", [3, 5])
def test_t_interval_covers_as_often_as_it_says(n):
    draws = np.random.default_rng(1).normal(0.3, 1.0, (2000, n))
    missed = np.mean([not Estimate.of(d).interval().contains(0.3) for d in draws])
    assert at_most(0.05, 2000, 0.001) <= missed <= at_most(0.05, 2000)


def ever_misses(draws: np.ndarray, monitoring: str, truth: float) -> float:
    """Share of rows whose interval leaves the truth out after any of 2, 3, ... draws."""
    counts = np.arange(2, draws.shape[1] + 1)
    critical = np.asarray([critical_value(int(n), 0.05, monitoring) for n in counts])
    means = np.stack([draws[:, :n].mean(axis=1) for n in counts], axis=1)
    sds = np.stack([draws[:, :n].std(axis=1, ddof=1) for n in counts], axis=1)
    return float(np.any(abs(means - truth) > critical * sds / np.sqrt(counts), axis=1).mean())


def test_anytime_interval_holds_at_all_numbers_of_seeds_at_once_and_t_does_not():
    draws = np.random.default_rng(2).normal(0.3, 1.0, (4000, 40))
    assert ever_misses(draws, "anytime", 0.3) <= at_most(0.05, 4000)
    assert ever_misses(draws, "fixed", 0.3) > 0.15


def test_bootstrap_interval_covers_what_its_docstring_says():
    draws = np.random.default_rng(3).normal(0.0, 1.0, (400, 5))
    covers = np.mean([bootstrap_interval(d, resamples=499).contains(0.0) for d in draws])
    assert at_most(0.84, 400, 0.001) <= covers <= at_most(0.84, 400)


@pytest.mark.parametrize(("n", "effect"), [(3, 0.0), (3, 1.5), (5, 1.0), (30, 0.5)])
def test_power_of_a_difference_is_that_of_the_noncentral_t(n, effect):
    critical, shift = critical_value(n), effect * math.sqrt(n)
    expected = stats.nct.sf(critical, n - 1, shift) + stats.nct.cdf(-critical, n - 1, shift)
    assert power_of_difference(effect, 1.0, n) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize(
    ("monitoring", "margin", "n", "effect"),
    [
        ("fixed", 1.5, 4, 0.0),
        ("fixed", 1.5, 8, 0.5),
        ("anytime", 4.0, 4, 0.0),
        ("anytime", 4, 8, 2),
    ],
)
def test_power_of_equivalence_is_how_often_it_is_claimed(monitoring, margin, n, effect):
    draws = np.random.default_rng(4).normal(effect, 1.0, (20_000, n))
    critical = critical_value(n, 0.1 if monitoring == "fixed" else 0.05, monitoring)
    reach = critical * draws.std(axis=1, ddof=1) / math.sqrt(n)
    claimed = np.mean(abs(draws.mean(axis=1)) + reach < margin)
    power = power_of_equivalence(effect, 1.0, n, margin, monitoring=monitoring)
    assert power == pytest.approx(claimed, abs=0.015)
    assert 0.2 < power < 0.98


def test_smallest_detectable_difference_is_found_four_times_in_five():
    for n in (2, 3, 5, 20):
        size = smallest_detectable(0.004, n)
        assert power_of_difference(size, 0.004, n) == pytest.approx(0.8, abs=1e-9)
    # dz of a paired t test of 5 pairs at 80% power, as power tables have it.
    assert smallest_detectable(1.0, 5) == pytest.approx(1.68, abs=0.005)


def test_seeds_needed_for_a_difference_are_those_of_power_tables():
    assert seeds_needed(0.5, 1.0, margin=1e-6) == 34
    assert seeds_needed(0.8, 1.0, margin=1e-6) == 15
    assert seeds_needed(-0.8, 1.0, margin=1e-6) == 15


@BOTH
def test_seeds_needed_take_the_nearer_of_the_two_ends(monitoring):
    n = seeds_needed(0.001, 0.004, margin=0.005, monitoring=monitoring)
    power = lambda count: power_of_equivalence(0.001, 0.004, count, 0.005, monitoring=monitoring)
    assert power(n) >= 0.8 > power(n - 1)
    assert n < seeds_needed(0.001, 0.004, margin=1e-6, monitoring=monitoring)


def test_seeds_needed_are_guessed_without_a_spread_and_refused_without_a_margin():
    assert seeds_needed(math.nan, math.nan, margin=0.005) == 3
    with pytest.raises(ValueError, match="margin is 0"):
        seeds_needed(0.0, 1.0, margin=0.0)


def test_holm_on_a_known_family():
    corrected = holm([0.01, 0.04, 0.03, 0.005])
    assert [c.p for c in corrected] == pytest.approx([0.03, 0.06, 0.06, 0.02])


def test_intervals_never_contradict_what_holm_rejects():
    generator = np.random.default_rng(5)
    late = 0
    for _ in range(300):
        estimates = [Estimate.of(generator.normal(mean, 1.0, 5)) for mean in (0, 1, 2, 2, 3)]
        corrected = holm([e.p_value() for e in estimates])
        for estimate, (p, alpha) in zip(estimates, corrected, strict=True):
            assert (p <= 0.05) == (not estimate.interval(alpha).contains(0.0))
            late += alpha > 0.05 / 5
    assert late > 20


@pytest.mark.parametrize("true_means", [(0, 0, 0, 0), (0, 9, 9, 9), (2, 2, 2, 2), (0, 2.5, 4)])
def test_family_of_arms_is_wrong_as_rarely_as_one(true_means):
    generator = np.random.default_rng(6)
    false_rejection = missed = 0
    for _ in range(800):
        estimates = [Estimate.of(generator.normal(mean, 1.0, 5)) for mean in true_means]
        corrected = holm([e.p_value() for e in estimates])
        both = list(zip(estimates, corrected, true_means, strict=True))
        false_rejection += any(c.p <= 0.05 and mean == 0 for _, c, mean in both)
        missed += any(not e.interval(c.alpha).contains(mean) for e, c, mean in both)
    assert false_rejection / 800 <= at_most(0.05, 800)
    assert missed / 800 <= at_most(0.082, 800)


def test_gap_claim_needs_the_bound_and_every_sign():
    clear = gap_test((0.164, 0.166, 0.165), minimum=0.1)
    t = stats.ttest_1samp((0.164, 0.166, 0.165), 0.1, alternative="greater")
    assert clear.bound == pytest.approx(t.confidence_interval(0.95).low, rel=1e-12)
    assert clear.passes
    assert not gap_test((0.164, 0.166, 0.165), minimum=0.17).passes
    assert not gap_test((1.0, 1.1, 1.0, 0.9, 1.0, 1.0, -0.01), minimum=0.1).same_sign
    assert not gap_test((1.0, 1.1, 1.0, 0.9, 1.0, 1.0, -0.01), minimum=0.1).passes
    assert gap_test((1.0, 1.1, 1.0, 0.9, 1.0, 1.0, -0.01), minimum=0.1).bound > 0.1


@pytest.mark.parametrize("differences", [(), (5.0,)])
def test_no_gap_is_claimed_from_one_seed(differences):
    assert not gap_test(differences, minimum=0.0).passes


def test_interval_inside_a_margin_is_strictly_inside():
    assert Interval(-0.004, 0.004).inside(0.005)
    assert not Interval(-0.005, 0.004).inside(0.005)
    assert not Interval(0.004, 0.005).inside(0.005)
