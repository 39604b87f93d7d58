"""Compares each arm of an ablation with its control and states a verdict.

    worse by 0.165 ± 0.004 nats (5 seeds)            the interval leaves zero out
    better by 0.049 ± 0.012 nats (5 seeds)
    equivalent within 0.005; smallest detectable     the interval lies inside the margin
      effect 0.0014 (5 seeds)
    undecided: needs about 7 seeds                   neither
    failed on 3 of 3 seeds: loss is nan              runs ended without a finite value

A difference is shown with the same interval everywhere: the one that its verdict rests on (see
`Comparison.decisive`), widened for the number of arms. A difference that is certain but smaller
than the margin is called equivalent: the margin defines what matters. One seed decides nothing, two
are marked as provisional, and a failed run is a result: it is counted, and the surviving seeds are
compared.

Knows `statistics.py` and `words.py`; nothing about runs.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from lmjax.ablation.statistics import (
    ALPHA,
    Corrected,
    Estimate,
    Interval,
    Monitoring,
    bootstrap_interval,
    holm,
    seeds_needed,
    smallest_detectable,
)
from lmjax.ablation.words import FEWEST_SEEDS, plus_minus, seeds_in_words, signed, size
from lmjax.console.wording import counted

VerdictKind = Literal["worse", "better", "equivalent", "undecided", "failed"]
Values = Mapping[str, Mapping[int, float]]
Reasons = Mapping[str, Mapping[int, str]]


@dataclass(frozen=True)
class Criteria:
    """How comparisons are judged.

    Attributes:
      margin: the largest difference that does not matter, in the unit of the metric.
      alpha: probability of a wrong verdict.
      monitoring: `anytime` if seeds are added until the question is settled.
      unit: unit of the metric, for display.
      alone: judge each comparison separately and one-sided, like the findings of a claim; see
        `evidence.py`. No correction is needed, because a claim needs all its findings.
    """

    margin: float
    alpha: float = ALPHA
    monitoring: Monitoring = "fixed"
    unit: str = "nats"
    alone: bool = False

    def __post_init__(self) -> None:
        """Refuses a margin that is not positive."""
        if not self.margin > 0:
            raise ValueError(f"margin is {self.margin}; it must be positive")


class Verdict(NamedTuple):
    """The finding about one arm: a keyword for programs and a sentence to print."""

    kind: VerdictKind
    text: str


@dataclass(frozen=True)
class Comparison:
    """One arm against its control, paired by seed.

    Attributes:
      arm: name of the arm.
      control: name of the arm that it is compared with.
      differences: arm minus control, by seed, where both are finite.
      failures: why runs of the arm have no finite value, by seed.
      control_failures: the same of the control.
      ended: runs of the arm that finished or failed.
      control_ended: the same of the control.
      estimate: mean and sd of the differences.
      criteria: how they are judged.
      interval: of the mean, at 95% after correction for the number of arms.
      equivalence_interval: the one that has to lie inside the margin, after correction.
      p: of the hypothesis that there is no difference, corrected (Holm).
      equivalence_p: of the hypothesis that the difference is `margin` or more, corrected (Holm).
      strictest: level of the most demanding test of the family, the first step of Holm's method.
    """

    arm: str
    control: str
    differences: Mapping[int, float]
    failures: Mapping[int, str]
    control_failures: Mapping[int, str]
    ended: int
    control_ended: int
    estimate: Estimate
    criteria: Criteria
    interval: Interval
    equivalence_interval: Interval
    p: float
    equivalence_p: float
    strictest: float

    @property
    def tests_equivalence(self) -> bool:
        """Whether `decisive` is the interval of the two one-sided tests."""
        return self.criteria.alone or self.equivalence_p <= self.criteria.alpha

    @property
    def decisive(self) -> Interval:
        """The interval that the verdict rests on, and the only one shown.

        A claim of equivalence rests on two one-sided tests, each at alpha, and so on the interval
        at 1 - 2 alpha (`equivalence_interval`); everything else rests on the one at 1 - alpha.
        """
        return self.equivalence_interval if self.tests_equivalence else self.interval

    @property
    def level(self) -> float:
        """The confidence level of `decisive` before correction."""
        twice = self.tests_equivalence and self.criteria.monitoring == "fixed"
        return 1 - self.criteria.alpha * (2 if twice else 1)

    @property
    def bootstrap(self) -> Interval:
        """BCa interval of the mean at 95%, uncorrected, for comparison with `interval`."""
        return bootstrap_interval(tuple(self.differences.values()), self.criteria.alpha)

    @property
    def smallest_detectable(self) -> float:
        """The smallest difference that so many seeds with this sd find 80% of the time."""
        return smallest_detectable(
            self.estimate.sd,
            self.estimate.n,
            self.strictest,
            monitoring=self.criteria.monitoring,
        )

    @property
    def seeds_needed(self) -> int:
        """Total seeds, more than there are now, that settle the question 80% of the time."""
        needed = seeds_needed(
            self.estimate.mean,
            self.estimate.sd,
            self.criteria.margin,
            self.strictest,
            monitoring=self.criteria.monitoring,
        )
        return max(needed, self.estimate.n + 1)

    @property
    def verdict(self) -> Verdict:
        """The verdict in words."""
        rest = _of_differences(self)
        if self.failures:
            text = _failed_on(self.failures, self.ended)
            if rest.kind != "undecided":
                text += f"; on the other {self.estimate.n}: {rest.text}"
            return Verdict("failed", text)
        if self.control_failures and not self.estimate.n:
            text = _failed_on(self.control_failures, self.control_ended)
            return Verdict("undecided", f"undecided: the control {self.control} {text}")
        return rest


def compare_arms(
    values: Values,
    controls: Mapping[str, str],
    criteria: Criteria,
    reasons: Reasons | None = None,
) -> dict[str, Comparison]:
    """Compares every arm with its control; the verdicts hold jointly.

    The probability of calling any arm different when it is not is at most `alpha`, and so is that
    of any false equivalence: both families of tests are corrected by Holm's method.

    Args:
      values: the metric, by arm and seed; lower is better. NaN and infinities are failed runs, and
        seeds that have not run yet are left out.
      controls: by arm, the arm that it is compared with. These arms are the family.
      criteria: margin, error rate and monitoring.
      reasons: why runs failed, by arm and seed, if the value alone does not tell.

    Returns:
      Comparisons by arm, in the order of `controls`.
    """
    alpha, look = criteria.alpha, criteria.monitoring
    differences = [_differences(values, arm, control) for arm, control in controls.items()]
    estimates = [Estimate.of(tuple(found.values())) for found in differences]
    unequal_p = [e.p_value(0.0, look) for e in estimates]
    equal_p = [e.equivalence_p_value(criteria.margin, look) for e in estimates]
    correct = _uncorrected if criteria.alone else holm
    unequal, equal = correct(unequal_p, alpha), correct(equal_p, alpha)
    found = {}
    for number, (arm, control) in enumerate(controls.items()):
        estimate = estimates[number]
        found[arm] = Comparison(
            arm=arm,
            control=control,
            differences=differences[number],
            failures=_failures(values, reasons, arm),
            control_failures=_failures(values, reasons, control),
            ended=len(values.get(arm, {})),
            control_ended=len(values.get(control, {})),
            estimate=estimate,
            criteria=criteria,
            interval=estimate.interval(unequal[number].alpha, look),
            equivalence_interval=estimate.equivalence_interval(equal[number].alpha, look),
            p=unequal[number].p,
            equivalence_p=equal[number].p,
            strictest=2 * alpha if criteria.alone else alpha / len(controls),
        )
    return found


def _uncorrected(p_values: Sequence[float], alpha: float) -> list[Corrected]:
    return [Corrected(p, alpha) for p in p_values]


def _differences(values: Values, arm: str, control: str) -> dict[int, float]:
    """Arm minus control for the seeds where both are finite."""
    mine, theirs = values.get(arm, {}), values.get(control, {})
    return {
        seed: mine[seed] - theirs[seed]
        for seed in sorted(mine.keys() & theirs.keys())
        if math.isfinite(mine[seed]) and math.isfinite(theirs[seed])
    }


def _failures(values: Values, reasons: Reasons | None, arm: str) -> dict[int, str]:
    said = (reasons or {}).get(arm, {})
    return {
        seed: said.get(seed) or f"its value is {value}"
        for seed, value in sorted(values.get(arm, {}).items())
        if not math.isfinite(value)
    }


def _of_differences(comparison: Comparison) -> Verdict:
    """The verdict on the differences, ignoring failed runs."""
    criteria, estimate = comparison.criteria, comparison.estimate
    if comparison.equivalence_p <= criteria.alpha:
        power = f"smallest detectable effect {size(comparison.smallest_detectable)}"
        if estimate.sd == 0:
            power = "the same difference in every seed" if estimate.mean else "equal in every seed"
        seeds = seeds_in_words(estimate.n)
        return Verdict("equivalent", f"equivalent within {criteria.margin:g}; {power} ({seeds})")
    if comparison.p <= criteria.alpha:
        kind: VerdictKind = "worse" if estimate.mean > 0 else "better"
        by = plus_minus(abs(estimate.mean), comparison.decisive.half_width)
        seeds = seeds_in_words(estimate.n)
        return Verdict(kind, f"{kind} by {by} {criteria.unit} ({seeds})")
    return Verdict("undecided", f"undecided: needs about {_about(comparison.seeds_needed)} seeds")


def _failed_on(failures: Mapping[int, str], ended: int) -> str:
    """How often an arm failed, and the most frequent reason."""
    reason = Counter(failures.values()).most_common(1)[0][0]
    return f"failed on {len(failures)} of {counted(ended, 'seed')}: {reason}"


def difference(comparison: Comparison) -> str:
    """Mean difference with its sign ± half of the interval that the verdict rests on."""
    if not comparison.estimate.n:
        return ""
    return signed(comparison.estimate.mean, comparison.decisive.half_width)


def _about(seeds: int) -> str:
    """Exact below 100, then two digits: the estimate has no more precision than that."""
    digits = max(0, len(str(seeds)) - 2)
    return f"{round(seeds, -digits):,}"


def seeds_to_add(comparisons: Mapping[str, Comparison], budget: int) -> dict[str, int]:
    """Returns how many seeds to run next for each undecided arm of an `anytime` ablation.

    This is the number that the present estimate requires, but at most as many as there are already,
    because the sd of a few seeds is itself uncertain, and never beyond the budget.

    Args:
      comparisons: of all seeds so far, with `monitoring="anytime"`, which alone permits repeated
        looks.
      budget: maximum number of seeds per arm.

    Returns:
      Seeds to add, by arm, without arms that are settled or out of budget. Empty if the ablation is
      complete.
    """
    adding = {}
    for arm, comparison in comparisons.items():
        left = budget - comparison.ended
        if comparison.verdict.kind == "undecided" and left > 0:
            have = comparison.estimate.n
            wanted = min(comparison.seeds_needed - have, max(have, FEWEST_SEEDS - have))
            adding[arm] = min(left, wanted)
    return adding
