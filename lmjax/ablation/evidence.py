"""Evaluates statements about the runs of an ablation: findings with an outcome.

Two kinds of statements are statistical, about differences that are paired by seed:

    gap        an arm is worse than its control by at least so much. Confirmed if the one-sided 95%
               t interval of the mean excludes less, and every seed agrees in sign; refuted if the
               interval from the other side excludes as much.
    range      the difference lies between two numbers. Confirmed by two one-sided tests (the 90%
               interval lies inside the range); refuted if that interval lies outside it. `parity`
               is the range from `-margin` to `margin`; a range may have no upper end.

Both are read off one interval, the 90% t interval of the mean: its lower end is the one-sided 95%
bound of a gap, and it is the interval of two one-sided tests at 5%. It is the only one shown. Every
bound is a `Margin`, which says why it was chosen.

One seed decides neither, two are marked as provisional. A failed run counts as worse by any amount
than one that finished; seeds on which the control failed are ignored.

All others are exact: a count, a bound, an arithmetic fact. They are true or false once there are
runs.

Knows the files of runs, `statistics.py` and `words.py`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np

from lmjax.ablation.grid import Ablation, Cell
from lmjax.ablation.statistics import ALPHA, Estimate, Interval, gap_test, smallest_detectable
from lmjax.ablation.words import percent, seeds_in_words, signed, size
from lmjax.console.wording import counted
from lmjax.runs.metrics import read_rows

Ruling = Literal["confirmed", "refuted", "undecided"]


@dataclass(frozen=True)
class Margin:
    """The range in which the differences of a finding must lie, and the reason for it.

    Attributes:
      low: in the unit of the metric.
      high: infinite for a gap.
      why: the reason for the bound, as part of a sentence.
    """

    low: float
    high: float
    why: str

    @classmethod
    def within(cls, reach: float, why: str) -> Margin:
        """No more than `reach` to either side of zero."""
        return cls(-reach, reach, why)

    @classmethod
    def at_least(cls, gap: float, why: str) -> Margin:
        """Worse by `gap` or more."""
        return cls(gap, math.inf, why)

    def __str__(self) -> str:
        """What was asked for: `within ±0.005`, `above +0.08`, `-0.005 to +0.03`."""
        if self.high == -self.low:
            return f"within ±{self.high:g}"
        if self.high == math.inf:
            return f"above {self.low:+g}" if self.low else "above 0"
        return f"{self.low:+g} to {self.high:+g}"


WORSE = Margin.at_least(0.0, "the direction is claimed, not the size")


class Finding(NamedTuple):
    """A statement, what was found about it, and its outcome.

    Attributes:
      statement: that was to be tested.
      found: the number, with its interval if it has one.
      outcome: how the sentence came out.
      about: the arm, or another name by which rows of a paper refer to it; may be empty.
      asked: the margin in words; empty for exact statements.
      why: why this margin.
      power: which effect so many seeds detect; empty for exact statements.
    """

    statement: str
    found: str
    outcome: Ruling
    about: str = ""
    asked: str = ""
    why: str = ""
    power: str = ""


def holds(
    statement: str, found: str, condition: bool, *, about: str = "", why: str = ""
) -> Finding:
    """An exact statement."""
    return Finding(statement, found, "confirmed" if condition else "refuted", about, why=why)


class Evidence:
    """The cells of an ablation, with methods that test statements about them.

    Attributes:
      ablation: what was run; None where a claim needs no training.
    """

    def __init__(self, ablation: Ablation | None = None, cells: Iterable[Cell] = ()):
        self.ablation = ablation
        self._cells: dict[str, dict[int, Cell]] = {}
        for cell in cells:
            self._cells.setdefault(cell.arm, {})[cell.seed] = cell

    def cells(self, arm: str) -> Mapping[int, Cell]:
        """The cells of an arm by seed, without those that have not ended."""
        found = self._cells[arm]
        return {seed: found[seed] for seed in sorted(found) if found[seed].status != "missing"}

    def differences(self, arm: str, control: str | None = None) -> dict[int, float]:
        """The metric of an arm minus that of its control, by seed, where both are finite."""
        mine, theirs = self.cells(arm), self.cells(control or self._control_of(arm))
        return {
            seed: mine[seed].value - theirs[seed].value
            for seed in mine
            if seed in theirs
            and math.isfinite(mine[seed].value)
            and math.isfinite(theirs[seed].value)
        }

    def gap(
        self, statement: str, arm: str, margin: Margin, *, control: str | None = None
    ) -> Finding:
        """That an arm is worse than its control by `margin.low` at least; see the module."""
        differences, lost = self._against(arm, control)
        outcome = gap_outcome(differences, margin.low)
        if lost:
            outcome = _beside_failures(outcome, differences, lost)
        return _finding(statement, arm, margin, outcome, differences, lost)

    def between(
        self, statement: str, arm: str, margin: Margin, *, control: str | None = None
    ) -> Finding:
        """That an arm minus its control lies in a margin; see the module."""
        differences, lost = self._against(arm, control)
        outcome = range_outcome(differences, margin.low, margin.high)
        if lost and margin.high == math.inf:
            outcome = _beside_failures(outcome, differences, lost)
        elif lost:
            outcome = "refuted" if len(differences) + len(lost) > 1 else "undecided"
        return _finding(statement, arm, margin, outcome, differences, lost)

    def exceeds(self, statement: str, arm: str, other: str, *, factor: float) -> Finding:
        """That the difference of an arm from its control is `factor` times that of another arm.

        Tested as a gap of 0 of `d_arm - factor * d_other`, paired by seed.
        """
        mine, others = self.differences(arm), self.differences(other)
        excess = [mine[seed] - factor * others[seed] for seed in mine if seed in others]
        times = "" if factor == 1 else f"{factor:g} times "
        margin = Margin.at_least(0.0, f"it is compared with {times}the difference of {other}")
        finding = _finding(statement, arm, margin, gap_outcome(excess, 0.0), excess, {})
        if not excess:
            return finding
        pair = (signed(float(np.mean(list(d.values()))), math.inf) for d in (mine, others))
        found = f"{' against '.join(pair)}; minus {times}that: {finding.found}"
        return finding._replace(found=found)

    def failed(self, statement: str, arm: str) -> Finding:
        """That no run of an arm ends with a finite value."""
        cells = self.cells(arm)
        if not cells:
            return Finding(statement, "no runs", "undecided", arm)
        reasons = self._failed(arm)
        found = f"{len(reasons)} of {counted(len(cells), 'run')} failed"
        if reasons:
            found += f": {_brief(next(iter(reasons.values())))}"
        return holds(statement, found, len(cells) == len(reasons), about=arm)

    def in_every_run(
        self,
        statement: str,
        arms: Iterable[str],
        measure: Callable[[Cell], float],
        condition: Callable[[float], bool],
        *,
        form: str = "{:.4g}",
        about: str = "",
        why: str = "",
    ) -> Finding:
        """That something measured in a run directory has a property in every run of some arms.

        A run that failed is not measured, for it may have left nothing to measure, and does not
        have the property.
        """
        cells = [cell for arm in arms for cell in self.cells(arm).values()]
        if not cells:
            return Finding(statement, "no runs", "undecided", about, why=why)
        reasons = [cell.reason for cell in cells if cell.status == "failed"]
        values = [measure(cell) for cell in cells if cell.status != "failed"]
        words = (
            [f"{len(reasons)} of {counted(len(cells), 'run')} failed: {_brief(reasons[0])}"]
            if reasons
            else []
        )
        if values:
            low, high = form.format(min(values)), form.format(max(values))
            words.append(low if low == high else f"{low} to {high}")
        held = not reasons and all(map(condition, values))
        return holds(statement, "; ".join(words), held, about=about, why=why)

    def _control_of(self, arm: str) -> str:
        assert self.ablation is not None, "a claim without runs has no arms"
        return self.ablation.control_of(arm)

    def _failed(self, arm: str) -> dict[int, str]:
        return {seed: c.reason for seed, c in self.cells(arm).items() if c.status == "failed"}

    def _against(self, arm: str, control: str | None) -> tuple[list[float], dict[int, str]]:
        """The differences from a control; and why runs failed whose control did not, by seed."""
        finished = {
            seed
            for seed, cell in self.cells(control or self._control_of(arm)).items()
            if cell.status == "finished"
        }
        lost = {seed: reason for seed, reason in self._failed(arm).items() if seed in finished}
        return list(self.differences(arm, control).values()), lost


def _beside_failures(outcome: Ruling, differences: list[float], lost: Mapping[int, str]) -> Ruling:
    """How a lower bound of a difference came out, where other runs of the arm failed."""
    if not differences:
        return "confirmed" if len(lost) > 1 else "undecided"
    # What survived says less than the truth, so it can only confirm.
    return "undecided" if outcome == "refuted" else outcome


def _finding(
    statement: str,
    arm: str,
    margin: Margin,
    outcome: Ruling,
    differences: list[float],
    lost: Mapping[int, str],
) -> Finding:
    words = []
    if lost:
        seeds = counted(len(differences) + len(lost), "seed")
        words.append(f"failed on {len(lost)} of {seeds}: {_brief(next(iter(lost.values())))}")
    if differences:
        words.append(mean_in_words(differences))
    found = "; ".join(words) or "no runs"
    return Finding(
        statement, found, outcome, arm, str(margin), margin.why, _power_in_words(differences)
    )


def _power_in_words(differences: list[float]) -> str:
    """The effect that so many seeds with this spread detect, as four times in five they would."""
    estimate = Estimate.of(differences)
    if estimate.n < 2:
        return ""
    effect = smallest_detectable(estimate.sd, estimate.n, 2 * ALPHA)
    return f"smallest detectable effect {size(effect)}" if effect else "no spread over seeds"


def _brief(reason: str) -> str:
    """The cause without the advice; the report has the full text."""
    return reason.partition(";")[0]


def gap_outcome(differences: list[float], at_least: float) -> Ruling:
    """Whether differences exceed a gap; see the module."""
    if gap_test(differences, at_least).passes:
        return "confirmed"
    return "refuted" if deciding_interval(differences).high < at_least else "undecided"


def range_outcome(differences: list[float], low: float, high: float) -> Ruling:
    """Whether differences stay between two numbers; see the module."""
    interval = deciding_interval(differences)
    if low < interval.low and interval.high < high:
        return "confirmed"
    return "refuted" if interval.low >= high or interval.high <= low else "undecided"


def deciding_interval(differences: list[float]) -> Interval:
    """The 90% interval of the mean that both kinds of findings rest on."""
    return Estimate.of(differences).interval(2 * ALPHA)


def mean_in_words(differences: list[float]) -> str:
    """The mean with its sign ± half the interval, its level, and the number of seeds."""
    estimate, interval = Estimate.of(differences), deciding_interval(differences)
    level = f"{percent(1 - 2 * ALPHA)} interval, " if estimate.n > 1 else ""
    mean = signed(estimate.mean, interval.half_width)
    return f"{mean} ({level}{seeds_in_words(estimate.n)})"


def last_row(cell: Cell, column: str) -> Any:
    """A column of the last logged step of a run.

    Raises:
      KeyError: no logged step has it.
    """
    for row in reversed(read_rows(cell.directory / "metrics.jsonl")):
        if column in row:
            return row[column]
    raise KeyError(f"no row of {cell.directory / 'metrics.jsonl'} has {column}")


def watched(cell: Cell) -> list[dict[str, Any]]:
    """The rows of a run's telemetry; see `lmjax/telemetry/rows.py`."""
    return read_rows(cell.directory / "telemetry.jsonl")
