"""The report as Markdown, and the table of verdicts.

Knows what a `Report` holds; reads nothing.
"""

from __future__ import annotations

from pathlib import Path

from lmjax.ablation.report_data import Arm, CellRecord, Report, link
from lmjax.ablation.verdict import difference
from lmjax.ablation.words import markdown_link, markdown_table, percent, significant, span, title_of
from lmjax.console.wording import counted


def markdown(report: Report, directory: Path) -> str:
    """The question, the verdicts and the cells as Markdown tables.

    Args:
      report: to write.
      directory: of the file; links to runs are relative to it.
    """
    return "\n".join(
        [
            f"# Ablation {report.ablation.name}",
            "",
            report.ablation.question,
            "",
            *markdown_table(*verdicts(report)),
            "",
            interval_note(report),
            "",
            *cells_table(report, directory),
            "",
        ]
    )


def interval_note(report: Report) -> str:
    """Explains which interval each difference is shown with."""
    criteria = report.criteria
    if criteria.alone:
        return (
            "Differences are arm minus control, paired by seed; lower is better. ± is half the "
            f"{percent(1 - 2 * criteria.alpha)} interval that the findings above rest on, "
            "uncorrected, because the claim needs all of them."
        )
    compared = sum(arm.comparison is not None for arm in report.arms)
    equivalence = (
        f"or, where it says equivalent, half the {percent(1 - 2 * criteria.alpha)} interval of the "
        f"two one-sided tests that put it inside ±{criteria.margin:g} {criteria.unit}; "
        if criteria.monitoring == "fixed"
        else f"equivalent means that it lies inside ±{criteria.margin:g} {criteria.unit}; "
    )
    return (
        "Values: mean over seeds and their range. Differences are arm minus control in "
        f"{title_of(report.ablation.metric)}, paired by seed; lower is better. ± is half the "
        f"{percent(1 - criteria.alpha)} interval, {equivalence}each is the interval that the "
        f"verdict rests on, corrected for {counted(compared, 'comparison')} (Holm)."
    )


def verdicts(report: Report) -> tuple[list[str], list[list[str]]]:
    """Header and rows of the table of verdicts: a row for each arm, the control first."""
    header = ["arm", title_of(report.ablation.metric), "difference", "verdict"]
    return header, [_verdict_row(arm, report.ablation.metric) for arm in report.arms]


def values_of(arm: Arm, metric: str) -> str:
    """The metric of the finished runs of an arm."""
    return span([run.cell.value for run in arm.runs if run.cell.status == "finished"], metric)


def _verdict_row(arm: Arm, metric: str) -> list[str]:
    values = values_of(arm, metric)
    if arm.comparison is None:
        return [arm.name, values, "", "control"]
    return [arm.name, values, difference(arm.comparison), arm.comparison.verdict.text]


def cells_table(report: Report, directory: Path) -> list[str]:
    """Every cell as a row of a Markdown table; links are relative to `directory`."""
    header = ["arm", "seed", "status", title_of(report.ablation.metric), "run"]
    return markdown_table(header, (_cell_row(run, directory) for run in report.runs))


def status_of(run: CellRecord) -> str:
    """`finished`, `missing`, or `failed` with the reason."""
    return f"{run.cell.status}: {run.cell.reason}" if run.cell.reason else run.cell.status


def value_of(run: CellRecord) -> str:
    """The metric of a finished run; empty for the others."""
    return significant(run.cell.value) if run.cell.status == "finished" else ""


def _cell_row(run: CellRecord, directory: Path) -> list[str]:
    cell, address = run.cell, link(run, directory)
    named = markdown_link(cell.directory.name, address) if address else ""
    return [cell.arm, str(cell.seed), status_of(run), value_of(run), named]
