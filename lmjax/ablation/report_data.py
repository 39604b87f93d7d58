"""What the report of an ablation says, worked out from the files in its run directories.

Knows run directories, statistics and verdicts; nothing about pages.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

import numpy as np

from lmjax.ablation.pictures import ForestRow, Series
from lmjax.ablation.statistics import Estimate, Monitoring
from lmjax.ablation.verdict import Comparison, Criteria, compare_arms, difference
from lmjax.train.config import differences, to_json
from lmjax.train.metrics import read_rows

if TYPE_CHECKING:
    from lmjax.ablation.grid import Ablation, Cell

MOST_POINTS = 60
"""Points of a curve: logged steps are averaged in so many stretches of the run."""

ALWAYS_THERE = frozenset(
    ("step", "loss", "eval_loss", "learning_rate", "grad_norm", "tokens_per_second", "step_seconds")
)
"""Columns of `metrics.jsonl` with a place of their own; all others are mechanism counters."""

MEMORY = ("memory", "bytes")
"""Columns and results with one of these in their name are shown beside the speed."""


@dataclass(frozen=True)
class Run:
    """A cell and what its run directory holds; parts that are not there are empty."""

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
      changes: fields in which its config differs from its control's: theirs and its own.
      runs: in the order of their seeds.
      comparison: with the control; None for the control itself.
    """

    name: str
    color: int
    control: str | None
    changes: Mapping[str, tuple[Any, Any]]
    runs: Sequence[Run]
    comparison: Comparison | None

    @property
    def failed(self) -> bool:
        """Whether none of its runs finished although some ended."""
        statuses = [run.cell.status for run in self.runs]
        return "failed" in statuses and "finished" not in statuses


@dataclass(frozen=True)
class Report:
    """Everything that the page and the table show."""

    ablation: Ablation
    arms: Sequence[Arm]
    criteria: Criteria

    @property
    def runs(self) -> list[Run]:
        """All runs, arm by arm."""
        return [run for arm in self.arms for run in arm.runs]


def compare_cells(
    ablation: Ablation, cells: Iterable[Cell], monitoring: Monitoring = "fixed"
) -> dict[str, Comparison]:
    """The comparisons of an ablation with the values its cells have so far.

    Args:
      ablation: what was asked.
      cells: of any status; missing ones are left out, failed ones count as results.
      monitoring: `anytime` where seeds are added until the question is settled.

    Returns:
      By arm, without those that are compared with nothing.
    """
    values: dict[str, dict[int, float]] = {arm: {} for arm in ablation.arms}
    reasons: dict[str, dict[int, str]] = {arm: {} for arm in ablation.arms}
    for cell in cells:
        if cell.status != "missing":
            values[cell.arm][cell.seed] = cell.value if cell.status == "finished" else math.nan
            reasons[cell.arm][cell.seed] = cell.reason
    return compare_arms(values, _controls(ablation), _criteria(ablation, monitoring), reasons)


def gather(ablation: Ablation, cells: Sequence[Cell], monitoring: Monitoring = "fixed") -> Report:
    """Reads the run directories and compares the arms."""
    comparisons = compare_cells(ablation, cells, monitoring)
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
    return Report(ablation, arms, _criteria(ablation, monitoring))


