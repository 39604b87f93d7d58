"""The page of an ablation: one HTML file that needs nothing else.

No script, no font, no address outside the file: it works from a mail attachment, and its own
content policy forbids it to load anything. It follows the reader's choice of light or dark, fits a
phone, and prints.

Knows what a `Report` holds and how to lay it out; works nothing out.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path

import numpy as np

from lmjax.ablation import pictures, svg
from lmjax.ablation.report_data import (
    Arm,
    Report,
    Run,
    counters,
    curves,
    difference_curve,
    environments,
    forest_rows,
    last,
    link,
    memory_names,
    shared_config,
    speed,
)
from lmjax.ablation.report_style import style
from lmjax.ablation.report_text import interval, p_text, size, span, title_of, written
from lmjax.ablation.verdict import Comparison, difference

MARKS = {"worse": "▲", "better": "▼", "equivalent": "=", "undecided": "?", "failed": "✕"}
"""One sign a verdict, so that colour alone says nothing."""


class Html(str):
    """Markup; any other string is text and is escaped."""


def page(report: Report, directory: Path) -> str:
    """The whole file.

    Args:
      report: what to show.
      directory: where the file will lie; links to runs are relative to it.
    """
    ablation = report.ablation
    sections = [
        _section("Verdicts", _verdicts(report)),
        _section("Differences", _forest(report), _numbers(report)),
        _section("Course", _curves(report)),
        _section("Mechanism", _mechanism(report)),
        _section("Set-up", _setup(report)),
        _section("Speed and memory", _speed(report)),
        _section("Environment", _environment(report)),
        _section("Runs", _runs(report, directory)),
    ]
    title = escape(f"Ablation {ablation.name}")
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta name="color-scheme" content="light dark">'
        '<meta http-equiv="Content-Security-Policy" '
        "content=\"default-src 'none'; style-src 'unsafe-inline'; img-src data:\">"
        f'<link rel="icon" href="data:,"><title>{title}</title><style>{style()}</style></head>'
        f'<body><main><header><p class="kind">{title}</p><h1>{escape(ablation.question)}</h1>'
        f"</header>{''.join(sections)}</main></body></html>\n"
    )


def _section(title: str, *parts: str) -> str:
    content = "".join(parts)
    return f"<section><h2>{escape(title)}</h2>{content}</section>\n" if content else ""


def _verdicts(report: Report) -> str:
    items = []
    for arm in report.arms:
        comparison = arm.comparison
        if comparison is None:
            continue
        kind, text = comparison.verdict
        items.append(
            f'<li class="{kind}"><span class="mark">{MARKS[kind]}</span><div><b>'
            f"{escape(arm.name)}</b> <small>against {escape(comparison.control)}</small>"
            f"<p>{escape(text)}</p>{_observed(comparison)}</div></li>"
        )
    criteria = report.criteria
    looks = (
        "Seeds were added until each question was settled; the intervals hold at every number of "
        "seeds at once (anytime-valid t, Wang and Ramdas 2023)."
        if criteria.monitoring == "anytime"
        else "The number of seeds was fixed beforehand (paired t)."
    )
    return f'<ul class="verdicts">{"".join(items)}</ul>' + _note(
        f"Arm minus control in {title_of(report.ablation.metric)}, paired by seed; lower is "
        f"better. ± is half the {100 * (1 - criteria.alpha):g}% interval, corrected for "
        f"{len(items)} comparison{'s' if len(items) != 1 else ''} (Holm). Equivalent: two "
        f"one-sided tests at {100 * criteria.alpha:g}% put the difference inside "
        f"±{criteria.margin:g} {criteria.unit}. {looks}"
    )


def _observed(comparison: Comparison) -> str:
    """The difference so far, where the verdict does not say it."""
    n = comparison.estimate.n
    if not n or comparison.verdict.kind in ("worse", "better", "failed"):
        return ""
    return f"<small>{escape(difference(comparison))} ({n} seed{'s' if n > 1 else ''})</small>"


def _forest(report: Report) -> str:
    rows = forest_rows(report.arms)
    criteria = report.criteria
    chart = pictures.forest("Difference to the control", rows, criteria.margin, criteria.unit)
    inner = 1 - criteria.alpha * (2 if criteria.monitoring == "fixed" else 1)
    return f'<figure class="single">{chart}</figure>' + _note(
        f"Diamond: mean. Thin line: {100 * (1 - criteria.alpha):g}% interval. Thick line: "
        f"{100 * inner:g}% interval, corrected alike, which has to lie inside the shaded "
        "margin for equivalence. Dots: single seeds."
    )


def _numbers(report: Report) -> str:
    rows = []
    for arm in report.arms:
        c = arm.comparison
        values = [run.cell.value for run in arm.runs if run.cell.status == "finished"]
        metric = written(float(np.mean(values))) if values else ""
        if c is None:
            rows.append([_named(arm), metric, "control", *[""] * 6])
        else:
            rows.append([_named(arm), metric, str(c.estimate.n), *_statistics(c)])
    header = [
        "arm",
        title_of(report.ablation.metric),
        "pairs",
        "difference",
        "interval",
        "bootstrap (BCa)",
        "p, different",
        "p, equivalent",
        "detectable",
    ]
    return _table(header, rows, numeric=True) + _note(
        "The bootstrap interval is uncorrected and too short for few seeds; it is here to show "
        "where the t interval leans on normality. Detectable: the smallest difference that so "
        "many seeds with this spread find 80% of the time."
    )


def _statistics(c: Comparison) -> list[str]:
    return [
        difference(c),
        interval(c.interval),
        interval(c.bootstrap),
        p_text(c.p) if c.estimate.n > 1 else "",
        p_text(c.equivalence_p) if c.estimate.n > 1 else "",
        size(c.smallest_detectable),
    ]


def _curves(report: Report) -> str:
    charts = []
    for name, title in (
        ("loss", "Training loss (nats per token)"),
        ("eval_loss", "Held-out loss (nats per token)"),
    ):
        series = curves(report.arms, name)
        # One evaluation, at the end, is no curve.
        if series and max(s.x.size for s in series) > 2:
            y_range = pictures.robust_range(series)
            charts.append(pictures.line_chart(title, series, y_range=y_range))
    learning = _figures(charts) + _note(
        "Mean over seeds; the band spans the seeds. Logged steps are averaged in up to 60 parts of "
        "the run. A cross marks where an arm's values stopped being finite."
    )
    return (learning if charts else "") + _difference_curves(report)


def _difference_curves(report: Report) -> str:
    by_name = {arm.name: arm for arm in report.arms}
    margin = report.criteria.margin
    charts = []
    for arm in report.arms:
        if arm.control is None:
            continue
        series = difference_curve(arm, by_name[arm.control], "loss")
        if series is None or series.x.size < 3:
            continue
        charts.append(
            pictures.line_chart(
                f"{arm.name} minus {arm.control}",
                [series],
                y_range=pictures.difference_range(series, margin),
                height=170,
                margin=margin,
                labels=False,
            )
        )
    if not charts:
        return ""
    return f"<h3>Differences in training loss</h3>{_figures(charts)}" + _note(
        "Paired by seed and step: both arms saw the same batch. The band is the 95% t interval at "
        "each step on its own; the shaded margin is the one of the verdict. Scales differ."
    )


def _mechanism(report: Report) -> str:
    names = counters(report)
    if not names:
        return ""
    rows = [
        [_named(arm), *(span([last(run, name) for run in arm.runs], name) for name in names)]
        for arm in report.arms
    ]
    charts = []
    for name in names:
        series = curves(report.arms, name)
        moving = [s for s in series if pictures.moves(s)]
        if not moving or max(s.x.size for s in series) < 3:
            continue
        powers = name == "loss_scale"
        shown = [pictures.binary_logarithm(s) for s in series] if powers else series
        charts.append(
            pictures.line_chart(
                title_of(name),
                shown,
                y_range=pictures.full_range(shown),
                powers_of_two=powers,
            )
        )
    return (
        _table(["arm", *map(title_of, names)], rows, numeric=True)
        + _note("At the last logged step: mean over seeds, and their range where they differ.")
        + (_figures(charts) if charts else "")
    )


def _setup(report: Report) -> str:
    rows = []
    for arm in report.arms:
        against = arm.control or report.ablation.control
        for field, (theirs, mine) in arm.changes.items():
            rows.append([_named(arm), field, _code(mine), _code(theirs), against])
        if not arm.changes:
            text = "the control" if arm.control is None else f"the same config as {against}"
            rows.append([_named(arm), text, "", "", ""])
    seeds = ", ".join(map(str, sorted({run.cell.seed for run in report.runs})))
    return (
        _table(["arm", "field", "value", "control's value", "control"], rows)
        + _note(f"Computed from the configs. Seeds: {seeds}; each is the same in every arm.")
        + "<details><summary>What all arms have in common</summary>"
        + _list(shared_config(report))
        + "</details>"
    )


def _speed(report: Report) -> str:
    names = memory_names(report)
    rows = [
        [
            _named(arm),
            span([round(speed(run)) if run.rows else float("nan") for run in arm.runs]),
            span([round(last(run, "train_seconds"), 1) for run in arm.runs]),
            *(span([last(run, name) for run in arm.runs], name) for name in names),
        ]
        for arm in report.arms
    ]
    if not any(any(row[1:]) for row in rows):
        return ""
    header = ["arm", "tokens per second", "training seconds", *map(title_of, names)]
    return _table(header, rows, numeric=True) + _note(
        "Median over the logged steps, then mean and range over seeds. Runs may have shared their "
        "machine: these are records, not a benchmark."
    )


def _environment(report: Report) -> str:
    found = environments(report)
    differing = [name for name, texts in found.items() if len(texts) > 1]
    warning = (
        f'<p class="warning">The runs differ in {escape(", ".join(differing))}.</p>'
        if differing
        else ""
    )
    return warning + _list({name: " or ".join(texts) for name, texts in found.items()})


def _runs(report: Report, directory: Path) -> str:
    rows = [
        [
            _named(arm),
            str(run.cell.seed),
            f"{run.cell.status}: {run.cell.reason}" if run.cell.reason else run.cell.status,
            f"{run.cell.value}" if run.cell.status == "finished" else "",
            _links(run, directory),
        ]
        for arm in report.arms
        for run in arm.runs
    ]
    return _table(["arm", "seed", "status", title_of(report.ablation.metric), "files"], rows)


def _links(run: Run, directory: Path) -> Html:
    names = ("", "config.json", "metrics.jsonl", "result.json")
    found = [(name or run.cell.directory.name, link(run, directory, name)) for name in names]
    return Html(
        " ".join(f'<a href="{address}">{escape(name)}</a>' for name, address in found if address)
    )


def _named(arm: Arm) -> Html:
    swatch = f'<i class="swatch {svg.color_classes(arm.color, "fill")}"></i>'
    return Html(f"{swatch}{escape(arm.name)}")


def _code(value: object) -> Html:
    text = value if isinstance(value, str) else json.dumps(value)
    return Html(f"<code>{escape(text)}</code>")


def _note(text: str) -> str:
    return f'<p class="note">{escape(text)}</p>'


def _figures(charts: Iterable[str]) -> str:
    return (
        '<div class="figures">'
        + "".join(f"<figure>{chart}</figure>" for chart in charts)
        + "</div>"
    )


def _list(fields: Mapping[str, str]) -> str:
    """Names and values in as many columns as fit."""
    items = "".join(f"<li>{escape(name)} {_code(value)}</li>" for name, value in fields.items())
    return f'<ul class="columns">{items}</ul>' if items else ""


def _table(header: Sequence[str], rows: Iterable[Sequence[str]], numeric: bool = False) -> str:
    """A table that scrolls by itself where it is wider than the screen."""
    head = "".join(f"<th>{_content(cell)}</th>" for cell in header)
    body = "".join(
        "<tr>" + "".join(f"<td>{_content(cell)}</td>" for cell in row) + "</tr>" for row in rows
    )
    kind = ' class="numeric"' if numeric else ""
    return (
        f'<div class="scroll" tabindex="0"><table{kind}><thead><tr>{head}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )


def _content(cell: str) -> str:
    return cell if isinstance(cell, Html) else escape(cell)
