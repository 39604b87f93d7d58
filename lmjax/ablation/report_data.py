"""The content of an ablation's report, computed from the files in its run directories.

Knows run directories, statistics and verdicts; nothing about pages.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple
from urllib.parse import quote

import numpy as np

from lmjax import strict_json
from lmjax.ablation.setting import footprint, read_environment
from lmjax.ablation.statistics import Monitoring
from lmjax.ablation.verdict import Comparison, Criteria, compare_arms, difference
from lmjax.ablation.words import FEWEST_SEEDS, seeds_in_words
from lmjax.console.wording import counted
from lmjax.runs.config import differences, to_json
from lmjax.runs.metrics import read_rows

if TYPE_CHECKING:
    from lmjax.ablation.grid import Ablation, Cell

ALWAYS_THERE = frozenset(
    (
        "step",
        "loss",
        "eval_loss",
        "learning_rate",
        "grad_norm",
        "tokens_per_second",
        "step_seconds",
        "mfu",
    )
)
"""Columns of `metrics.jsonl` that the report shows by name; all others are mechanism counters."""

MEMORY = ("memory", "bytes")
"""Columns and results whose name contains one of these are shown next to the speed."""


class ForestRow(NamedTuple):
    """A row of the forest plot.

    Attributes:
      name: of the arm.
      color: its number.
      points: the differences of the single seeds.
      mean: NaN where there is none.
      ends: of the interval that the verdict rests on; infinite where there is none.
      note: written at the right end of the row.
      failed: whether to mark the row with a cross if it has no mean.
    """

    name: str
    color: int
    points: Sequence[float]
    mean: float
    ends: tuple[float, float]
    note: str
    failed: bool = False


@dataclass(frozen=True)
class CellRecord:
    """A cell and the content of its run directory; missing files are empty."""

    cell: Cell
    rows: Sequence[Mapping[str, Any]]
    result: Mapping[str, Any]
    environment: Mapping[str, Any]


@dataclass(frozen=True)
class Arm:
    """One arm of the report.

    Attributes:
      name: of the arm.
      color: index of its colour in every picture.
      control: the arm it is compared with; None for the control itself.
      changes: fields whose value differs from the control's: (control's, own).
      runs: in the order of their seeds.
      comparison: with the control; None for the control itself.
    """

    name: str
    color: int
    control: str | None
    changes: Mapping[str, tuple[Any, Any]]
    runs: Sequence[CellRecord]
    comparison: Comparison | None

    @property
    def failures(self) -> str:
        """`failed on 1 of 3 seeds`; empty where no run did."""
        failed = sum(run.cell.status == "failed" for run in self.runs)
        return f"failed on {failed} of {counted(len(self.runs), 'seed')}" if failed else ""


@dataclass(frozen=True)
class Report:
    """Everything that the page and the Markdown show."""

    ablation: Ablation
    arms: Sequence[Arm]
    criteria: Criteria

    @property
    def runs(self) -> list[CellRecord]:
        """All runs, arm by arm."""
        return [run for arm in self.arms for run in arm.runs]


def compare_cells(
    ablation: Ablation,
    cells: Iterable[Cell],
    monitoring: Monitoring = "fixed",
    *,
    alone: bool = False,
) -> dict[str, Comparison]:
    """The comparisons of an ablation with the values its cells have so far.

    Args:
      ablation: the question and its arms.
      cells: of any status; missing ones are left out, failed ones count as results.
      monitoring: `anytime` where seeds are added until the question is settled.
      alone: the comparisons belong to the findings of a claim; see `Criteria`.

    Returns:
      By arm; arms without a comparison are left out.
    """
    values: dict[str, dict[int, float]] = {arm: {} for arm in ablation.arms}
    reasons: dict[str, dict[int, str]] = {arm: {} for arm in ablation.arms}
    for cell in cells:
        if cell.status != "missing":
            values[cell.arm][cell.seed] = cell.value if cell.status == "finished" else math.nan
            reasons[cell.arm][cell.seed] = cell.reason
    criteria = _criteria(ablation, monitoring, alone)
    return compare_arms(values, _controls(ablation), criteria, reasons)


def gather(
    ablation: Ablation,
    cells: Sequence[Cell],
    monitoring: Monitoring = "fixed",
    *,
    alone: bool = False,
) -> Report:
    """Reads the run directories and compares the arms; see `compare_cells`."""
    comparisons = compare_cells(ablation, cells, monitoring, alone=alone)
    controls = _controls(ablation)
    names = [name for name in ablation.arms if name not in controls]
    names += [name for name in ablation.arms if name in controls]
    arms = []
    for color, name in enumerate(names):
        control = controls.get(name)
        mine = sorted((c for c in cells if c.arm == name), key=lambda cell: cell.seed)
        arms.append(
            Arm(
                name=name,
                color=color,
                control=control,
                changes=_changes(ablation, control or ablation.control, name),
                runs=[_read(cell) for cell in mine],
                comparison=comparisons.get(name),
            )
        )
    return Report(ablation, arms, _criteria(ablation, monitoring, alone))


def summary(report: Report) -> dict[str, Any]:
    """The question and the findings for programs: verdicts by arm, and all cells."""
    ablation = report.ablation
    return {
        "name": ablation.name,
        "question": ablation.question,
        "metric": ablation.metric,
        "margin": report.criteria.margin,
        "alpha": report.criteria.alpha,
        "monitoring": report.criteria.monitoring,
        "comparisons": {
            arm.name: _found(arm.comparison) for arm in report.arms if arm.comparison is not None
        },
        "cells": [
            {**run.cell._asdict(), "directory": str(run.cell.directory)} for run in report.runs
        ],
    }


def _found(comparison: Comparison) -> dict[str, Any]:
    """A comparison as plain values, with the one interval that the verdict rests on."""
    return {
        "control": comparison.control,
        "verdict": comparison.verdict.kind,
        "text": comparison.verdict.text,
        "mean": comparison.estimate.mean,
        "interval": list(comparison.decisive),
        "level": comparison.level,
        "p": comparison.p,
        "equivalence_p": comparison.equivalence_p,
        "smallest_detectable": comparison.smallest_detectable,
        "differences": {str(seed): value for seed, value in comparison.differences.items()},
        "failures": {str(seed): reason for seed, reason in comparison.failures.items()},
    }


def _controls(ablation: Ablation) -> dict[str, str]:
    """By arm, the arm that it is compared with: its own control or that of the ablation."""
    return {
        arm: ablation.controls.get(arm, ablation.control)
        for arm in ablation.arms
        if arm != ablation.control
    }


def _criteria(ablation: Ablation, monitoring: Monitoring, alone: bool) -> Criteria:
    unit = "nats" if "loss" in ablation.metric else ablation.metric
    return Criteria(ablation.margin, monitoring=monitoring, unit=unit, alone=alone)


def _changes(ablation: Ablation, control: str, arm: str) -> dict[str, tuple[Any, Any]]:
    changes = differences(ablation.arms[control].resolved(), ablation.arms[arm].resolved())
    # Cells take their seeds from the ablation, whatever the arms were made from.
    return {name: values for name, values in changes.items() if name != "seed"}


def _read(cell: Cell) -> CellRecord:
    result = cell.directory / "result.json"
    return CellRecord(
        cell,
        read_rows(cell.directory / "metrics.jsonl"),
        strict_json.read(result) if result.exists() else {},
        read_environment(cell.directory),
    )


def counters(report: Report) -> list[str]:
    """Names of the mechanism counters and gauges that some run logged."""
    names = dict.fromkeys(name for run in report.runs for row in run.rows for name in row)
    return [
        name
        for name in names
        if name not in ALWAYS_THERE
        and not any(word in name for word in MEMORY)
        and any(column(run, name)[1].size for run in report.runs)
    ]


def state_bytes(report: Report, arm: Arm) -> int:
    """Bytes of state that a run of an arm keeps between steps: parameters, moments and the rest."""
    return footprint(report.ablation.arms[arm.name]).state_bytes


def memory_names(report: Report) -> list[str]:
    """Names of what runs recorded about memory, in their rows or their result."""
    sources = [source for run in report.runs for source in (*run.rows, run.result)]
    names = dict.fromkeys(name for source in sources for name in source)
    return [name for name in names if any(word in name for word in MEMORY)]


def forest_rows(arms: Sequence[Arm]) -> list[ForestRow]:
    """The comparisons as rows of the forest plot."""
    return [
        ForestRow(
            arm.name,
            arm.color,
            tuple(arm.comparison.differences.values()),
            arm.comparison.estimate.mean,
            arm.comparison.decisive,
            _forest_note(arm.comparison),
            bool(arm.comparison.failures),
        )
        for arm in arms
        if arm.comparison
    ]


def _forest_note(comparison: Comparison) -> str:
    failed = f"failed {len(comparison.failures)}/{comparison.ended}"
    if not comparison.estimate.n:
        return failed if comparison.failures else "no pair yet"
    note = difference(comparison)
    if comparison.estimate.n < FEWEST_SEEDS:
        note += f" ({seeds_in_words(comparison.estimate.n)})"
    return f"{note}, {failed}" if comparison.failures else note


def shared_config(report: Report) -> dict[str, str]:
    """Every field of the base config that is the same in all arms, by dotted name."""
    varied = {name for arm in report.arms for name in arm.changes} | {"seed"}
    found: dict[str, str] = {}

    def walk(values: Mapping[str, Any], prefix: str) -> None:
        for name, value in values.items():
            if isinstance(value, dict):
                walk(value, f"{prefix}{name}.")
            elif prefix + name not in varied:
                found[prefix + name] = (
                    strict_json.dumps(value) if not isinstance(value, str) else value
                )

    walk(to_json(report.ablation.base.resolved()), "")
    return found


def environments(report: Report) -> dict[str, list[str]]:
    """What `environment.json` says, by field: one text where all runs agree, else all of them."""
    found: dict[str, dict[str, None]] = {}
    for run in report.runs:
        for name, value in run.environment.items():
            parts = value.items() if isinstance(value, dict) else [("", value)]
            for part, content in parts:
                key = f"{name}.{part}" if part else name
                text = content if isinstance(content, str) else strict_json.dumps(content)
                found.setdefault(key, {})[text] = None
    return {name: list(texts) for name, texts in found.items() if any(texts)}


def link(run: CellRecord, directory: Path, name: str = "") -> str:
    """Relative address of a run directory or a file in it; empty if it does not exist."""
    target = run.cell.directory / name
    if not target.exists():
        return ""
    relative = Path(os.path.relpath(target, directory)).as_posix()
    return quote(os.fsencode(relative)) + ("" if name else "/")


def number(value: Any) -> float:
    """A value of `metrics.jsonl`, where non-finite values are strings; NaN if not a number."""
    try:
        return float(value)
    except (TypeError, ValueError):
        return math.nan


def column(run: CellRecord, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Steps and values of one metric of a run, `f64[rows that have it]` each."""
    points = [(row["step"], number(row[name])) for row in run.rows if name in row]
    return (
        np.asarray([step for step, _ in points], np.float64),
        np.asarray([value for _, value in points], np.float64),
    )
