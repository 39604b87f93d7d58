"""Metrics of runs over their steps, averaged over the seeds of an arm.

Knows what a `CellRecord` and an `Arm` of the report hold, and statistics; nothing of pictures.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from lmjax.ablation.report_data import Arm, CellRecord, column, number
from lmjax.ablation.statistics import Estimate

MOST_POINTS = 60
"""Points of a curve: logged steps are averaged over this many intervals of the run."""


@dataclass(frozen=True)
class Series:
    """A line with a band around it; points where `y` is not finite are gaps.

    Attributes:
      name: of the arm.
      color: its number, which decides how it looks in every picture.
      x: f64[points], increasing.
      y: f64[points].
      low: lower end of the band, f64[points].
      high: upper end of the band, f64[points].
      crosses: the last finite points of seeds whose run failed, `(x, y)` each.
    """

    name: str
    color: int
    x: np.ndarray
    y: np.ndarray
    low: np.ndarray
    high: np.ndarray
    crosses: Sequence[tuple[float, float]] = ()


def curves(arms: Sequence[Arm], name: str) -> list[Series]:
    """Mean over seeds and the range of the seeds, for each arm that logged the metric.

    A seed whose values stop being finite leaves the mean from there on, and has a cross there if
    its run failed.
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
        crosses = _crosses(arm.runs, edges[1:], seeds)
        drawn.append(Series(arm.name, arm.color, edges[1:], mean, low, high, crosses))
    return drawn


def _crosses(
    runs: Sequence[CellRecord], x: np.ndarray, values: np.ndarray
) -> list[tuple[float, float]]:
    """Where the curves of failed runs end: their last finite points, from `f64[runs, points]`."""
    ends = []
    for run, curve in zip(runs, values, strict=True):
        finite = np.flatnonzero(np.isfinite(curve))
        if run.cell.status == "failed" and finite.size:
            ends.append((float(x[finite[-1]]), float(curve[finite[-1]])))
    return ends


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
    return Series(arm.name, arm.color, edges[1:], mean, ends[:, 0], ends[:, 1])


def _edges(runs: Iterable[CellRecord], name: str) -> np.ndarray:
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


def last(run: CellRecord, name: str) -> float:
    """The last value of a metric, or the one in the result; NaN if there is none."""
    values = column(run, name)[1]
    return float(values[-1]) if values.size else number(run.result.get(name))


def typical(run: CellRecord, name: str) -> float:
    """Median of a metric over the logged steps; NaN without any."""
    values = column(run, name)[1]
    return float(np.median(values)) if values.size else math.nan


def moves(series: Series) -> bool:
    """Whether the curve is worth drawing: it changes."""
    values = series.y[np.isfinite(series.y)]
    return values.size > 0 and bool(np.ptp(values) > 0)
