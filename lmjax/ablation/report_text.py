"""How the report writes numbers, and the report as Markdown.

Knows what a `Report` holds; reads nothing.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from lmjax.ablation.report_data import Arm, Report, Run, link
from lmjax.ablation.statistics import Interval
from lmjax.ablation.verdict import difference


def written(value: float, name: str = "") -> str:
    """A number of a table: shares as percentages, large powers of two as such."""
    if not math.isfinite(value):
        return str(value)
    if "share" in name or "fraction" in name:
        return f"{100 * value:.3g}%"
    if value >= 1024 and math.log2(value).is_integer():
        return f"2^{math.log2(value):.0f}"
    if value >= 1000 or value.is_integer():
        return f"{value:,.0f}"
    return f"{value:.4f}" if value >= 0.1 else f"{value:.3g}"


def span(values: Sequence[float], name: str = "") -> str:
    """The values of the seeds: their mean, and their range where they differ; NaN is left out."""
    there = [float(value) for value in values if not math.isnan(value)]
    if not there:
        return ""
    low, high, mean = (written(f(there), name) for f in (min, max, _mean))
    return mean if low == high else f"{mean} ({low} to {high})"


def _mean(values: Sequence[float]) -> float:
    return float(np.mean(values))


def title_of(name: str) -> str:
    """`skipped_steps` as people write it."""
    words = name.replace("_", " ").replace("/", " / ")
    return "held-out loss" if name == "eval_loss" else words


def interval(ends: Interval) -> str:
    """Both ends with enough digits to tell them apart."""
    if not math.isfinite(ends.half_width):
        return ""
    length = 2 * ends.half_width
    decimals = max(0, 2 - math.floor(math.log10(length))) if length else 4
    decimals = min(decimals, 7)
    return f"{ends.low:+.{decimals}f} to {ends.high:+.{decimals}f}"


def size(value: float) -> str:
    """A difference without sign, to two digits."""
    return f"{value:.2g}" if math.isfinite(value) else ""


def p_text(p: float) -> str:
    """A p value as it is printed in papers."""
    return f"{p:.3f}" if p >= 0.001 else "< 0.001"


def markdown(report: Report, directory: Path) -> str:
    """The question, the verdicts and the cells as Markdown tables.

    Args:
      report: what to write down.
      directory: where the file will lie; links to runs are relative to it.
    """
    metric = title_of(report.ablation.metric)
    level = f"{100 * (1 - report.criteria.alpha):g}%"
    lines = [
        f"# Ablation {report.ablation.name}",
        "",
        report.ablation.question,
        "",
        *markdown_table(*verdicts(report)),
        "",
        f"Values: mean over seeds and their range. Differences: paired by seed, ± half the {level} "
        f"interval, corrected for the number of arms. Margin: {report.criteria.margin:g}.",
        "",
        *markdown_table(
            ["arm", "seed", "status", metric, "run"],
            (_cell_row(run, directory) for run in report.runs),
        ),
        "",
    ]
    return "\n".join(lines)


def verdicts(report: Report) -> tuple[list[str], list[list[str]]]:
    """Header and rows of the table of verdicts: a row for each arm, the control first."""
    header = ["arm", title_of(report.ablation.metric), "difference", "verdict"]
    return header, [_verdict_row(arm) for arm in report.arms]


def _verdict_row(arm: Arm) -> list[str]:
    values = span([run.cell.value for run in arm.runs if run.cell.status == "finished"])
    if arm.comparison is None:
        return [arm.name, values, "", "control"]
    return [arm.name, values, difference(arm.comparison), arm.comparison.verdict.text]


def _cell_row(run: Run, directory: Path) -> list[str]:
    cell, address = run.cell, link(run, directory)
    return [
        cell.arm,
        str(cell.seed),
        f"{cell.status}: {cell.reason}" if cell.reason else cell.status,
        str(cell.value) if cell.status == "finished" else "",
        f"[{cell.directory.name}]({address})" if address else "",
    ]


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """The lines of a table; a cell is one line, whatever its text."""
    line = lambda cells: "| " + " | ".join(_cell(cell) for cell in cells) + " |"
    return [line(header), "|" + " --- |" * len(header), *(line(row) for row in rows)]


def _cell(text: str) -> str:
    return " ".join(text.replace("|", "\\|").split())