def summary(report: Report) -> dict[str, Any]:
    """What was asked and what was found, for programs to read: verdicts by arm, and all cells."""
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
    """A comparison as plain values; what is called interval there is a list here."""
    return {
        "control": comparison.control,
        "verdict": comparison.verdict.kind,
        "text": comparison.verdict.text,
        "mean": comparison.estimate.mean,
        "interval": list(comparison.interval),
        "p": comparison.p,
        "equivalence_interval": list(comparison.equivalence_interval),
        "equivalence_p": comparison.equivalence_p,
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


def _criteria(ablation: Ablation, monitoring: Monitoring) -> Criteria:
    unit = "nats" if "loss" in ablation.metric else ablation.metric
    return Criteria(ablation.margin, monitoring=monitoring, unit=unit)


def _changes(ablation: Ablation, control: str, arm: str) -> dict[str, tuple[Any, Any]]:
    changes = differences(ablation.arms[control].resolved(), ablation.arms[arm].resolved())
    # Cells take their seeds from the ablation, whatever the arms were made from.
    return {name: values for name, values in changes.items() if name != "seed"}


def _read(cell: Cell) -> Run:
    return Run(
        cell,
        read_rows(cell.directory / "metrics.jsonl"),
        _read_json(cell.directory / "result.json"),
        _read_json(cell.directory / "environment.json"),
    )


def _read_json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def number(value: Any) -> float:
    """A value of `metrics.jsonl`, where what is not finite stands as a string; NaN if no number."""
    try:
        return float(value)
    except (TypeError, ValueError):
        return math.nan


def column(run: Run, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Steps and values of one metric of a run, `f64[rows that have it]` each."""
    points = [(row["step"], number(row[name])) for row in run.rows if name in row]
    return (
        np.asarray([step for step, _ in points], np.float64),
        np.asarray([value for _, value in points], np.float64),
    )


def curves(arms: Sequence[Arm], name: str) -> list[Series]:
    """Mean over seeds and the range of the seeds, for each arm that logged the metric.

    A seed whose values stop being finite leaves the mean from there on.
    """
    edges = _edges([run for arm in arms for run in arm.runs], name)
    drawn = []
    for arm in arms:
        seeds = np.asarray([_averaged(*column(run, name), edges) for run in arm.runs])
        alive = np.isfinite(seeds).any(axis=0)
        if not alive.any():
            continue
        mean, low, high = np.full((3, alive.size), np.nan)
        mean[alive] = np.nanmean(seeds[:, alive], axis=0)
        low[alive] = np.nanmin(seeds[:, alive], axis=0)
        high[alive] = np.nanmax(seeds[:, alive], axis=0)
        ended = arm.failed and not alive[-1]
        drawn.append(Series(arm.name, arm.color, edges[1:], mean, low, high, ended))
    return drawn


def difference_curve(arm: Arm, control: Arm, name: str) -> Series | None:
    """Mean over seeds of arm minus control and its pointwise 95% t interval.

    Seeds of both arms saw the same batches, so what they have in common cancels at every step.
    None where no step of any seed is finite in both.
    """
    others = {run.cell.seed: run for run in control.runs}
    pairs = [(run, others[run.cell.seed]) for run in arm.runs if run.cell.seed in others]
    edges = _edges([run for pair in pairs for run in pair], name)
    apart = np.asarray(
        [
            _averaged(*column(mine, name), edges) - _averaged(*column(theirs, name), edges)
            for mine, theirs in pairs
        ]
    )
    if not np.isfinite(apart).any():
        return None
    estimates = [Estimate.of(at[np.isfinite(at)].tolist()) for at in apart.T]
    mean = np.asarray([estimate.mean for estimate in estimates])
    ends = np.asarray([estimate.interval() for estimate in estimates])
    ended = arm.failed and not np.isfinite(mean[-1])
    return Series(arm.name, arm.color, edges[1:], mean, ends[:, 0], ends[:, 1], ended)


def _edges(runs: Iterable[Run], name: str) -> np.ndarray:
    """Steps that the curves of these runs are cut at: `f64[points + 1]`, the first below all."""
    steps = sorted({step for run in runs for step in column(run, name)[0]})
    parts = [part for part in np.array_split(steps, MOST_POINTS) if part.size]
    return np.asarray([-math.inf, *(part[-1] for part in parts)])


def _averaged(steps: np.ndarray, values: np.ndarray, edges: np.ndarray) -> np.ndarray:
    """Mean of the values between neighbouring edges, NaN where one is not finite or none is there.

    Returns:
      f64[edges - 1].
    """
    part = np.searchsorted(edges[1:], steps)
    count = np.bincount(part, minlength=edges.size - 1)
    with np.errstate(invalid="ignore"):
        mean = np.bincount(part, values, minlength=edges.size - 1) / count
    mean[~np.isfinite(mean)] = np.nan
    return mean


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


def memory_names(report: Report) -> list[str]:
    """Names of what runs recorded about memory, in their rows or their result."""
    sources = [source for run in report.runs for source in (*run.rows, run.result)]
    names = dict.fromkeys(name for source in sources for name in source)
    return [name for name in names if any(word in name for word in MEMORY)]


def last(run: Run, name: str) -> float:
    """The last value of a metric, or the one in the result; NaN if there is none."""
    values = column(run, name)[1]
    return float(values[-1]) if values.size else number(run.result.get(name))


def speed(run: Run) -> float:
    """Median tokens per second of the logged steps; NaN without any."""
    values = column(run, "tokens_per_second")[1]
    return float(np.median(values)) if values.size else math.nan


def forest_rows(arms: Sequence[Arm]) -> list[ForestRow]:
    """The comparisons as rows of the forest plot."""
    return [
        ForestRow(
            arm.name,
            arm.color,
            tuple(arm.comparison.differences.values()),
            arm.comparison.estimate.mean,
            arm.comparison.interval,
            arm.comparison.equivalence_interval,
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
    note = difference(comparison) if comparison.estimate.n > 1 else "one seed"
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
                found[prefix + name] = json.dumps(value) if not isinstance(value, str) else value

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
                text = content if isinstance(content, str) else json.dumps(content)
                found.setdefault(key, {})[text] = None
    return {name: list(texts) for name, texts in found.items() if any(texts)}


def link(run: Run, directory: Path, name: str = "") -> str:
    """Relative address of a run directory or a file in it; empty where it is not there."""
    target = run.cell.directory / name
    if not target.exists():
        return ""
    relative = Path(os.path.relpath(target, directory)).as_posix()
    return quote(os.fsencode(relative)) + ("" if name else "/")
