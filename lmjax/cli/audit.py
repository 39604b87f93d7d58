"""Prints an audit: `python -m lmjax audit experiments.NAME`.

Knows `lmjax.audit`, flags and how tables are printed.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import groupby
from pathlib import Path
from typing import Annotated

import jax

from lmjax.audit import audit as audited
from lmjax.audit.report import AuditReport, counted_verdicts, module_of
from lmjax.checks import at_least
from lmjax.cli.common import (
    DONE,
    FAILED,
    Experiment,
    Repeated,
    UserPath,
    bad_input,
    load_experiment,
    print_json,
    written,
)
from lmjax.cli.plan import MeshSizes, ModelChanges, changed
from lmjax.console.tables import Column, print_sentences, print_table
from lmjax.console.wording import counted
from lmjax.errors import InputError
from lmjax.inspection.inspection import ATTENTION, Inspection
from lmjax.inspection.rows import AuditRow, AuditVerdict
from lmjax.train import read_config

WORDS = {AuditVerdict.PASS: "pass", AuditVerdict.OPAQUE: "opaque", AuditVerdict.FAIL: "FAIL"}


def audit(
    experiment: Experiment,
    /,
    precision: str | None = None,
    program: Repeated = (),
    target: Repeated = (),
    mesh: MeshSizes = MeshSizes(),  # noqa: B008
    devices: Annotated[int, at_least(1)] | None = None,
    module: str = "",
    rows: bool = False,
    html: UserPath | None = None,
    json: bool = False,
) -> int:
    """Compares what a policy asks with what is traced and what is compiled, site by site.

    Nothing is trained. Exits with 0 if nothing fails, 1 if something does.

    Args:
      experiment: Module, such as experiments.quickstart, or a run directory.
      precision: Policy, if not its own.
      program: Which of train, evaluate and decode, if not all; may be repeated.
      target: Chips to trace and compile the train step for as well, such as h100:8 or
        tpu-v5p:2x2x1; may be repeated.
      mesh: Sizes of the device mesh, if not the experiment's own; -1 takes the rest.
      devices: Number of CPU devices to compile for, if not those of this machine.
      module: Show the rows of one module of the table, such as blocks/0-3/mlp.
      rows: Show the rows of every module.
      html: Write a page with all rows, which opens by module.
      json: Print JSON.
    """
    folder = Path(experiment)
    own = read_config(folder) if folder.is_dir() else load_experiment(experiment)
    config = bad_input(changed, own, ModelChanges(), mesh, precision=precision)
    if devices is not None:
        _simulate(devices)
    programs = tuple(dict.fromkeys(program))
    report = bad_input(audited, config, programs=programs, targets=target)
    if html is not None:
        from lmjax.audit.page import page

        with written(html):
            html.write_text(page(report, experiment), "utf-8")
    if json:
        print_json(report.to_json())
    else:
        _refuse_unknown(report, module)
        show_audit(report, module, everything=rows)
    return FAILED if report.verdict is AuditVerdict.FAIL else DONE


def _simulate(devices: int) -> None:
    """Has JAX make that many CPU devices, which works before it has made any."""
    if devices != 1:
        jax.config.update("jax_num_cpu_devices", devices)
    if jax.device_count() != devices:
        raise InputError(
            f"--devices {devices}, but JAX has {jax.device_count()} of {jax.default_backend()}; "
            "only CPU devices can be simulated: set JAX_PLATFORMS=cpu"
        )


def _refuse_unknown(report: AuditReport, module: str) -> None:
    known = dict.fromkeys(module_of(row.site) for one in report.inspections for row in one.rows)
    if module and module not in known:
        raise InputError(f"no module {module!r}; the modules are {', '.join(known)}")


def show_audit(report: AuditReport, module: str, *, everything: bool) -> None:
    """Prints an audit: folded by module, or the rows of one module, or all of them."""
    for one in report.inspections:
        rows = [row for row in one.rows if module_of(row.site) == module or not module]
        print(f"{one.name}: {WORDS[one.verdict]}")
        for row in rows:
            if row.tensor == ATTENTION:
                print_sentences([f"{module_of(row.site)}: {row.traced}"])
        if everything or module:
            _print_rows(rows, one.targets)
        else:
            _print_folded(rows, one.targets)
        _print_findings(rows)
        _print_shares(one)
        print()
    if report.untrained:
        print_sentences([f"train: not audited: {report.untrained}"])
    failed = len(report.failures)
    say = f"{counted(failed, 'finding')} failed" if failed else "nothing failed"
    where = ", ".join(report.targets)
    print_sentences([f"{WORDS[report.verdict]}: {report.precision} on {where}; {say}"])


def _print_folded(rows: Sequence[AuditRow], targets: Sequence[str]) -> None:
    """One row a module: how many rows it has of each verdict, or what is worst on each target."""
    several = targets if len(targets) > 1 else ()
    columns = (
        Column("module", "key"),
        Column("rows", "number"),
        *(Column(word, "number") for word in WORDS.values() if not several),
        *(Column(target) for target in several),
        Column("asked", "text"),
    )
    cells = []
    for module, inside in groupby(rows, key=lambda row: module_of(row.site)):
        own = list(inside)
        counts = counted_verdicts(own)
        asked = dict.fromkeys(row.asked for row in own if row.tensor in _TELLING and row.asked)
        shown = [str(counts[verdict] or "") for verdict in WORDS if not several]
        shown += [_worst(own, target) for target in several]
        cells.append((module, str(len(own)), *shown, "; ".join(asked)))
    print_table(columns, cells, each="module")


def _worst(rows: Sequence[AuditRow], target: str) -> str:
    """The worst verdict of rows on a target, and of how many of them."""
    verdicts = [row.verdict_for(target) for row in rows]
    worst = AuditVerdict.worst(verdicts)
    count = verdicts.count(worst)
    return WORDS[worst] if worst is AuditVerdict.PASS else f"{count} {WORDS[worst]}"


_TELLING = ("y", "arithmetic", "parameters", "elements")
"""Tensors whose formats say most about a module."""


def _print_rows(rows: Iterable[AuditRow], targets: Sequence[str]) -> None:
    columns = (
        Column("site", "key"),
        Column("pass"),
        Column("tensor"),
        Column("verdict"),
        *(Column(title, "text") for title in ("asked", "traced", *targets)),
    )
    cells = [
        (
            row.site, row.direction, row.tensor, WORDS[row.verdict], row.asked, row.traced,
            *(row.compiled.get(target, "") for target in targets),
        )
        for row in rows
    ]  # fmt: skip
    print_table(columns, cells)


def _print_findings(rows: Iterable[AuditRow]) -> None:
    """Failures first, each with its row; remarks that say the same as one."""
    columns = Column("finding", "key"), Column("where"), Column("in"), Column("what", "text")
    order = list(reversed(AuditVerdict))
    said: dict[tuple[int, str, str, str], list[tuple[str, str]]] = {}
    for row in rows:
        where = " ".join(filter(None, (row.site, row.direction, row.tensor)))
        for one in row.findings:
            apart = where if one.verdict is AuditVerdict.FAIL else ""
            key = order.index(one.verdict), one.kind, one.text, apart
            said.setdefault(key, []).append((where, one.column))
    cells = [
        (f"{WORDS[order[rank]]} {kind}".removeprefix("pass "), *_places(seen), text)
        for (rank, kind, text, _), seen in sorted(said.items(), key=lambda item: item[0][0])
    ]
    if cells:
        print_table(columns, cells, each="finding")


def _places(seen: Sequence[tuple[str, str]]) -> tuple[str, str]:
    """The first of several rows and the number of others, and all columns."""
    first, *others = dict.fromkeys(where for where, _ in seen)
    columns = ", ".join(dict.fromkeys(column for _, column in seen))
    return (f"{first} and {len(others)} more" if others else first), columns


def _print_shares(one: Inspection) -> None:
    for target, share in one.shares.items():
        text = f"{share.attributed:.3%} of {share.total:.4g} floating-point operations on {target}"
        print_sentences([f"{text} belong to a site or a part of the step"])
        for name, source, flops in share.rest:
            print(f"    {name}: {flops:.4g} for {source or 'nothing that it names'}")
