"""What the runs of an ablation say about a sentence: findings with an outcome.

Two kinds of sentences are statistical, about differences that are paired by seed:

    gap        an arm is worse than its control by at least so much. Confirmed if the one-sided 95%
               t interval of the mean excludes less, and every seed agrees in sign; refuted if the
               interval from the other side excludes as much.
    range      the difference lies between two numbers. Confirmed by two one-sided tests (the 90%
               interval lies inside the range); refuted if that interval lies outside it. `parity`
               is the range from `-margin` to `margin`; a range may have no upper end.

One seed decides neither. A run that failed is worse by any amount than one that did not; seeds on
which the control failed say nothing and are left out.

All others are exact: a count, a bound, an arithmetic fact. They hold or not, once there are runs.

Knows the files of runs and `statistics.py`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal, NamedTuple

from lmjax.ablation.grid import Ablation, Cell
from lmjax.ablation.statistics import ALPHA, Estimate, gap_test
from lmjax.ablation.verdict import plus_minus
from lmjax.train.metrics import read_rows

Outcome = Literal["confirmed", "refuted", "undecided"]


class Finding(NamedTuple):
    """A sentence, what was found about it, and how it came out."""

    statement: str
    found: str
    outcome: Outcome


def holds(statement: str, found: str, condition: bool) -> Finding:
    """An exact statement."""
    return Finding(statement, found, "confirmed" if condition else "refuted")


class Evidence:
    """The cells of an ablation, to be asked about.

    Attributes:
      ablation: what was run; None where a claim needs no training.
    """

    def __init__(self, ablation: Ablation | None = None, cells: Iterable[Cell] = ()):
        self.ablation = ablation
        self._cells: dict[str, dict[int, Cell]] = {}
        for cell in cells:
            self._cells.setdefault(cell.arm, {})[cell.seed] = cell

    def cells(self, arm: str) -> Mapping[int, Cell]:
        """The cells of an arm by seed, those left out that have not run to their end."""
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
        self, statement: str, arm: str, at_least: float, *, control: str | None = None
    ) -> Finding:
        """That an arm is worse than its control by at least so much; see the module."""
        differences, lost = self._against(arm, control)
        outcome = gap_outcome(differences, at_least)
        if lost:
            outcome = _beside_failures(outcome, differences, lost)
        return Finding(statement, _in_words(differences, lost), outcome)

    def parity(
        self, statement: str, arm: str, within: float, *, control: str | None = None
    ) -> Finding:
        """That an arm and its control differ by less than so much; see the module."""
        return self.between(statement, arm, -within, within, control=control)

    def between(
        self, statement: str, arm: str, low: float, high: float, *, control: str | None = None
    ) -> Finding:
        """That an arm minus its control lies between two numbers; see the module."""
        differences, lost = self._against(arm, control)
        outcome = range_outcome(differences, low, high)
        if lost and high == math.inf:
            outcome = _beside_failures(outcome, differences, lost)
        elif lost:
            outcome = "refuted" if len(differences) + len(lost) > 1 else "undecided"
        return Finding(statement, _in_words(differences, lost), outcome)

    def exceeds(self, statement: str, arm: str, other: str, *, factor: float) -> Finding:
        """That the difference of an arm from its control is `factor` times that of another arm.

        Tested as a gap of 0 of `d_arm - factor * d_other`, paired by seed.
        """
        mine, others = self.differences(arm), self.differences(other)
        differences = [mine[seed] - factor * others[seed] for seed in mine if seed in others]
        found = (
            f"{mean_in_words(list(mine.values()))} against {mean_in_words(list(others.values()))}"
            if differences
            else "no runs"
        )
        return Finding(statement, found, gap_outcome(differences, 0.0))

    def failed(self, statement: str, arm: str) -> Finding:
        """That no run of an arm ends with a finite value."""
        cells = self.cells(arm)
        if not cells:
            return Finding(statement, "no runs", "undecided")
        reasons = self._failed(arm)
        found = f"{len(reasons)} of {len(cells)} runs failed"
        if reasons:
            found += f": {_brief(next(iter(reasons.values())))}"
        return holds(statement, found, len(cells) == len(reasons))

    def in_every_run(
        self,
        statement: str,
        arms: Iterable[str],
        measure: Callable[[Cell], float],
        condition: Callable[[float], bool],
        *,
        form: str = "{:.3g}",
    ) -> Finding:
        """That something measured in a run directory has a property in every run of some arms.

        A run that failed is not measured, for it may have left nothing to measure, and does not
        have the property.
        """
        cells = [cell for arm in arms for cell in self.cells(arm).values()]
        if not cells:
            return Finding(statement, "no runs", "undecided")
        reasons = [cell.reason for cell in cells if cell.status == "failed"]
        values = [measure(cell) for cell in cells if cell.status != "failed"]
        words = (
            [f"{len(reasons)} of {len(cells)} runs failed: {_brief(reasons[0])}"] if reasons else []
        )
        if values:
            low, high = form.format(min(values)), form.format(max(values))
            words.append(low if low == high else f"{low} to {high}")
        return holds(statement, "; ".join(words), not reasons and all(map(condition, values)))

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


def _beside_failures(
    outcome: Outcome, differences: list[float], lost: Mapping[int, str]
) -> Outcome:
    """How a lower bound of a difference came out, where other runs of the arm failed."""
    if not differences:
        return "confirmed" if len(lost) > 1 else "undecided"
    # What survived says less than the truth, so it can only confirm.
    return "undecided" if outcome == "refuted" else outcome


def _in_words(differences: list[float], lost: Mapping[int, str]) -> str:
    words = []
    if lost:
        seeds = len(differences) + len(lost)
        words.append(f"failed on {len(lost)} of {seeds} seeds: {_brief(next(iter(lost.values())))}")
    if differences:
        words.append(mean_in_words(differences))
    return "; ".join(words) or "no runs"


def _brief(reason: str) -> str:
    """What happened, without what to do about it; the whole is in the report."""
    return reason.partition(";")[0]


def gap_outcome(differences: list[float], at_least: float) -> Outcome:
    """Whether differences exceed a gap; see the module."""
    if gap_test(differences, at_least).passes:
        return "confirmed"
    estimate = Estimate.of(differences)
    return "refuted" if estimate.interval(2 * ALPHA).high < at_least else "undecided"


def range_outcome(differences: list[float], low: float, high: float) -> Outcome:
    """Whether differences stay between two numbers; see the module."""
    interval = Estimate.of(differences).equivalence_interval()
    if low < interval.low and interval.high < high:
        return "confirmed"
    return "refuted" if interval.low >= high or interval.high <= low else "undecided"


def mean_in_words(differences: list[float]) -> str:
    """The mean with its sign ± half the 95% interval, and the number of seeds."""
    estimate = Estimate.of(differences)
    seeds = f"{estimate.n} seed{'s' if estimate.n > 1 else ''}"
    if estimate.n < 2:
        return f"{estimate.mean:+.4f} ({seeds})"
    sign = "-" if estimate.mean < 0 else "+"
    size = plus_minus(abs(estimate.mean), estimate.interval().half_width, digits=2)
    return f"{sign}{size} ({seeds})"


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
    """The rows of a run's telemetry; see `lmjax/numerics/telemetry.py`."""
    return read_rows(cell.directory / "telemetry.jsonl")
