"""Intervals, tests and power for paired differences between an arm and its control.

A seed fixes initial parameters and data order in both arms, so that the unit of analysis is one
number per seed: the arm's value minus the control's. What seeds have in common cancels in it, which
is why three to five of them are enough: runs that differ by 0.02 nats from seed to seed differ by
0.001 between arms of one seed.

Everything here takes those differences as normally distributed, the assumption of the paired t
test. Two ways of looking at them are offered, by `monitoring`:

fixed     the number of seeds was decided before the first was run: Student's t.
anytime   seeds are added until the question is settled. Repeated t tests would then find a
          difference sooner or later; the anytime-valid t interval covers the true difference at
          every number of seeds at once with the stated probability, so that one may look after each
          seed, stop for any reason, or continue past the planned budget. It is the confidence
          sequence of Wang and Ramdas, "Anytime-valid t-tests and confidence sequences for Gaussian
          means with unknown variance" (arXiv 2310.03722), from a Gaussian mixture over effect
          sizes.

scipy has the distributions. What is by hand here it does not have, and each docstring says so;
statsmodels has Holm's correction and TOST, but brings pandas and patsy for the five lines of the
one, and works the other out from raw samples, at a fixed number of seeds only.

Knows NumPy, scipy and `words.py`; nothing about runs.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
from scipy import optimize, special, stats

from lmjax.ablation.words import FEWEST_SEEDS

Monitoring = Literal["fixed", "anytime"]

ALPHA = 0.05
"""Default probability of a wrong verdict."""
POWER = 0.8
"""Default probability with which an effect is to be found."""
MIXTURE_VARIANCE = 10.0
"""Prior variance of the effect size (mean over sd of the differences) in the anytime-valid test.
Any value is valid; this one gives the narrowest intervals at 4 to 6 seeds, where effects have to be
several sd large to matter."""


class Interval(NamedTuple):
    """Both ends belong to it; infinite where nothing can be said."""

    low: float
    high: float

    def contains(self, value: float) -> bool:
        """Whether `value` lies in it."""
        return self.low <= value <= self.high

    def inside(self, margin: float) -> bool:
        """Whether it lies strictly between `-margin` and `margin`."""
        return -margin < self.low and self.high < margin

    @property
    def half_width(self) -> float:
        """Half its length: what stands after the ± sign."""
        return (self.high - self.low) / 2


@dataclass(frozen=True)
class Estimate:
    """An estimate of the true mean of n differences.

    Attributes:
      n: number of differences.
      mean: NaN where there are none.
      sd: standard deviation with n - 1 degrees of freedom; NaN below two differences.
    """

    n: int
    mean: float
    sd: float

    @classmethod
    def of(cls, differences: Sequence[float]) -> Estimate:
        """The estimate from finite differences, one a seed.

        Raises:
          ValueError: one of them is not finite.
        """
        values = np.asarray(differences, np.float64)
        if not np.isfinite(values).all():
            raise ValueError(f"differences are {values.tolist()}; they must be finite")
        mean = float(values.mean()) if values.size else math.nan
        sd = float(values.std(ddof=1)) if values.size > 1 else math.nan
        return cls(values.size, mean, sd)

    @property
    def standard_error(self) -> float:
        """Standard deviation of the mean."""
        return self.sd / math.sqrt(self.n) if self.n else math.nan

    def interval(self, alpha: float = ALPHA, monitoring: Monitoring = "fixed") -> Interval:
        """The t interval that misses the true mean with probability `alpha` at most.

        One difference says nothing: the interval is infinite. Differences that are all the same,
        as runs equal bit for bit give, leave nothing uncertain: its length is zero.
        """
        if self.n < 2:
            return Interval(-math.inf, math.inf)
        if self.sd == 0:
            return Interval(self.mean, self.mean)
        half = critical_value(self.n, alpha, monitoring) * self.standard_error
        return Interval(self.mean - half, self.mean + half)

    def equivalence_interval(
        self, alpha: float = ALPHA, monitoring: Monitoring = "fixed"
    ) -> Interval:
        """The interval that has to lie inside the margin for equivalence to be claimed.

        With a fixed number of seeds its level is 1 - 2 alpha, which makes the claim the two
        one-sided tests of Schuirmann (1987), each at `alpha`. The anytime-valid interval keeps
        1 - alpha: then one event, that the interval ever misses, bounds every wrong claim.
        """
        return self.interval(_interval_alpha(alpha, monitoring), monitoring)

    def p_value(self, null: float = 0.0, monitoring: Monitoring = "fixed") -> float:
        """Two-sided p of the hypothesis that the true mean is `null`; 1 below two differences.

        It is at most `alpha` exactly when `interval(alpha)` leaves `null` out.
        """
        if self.n < 2:
            return 1.0
        if self.sd == 0:
            return float(self.mean == null)
        t = abs(self.mean - null) / self.standard_error
        if monitoring == "anytime":
            return min(1.0, 1.0 / e_value(t, self.n))
        return float(2 * stats.t.sf(t, self.n - 1))

    def equivalence_p_value(self, margin: float, monitoring: Monitoring = "fixed") -> float:
        """The p of the hypothesis that the true mean is `margin` or more away from zero.

        The larger p of the two one-sided tests (TOST); it is at most `alpha` exactly when
        `equivalence_interval(alpha)` lies inside the margin.
        """
        if self.n < 2 or abs(self.mean) >= margin:
            return 1.0
        nearer = math.copysign(margin, self.mean)
        return self.p_value(nearer, monitoring) / _interval_alpha(1.0, monitoring)


def _interval_alpha(alpha: float, monitoring: Monitoring) -> float:
    """By how much the interval for equivalence may miss, both sides together."""
    return 2 * alpha if monitoring == "fixed" else alpha


def critical_value(n: int, alpha: float = ALPHA, monitoring: Monitoring = "fixed") -> float:
    """How many standard errors the interval reaches to either side of the mean of n differences.

    Infinite where so few differences cannot settle anything at that level.
    """
    if n < 2:
        return math.inf
    if monitoring == "fixed":
        return float(stats.t.isf(alpha / 2, n - 1))
    # The t at which e_value reaches 1 / alpha: e_value solved for t.
    growth = 1 + n * MIXTURE_VARIANCE
    ratio = (growth / alpha**2) ** (1 / n)
    return math.sqrt((n - 1) * (ratio - 1) / (1 - ratio / growth)) if ratio < growth else math.inf


def e_value(t: float, n: int) -> float:
    """Evidence against a mean of zero from the t statistic of n differences.

    Under that hypothesis its expectation is 1 at every n and, as a martingale in n, it ever reaches
    1 / alpha with probability alpha at most (Ville's inequality). It is the likelihood ratio of t
    with the effect size drawn from a normal distribution of variance `MIXTURE_VARIANCE` against
    none (arXiv 2310.03722, the Gaussian mixture; equally the Bayes factor of Gönen et al. 2005).
    """
    growth = 1 + n * MIXTURE_VARIANCE
    square = t * t / (n - 1)
    return growth**-0.5 * ((1 + square) / (1 + square / growth)) ** (n / 2)


def bootstrap_interval(
    differences: Sequence[float], alpha: float = ALPHA, *, resamples: int = 9999
) -> Interval:
    """The bias-corrected and accelerated (BCa) bootstrap interval of the mean (Efron 1987).

    It does not assume normal differences and so shows where the t interval leans on that; it is
    printed beside the t interval and decides nothing. With few differences it is too short, for it
    cannot leave their range: of nominal 95% intervals of normal differences 73% cover the mean at 3
    seeds, 84% at 5 and 90% at 10. The resamples are drawn with a fixed seed.
    """
    values = np.asarray(differences, np.float64)
    if values.size < 2:
        return Interval(-math.inf, math.inf)
    if np.ptp(values) == 0:
        return Interval(float(values[0]), float(values[0]))
    result = stats.bootstrap(
        (values,),
        np.mean,
        confidence_level=1 - alpha,
        n_resamples=resamples,
        method="BCa",
        rng=np.random.default_rng(0),
    )
    return Interval(float(result.confidence_interval.low), float(result.confidence_interval.high))


def power_of_difference(
    effect: float, sd: float, n: int, alpha: float = ALPHA, monitoring: Monitoring = "fixed"
) -> float:
    """Probability that n differences of mean `effect` and this sd are called different from zero.

    That t of a noncentral t distribution with n - 1 degrees of freedom exceeds the critical value;
    under `anytime`, at the look at n alone, so that earlier looks only add to it. `scipy.stats.nct`
    is not used: for shifts that the searches below pass through its lower tail is NaN, such as
    `nct.cdf(-3, 2, 10)` in scipy 1.17.
    """
    critical = critical_value(n, alpha, monitoring)
    if math.isinf(critical):
        return 0.0
    if sd == 0:
        return float(effect != 0)
    reach = critical * _observed_sd(n)
    shift = abs(effect) * math.sqrt(n) / sd
    return _over_observed_sd(special.ndtr(shift - reach) + special.ndtr(-shift - reach))


def power_of_equivalence(
    effect: float,
    sd: float,
    n: int,
    margin: float,
    alpha: float = ALPHA,
    monitoring: Monitoring = "fixed",
) -> float:
    """Probability that n differences of this mean and sd are called equivalent within `margin`.

    A bivariate noncentral t probability, which neither scipy nor statsmodels has.
    """
    critical = critical_value(n, _interval_alpha(alpha, monitoring), monitoring)
    if math.isinf(critical):
        return 0.0
    if sd == 0:
        return float(abs(effect) < margin)
    reach = critical * _observed_sd(n)
    unit = math.sqrt(n) / sd
    above, below = (margin - effect) * unit - reach, (margin + effect) * unit - reach
    return _over_observed_sd(np.maximum(0.0, special.ndtr(above) - special.ndtr(-below)))


# Given the sd that is observed, mean and t are normal; power is the average over that sd.
_NODES, _WEIGHTS = np.polynomial.legendre.leggauss(200)


@functools.cache
def _observed_sd(n: int) -> np.ndarray:
    """Quantiles, at the nodes, of the sd that n standard normal differences show: `f64[200]`."""
    return np.sqrt(stats.chi2.ppf((_NODES + 1) / 2, n - 1) / (n - 1))


def _over_observed_sd(values: np.ndarray) -> float:
    """The average of a function of the observed sd, given at the nodes."""
    return float(values @ _WEIGHTS / 2)


def smallest_detectable(
    sd: float,
    n: int,
    alpha: float = ALPHA,
    power: float = POWER,
    monitoring: Monitoring = "fixed",
) -> float:
    """The smallest true difference that n seeds with this sd find with probability `power`.

    Infinite where n seeds can find nothing.
    """
    critical = critical_value(n, alpha, monitoring)
    if math.isinf(critical) or math.isnan(sd):
        return math.inf
    if sd == 0:
        return 0.0
    missing = lambda size: power_of_difference(size, 1.0, n, alpha, monitoring) - power
    # Twice the critical value plus a few is found almost surely at any number of seeds.
    largest = (2 * critical + 5) / math.sqrt(n)
    return sd * float(optimize.brentq(missing, 0.0, largest))


def seeds_needed(
    mean: float,
    sd: float,
    margin: float,
    alpha: float = ALPHA,
    power: float = POWER,
    monitoring: Monitoring = "fixed",
) -> int:
    """Seeds after which the question is settled with probability `power`, one way or the other.

    The observed mean and sd are taken for the true ones, which makes it a plan and no promise. The
    nearer of the two ends counts: a difference found, or equivalence within `margin`. With no sd
    (NaN) it is `FEWEST_SEEDS`.

    Raises:
      ValueError: the margin is not positive, so that equal arms would never be settled.
    """
    if not margin > 0:
        raise ValueError(f"margin is {margin}; it must be positive")
    if math.isnan(sd):
        return FEWEST_SEEDS

    def settled(n: int) -> bool:
        return (
            power_of_difference(mean, sd, n, alpha, monitoring) >= power
            or power_of_equivalence(mean, sd, n, margin, alpha, monitoring) >= power
        )

    enough = 2
    while not settled(enough):
        enough *= 2
    short = enough // 2
    while enough - short > 1:
        middle = (short + enough) // 2
        short, enough = (short, middle) if settled(middle) else (middle, enough)
    return enough


class Corrected(NamedTuple):
    """One p value of a family after correction.

    Attributes:
      p: adjusted so that rejecting where it is at most alpha keeps the probability of any false
        rejection in the family at alpha.
      alpha: what the interval may miss by so that it agrees with the rejection.
    """

    p: float
    alpha: float


def holm(p_values: Sequence[float], alpha: float = ALPHA) -> list[Corrected]:
    """Holm's step-down correction (1979) of a family of tests, and intervals that agree with it.

    scipy has no family-wise correction, and statsmodels none with intervals.

    The intervals are Bonferroni's, each at alpha / k, which hold for all arms at once. Holm rejects
    more than they do: an arm rejected although Bonferroni's interval reaches the null gets the
    interval at the level at which Holm rejected it, so that no interval contradicts a verdict. The
    price is paid by the intervals and not by the verdicts: where that happens, any of them misses
    with a probability somewhat above alpha; 8% instead of 5% is the most that simulations showed
    (5 seeds, arms at 0, 2.5 and 4 sd).
    """
    family = len(p_values)
    corrected = [Corrected(1.0, alpha)] * family
    adjusted = 0.0
    for rank, index in enumerate(sorted(range(family), key=lambda i: p_values[i])):
        p, left = p_values[index], family - rank
        adjusted = min(1.0, max(adjusted, left * p))
        late = adjusted <= alpha < family * p
        corrected[index] = Corrected(adjusted, alpha / (left if late else family))
    return corrected


@dataclass(frozen=True)
class GapTest:
    """Whether differences exceed a stated gap.

    Attributes:
      mean: mean difference.
      bound: lower end of the one-sided t interval of the mean; minus infinity below two seeds.
      minimum: the gap that had to be exceeded.
      same_sign: every single difference is positive.
    """

    mean: float
    bound: float
    minimum: float
    same_sign: bool

    @property
    def passes(self) -> bool:
        """The interval excludes the minimum gap, and every seed agrees in sign."""
        return self.same_sign and self.bound > self.minimum


def gap_test(differences: Sequence[float], minimum: float, alpha: float = ALPHA) -> GapTest:
    """Tests the claim that an arm is worse by more than `minimum`, at 1 - alpha, one-sided.

    For a claim that it is better, negate the differences.
    """
    estimate = Estimate.of(differences)
    bound = estimate.interval(2 * alpha).low
    positive = estimate.n > 0 and all(difference > 0 for difference in differences)
    return GapTest(estimate.mean, bound, minimum, positive)
