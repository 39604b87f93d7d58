"""The page of an ablation: one HTML file that needs nothing else.

No script, no font, no address outside the file: it works from a mail attachment, and its own
content policy forbids it to load anything. The layout is `report.html.jinja`, which escapes
whatever it is given; this file puts the contents of its tables and pictures into words.

Knows what a `Report` and an `Account` hold, jinja2 and `pictures_plot.py`.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
from markupsafe import Markup

from lmjax import strict_json
from lmjax.ablation.account import REASONING, Account
from lmjax.ablation.curves import Series, curves, difference_curve, last, moves, typical
from lmjax.ablation.report_data import (
    Arm,
    Report,
    counters,
    environments,
    forest_rows,
    link,
    memory_names,
    shared_config,
    state_bytes,
)
from lmjax.ablation.report_text import interval_note, status_of, value_of, values_of
from lmjax.ablation.setting import what_was_run
from lmjax.ablation.verdict import Comparison, difference
from lmjax.ablation.words import ends, p_text, size, span, title_of, written

MARKS = {
    **{"worse": "▲", "better": "▼", "equivalent": "=", "undecided": "?", "failed": "✕"},
    **{"confirmed": "✓", "refuted": "✕"},
}
"""One sign a verdict or outcome, so that colour alone says nothing."""


class TableCell(NamedTuple):
    """A cell of a table: text, marked as code, behind the key of an arm, or links."""

    text: str = ""
    code: bool = False
    arm: int | None = None
    links: Sequence[tuple[str, str]] = ()


TableRow = Sequence[TableCell | str]


class Table(NamedTuple):
    """A header and rows; a string is the text of a cell."""

    header: Sequence[str]
    rows: Sequence[TableRow]
    numeric: bool = False


class Chart(NamedTuple):
    """A picture and its title."""

    title: str
    svg: Markup


def page(report: Report | None, directory: Path, account: Account | None = None) -> str:
    """The whole file.

    Args:
      report: what to show of an ablation; None for a claim of arithmetic.
      directory: where the file will lie; links to runs are relative to it.
      account: of the claim that the ablation is run for.
    """
    context: dict[str, Any] = {"account": account, "marks": MARKS, "report": report}
    if account is not None:
        title = f"Claim {account.number} {account.name}"
        context |= {"title": title, "question": account.title, "reasoning": REASONING}
        context["paper"] = Table(("as published", "result", "here"), account.paper_rows())
        context["ran"] = account.ran
    if report is not None:
        if account is None:
            title, question = f"Ablation {report.ablation.name}", report.ablation.question
            context |= {"title": title, "question": question}
            there = (run.environment for run in report.runs)
            context["ran"] = what_was_run(report.ablation, there)
        context |= _sections(report, directory)
    return _template().render(context) + "\n"


@functools.cache
def _template() -> jinja2.Template:
    from lmjax.ablation import pictures_plot

    loader = jinja2.FileSystemLoader(Path(__file__).parent)
    environment = jinja2.Environment(
        loader=loader,
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.globals |= {"look": pictures_plot.look, "as_cell": as_cell}
    return environment.get_template("report.html.jinja")


def as_cell(content: TableCell | str) -> TableCell:
    """A cell, also from its text alone."""
    return content if isinstance(content, TableCell) else TableCell(content)


def _sections(report: Report, directory: Path) -> dict[str, Any]:
    found = environments(report)
    compared = [arm for arm in report.arms if arm.comparison is not None]
    return {
        "arms": report.arms,
        "compared": compared,
        "observed": {arm.name: _observed(arm.comparison) for arm in compared if arm.comparison},
        "interval_note": interval_note(report),
        "anytime": report.criteria.monitoring == "anytime",
        "alone": report.criteria.alone,
        "forest": _forest(report) if compared else None,
        "numbers": _numbers(report),
        "learning": _learning(report),
        "apart": _difference_charts(report),
        "mechanism": _mechanism(report),
        "mechanism_charts": _mechanism_charts(report),
        "setup": _setup(report),
        "seeds": sorted({run.cell.seed for run in report.runs}),
        "shared": shared_config(report),
        "speed": _speed(report),
        "differing": [name for name, texts in found.items() if len(texts) > 1],
        "environment": {name: " or ".join(texts) for name, texts in found.items()},
        "runs": _runs(report, directory),
    }


def _observed(comparison: Comparison) -> str:
    """The difference so far, where the verdict does not say it."""
    if comparison.verdict.kind in ("worse", "better", "failed"):
        return ""
    return difference(comparison)


def _named(arm: Arm) -> TableCell:
    return TableCell(arm.name, arm=arm.color)


def _forest(report: Report) -> Markup:
    from lmjax.ablation.pictures_plot import forest

    name, criteria = "Difference to the control", report.criteria
    return Markup(forest(name, forest_rows(report.arms), criteria.margin, criteria.unit))


def _numbers(report: Report) -> Table:
    alone = report.criteria.alone
    header = ["arm", title_of(report.ablation.metric), "pairs", "difference", "interval"]
    header += [] if alone else ["bootstrap (BCa)", "p, different", "p, equivalent"]
    rows: list[TableRow] = []
    for arm in report.arms:
        c, first = arm.comparison, (_named(arm), values_of(arm, report.ablation.metric))
        if c is None:
            rows.append([*first, "control", *[""] * (len(header) - 2)])
            continue
        p = [p_text(c.p), p_text(c.equivalence_p)] if c.estimate.n > 1 else ["", ""]
        tests = [] if alone else [ends(*c.bootstrap), *p]
        shown = [str(c.estimate.n), difference(c), ends(*c.decisive), *tests]
        rows.append([*first, *shown, size(c.smallest_detectable)])
    return Table([*header, "smallest detectable"], rows, numeric=True)


def _chart(title: str, series: Sequence[Series], **options: Any) -> Chart:
    from lmjax.ablation.pictures_plot import line_chart

    return Chart(title, Markup(line_chart(title, series, **options)))


def _learning(report: Report) -> list[Chart]:
    from lmjax.ablation.pictures_plot import robust_range

    charts = []
    for name, title in (
        ("loss", "Training loss (nats per token)"),
        ("eval_loss", "Held-out loss (nats per token)"),
    ):
        series = curves(report.arms, name)
        # One evaluation, at the end, is not a curve.
        if series and max(s.x.size for s in series) > 2:
            charts.append(_chart(title, series, y_range=robust_range(series)))
    return charts


def _difference_charts(report: Report) -> list[Chart]:
    from lmjax.ablation.pictures_plot import difference_range

    by_name, margin = {arm.name: arm for arm in report.arms}, report.criteria.margin
    charts = []
    for arm in report.arms:
        if arm.control is None:
            continue
        series = difference_curve(arm, by_name[arm.control], "loss")
        if series is not None and series.x.size > 2:
            y_range = difference_range(series, margin)
            title = f"{arm.name} minus {arm.control}"
            charts.append(_chart(title, [series], y_range=y_range, height=165, margin=margin))
    return charts


def _mechanism(report: Report) -> Table | None:
    names = counters(report)
    rows: list[TableRow] = [
        [_named(arm), *(span([last(run, name) for run in arm.runs], name) for name in names)]
        for arm in report.arms
    ]
    return Table(["arm", *map(title_of, names)], rows, numeric=True) if names else None


def _mechanism_charts(report: Report) -> list[Chart]:
    charts = []
    for name in counters(report):
        series = curves(report.arms, name)
        if any(map(moves, series)) and max(s.x.size for s in series) > 2:
            charts.append(_chart(title_of(name), series, base_two=name == "loss_scale"))
    return charts


def _setup(report: Report) -> Table:
    code = lambda value: TableCell(
        value if isinstance(value, str) else strict_json.dumps(value), code=True
    )
    rows: list[TableRow] = []
    for arm in report.arms:
        against = arm.control or report.ablation.control
        for field, (theirs, mine) in arm.changes.items():
            rows.append([_named(arm), field, code(mine), code(theirs), against])
        if not arm.changes:
            text = "the control" if arm.control is None else f"the same config as {against}"
            rows.append([_named(arm), text, "", "", ""])
    return Table(["arm", "field", "value", "control's value", "control"], rows)


def _speed(report: Report) -> Table:
    names = memory_names(report)
    measured = any("mfu" in row for run in report.runs for row in run.rows)
    rows: list[TableRow] = [
        [
            _named(arm),
            span([typical(run, "tokens_per_second") for run in arm.runs]),
            *([span([typical(run, "mfu") for run in arm.runs], "share")] if measured else []),
            span([last(run, "train_seconds") for run in arm.runs]),
            written(float(state_bytes(report, arm)), "bytes"),
            *(span([last(run, name) for run in arm.runs], name) for name in names),
        ]
        for arm in report.arms
    ]
    header = ["arm", "tokens per second", *["of the peak FLOP/s"] * measured]
    header += ["training seconds", "state in memory"]
    return Table([*header, *map(title_of, names)], rows, numeric=True)


def _runs(report: Report, directory: Path) -> Table:
    def links(run: Any) -> Iterable[tuple[str, str]]:
        for name in ("", "config.json", "metrics.jsonl", "result.json"):
            if address := link(run, directory, name):
                yield name or run.cell.directory.name, address

    rows: list[TableRow] = [
        [
            _named(arm),
            str(run.cell.seed),
            status_of(run),
            value_of(run),
            TableCell(links=tuple(links(run))),
        ]
        for arm in report.arms
        for run in arm.runs
    ]
    return Table(["arm", "seed", "status", title_of(report.ablation.metric), "files"], rows)
