"""What the runs of an ablation say about a sentence: findings with an outcome.

Two kinds of sentences are statistical, about differences that are paired by seed:

    gap        an arm is worse than its control by at least so much. Confirmed if the one-sided 95%
               t interval of the mean excludes less, and every seed agrees in sign; refuted if the
               interval from the other side excludes as much.
    parity     two arms differ by less than a margin. Confirmed by two one-sided tests (the 90%
               interval lies inside the margin); refuted if that interval lies outside it.

All others are exact: a count, a bound, an arithmetic fact. They hold or not.

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
        """That an arm is worse than its control by at least so much; see the module.

        A run of the arm that failed, where the control's did not, is worse by any amount; if every
        run did, the sentence is confirmed.
        """
        differences = list(self.differences(arm, control).values())
        failed = self._failed(arm)
        found = self._in_words(differences, failed, len(self.cells(arm)))
        if failed and not differences:
            return Finding(
                statement,
                found,
                "confirmed" if not self._failed_control(arm, control) else "undecided",
            )
        return Finding(statement, found, gap_outcome(differences, at_least))

    def parity(
        self, statement: str, arm: str, within: float, *, control: str | None = None
    ) -> Finding:
        """That an arm and its control differ by less than so much; see the module."""
        differences = list(self.differences(arm, control).values())
        failed = self._failed(arm)
        found = self._in_words(differences, failed, len(self.cells(arm)))
        if failed and not self._failed_control(arm, control):
            return Finding(statement, found, "refuted")
        return Finding(statement, found, parity_outcome(differences, within))

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
        reasons = self._failed(arm)
        found = f"{len(reasons)} of {len(cells)} runs failed"
        if reasons:
            found += f": {next(iter(reasons.values()))}"
        return holds(statement, found, 0 < len(cells) == len(reasons))

    def in_every_run(
        self,
        statement: str,
        arms: Iterable[str],
        measure: Callable[[Cell], float],
        condition: Callable[[float], bool],
        *,
        form: str = "{:.3g}",
    ) -> Finding:
        """That something measured in a run directory has a property in every run of some arms."""
        values = {
            (arm, seed): measure(cell) for arm in arms for seed, cell in self.cells(arm).items()
        }
        low, high = min(values.values(), default=math.nan), max(values.values(), default=math.nan)
        found = form.format(low) if low == high else f"{form.format(low)} to {form.format(high)}"
        return holds(statement, found, bool(values) and all(map(condition, values.values())))

    def _control_of(self, arm: str) -> str:
        assert self.ablation is not None, "a claim without runs has no arms"
        return self.ablation.control_of(arm)

    def _failed(self, arm: str) -> dict[int, str]:
        return {seed: c.reason for seed, c in self.cells(arm).items() if c.status == "failed"}

    def _failed_control(self, arm: str, control: str | None) -> bool:
        return bool(self._failed(control or self._control_of(arm)))

    def _in_words(self, differences: list[float], failed: Mapping[int, str], ended: int) -> str:
        words = []
        if failed:
            reason = next(iter(failed.values()))
            words.append(f"failed on {len(failed)} of {ended} seeds: {reason}")
        if differences:
            words.append(mean_in_words(differences))
        return "; ".join(words) or "no runs"


def gap_outcome(differences: list[float], at_least: float) -> Outcome:
    """Whether differences exceed a gap; see the module."""
    if gap_test(differences, at_least).passes:
        return "confirmed"
    estimate = Estimate.of(differences)
    return "refuted" if estimate.interval(2 * ALPHA).high < at_least else "undecided"


def parity_outcome(differences: list[float], within: float) -> Outcome:
    """Whether differences stay inside a margin; see the module."""
    interval = Estimate.of(differences).equivalence_interval()
    if interval.inside(within):
        return "confirmed"
    outside = interval.low >= within or interval.high <= -within
    return "refuted" if outside else "undecided"


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
