"""The page of an audit: one HTML file that needs nothing else.

It opens by module and puts targets side by side. No script, no address outside the file.

Knows reports and jinja2.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

import jinja2

from lmjax.audit.report import AuditReport, counted_verdicts, module_of
from lmjax.inspection.rows import AuditRow, AuditVerdict

MARKS = {AuditVerdict.PASS: "✓", AuditVerdict.OPAQUE: "?", AuditVerdict.FAIL: "✕"}
"""One sign a verdict, so that colour alone says nothing."""


class PageModule(NamedTuple):
    """The rows of a part of a model.

    Attributes:
      name: of the part.
      rows: in the order of the model.
    """

    name: str
    rows: Sequence[AuditRow]

    @property
    def verdict(self) -> AuditVerdict:
        """The worst of its rows."""
        return AuditVerdict.worst(row.verdict for row in self.rows)

    def verdict_for(self, target: str) -> AuditVerdict:
        """The worst of its rows on one target."""
        return AuditVerdict.worst(row.verdict_for(target) for row in self.rows)

    @property
    def words(self) -> str:
        """How many rows there are of each verdict that occurs."""
        counts = counted_verdicts(list(self.rows))
        return ", ".join(f"{count} {one.value}" for one, count in counts.items() if count)


def page(report: AuditReport, title: str) -> str:
    """The whole file."""
    return _template().render(report=report, title=title) + "\n"


def modules(rows: Sequence[AuditRow]) -> list[PageModule]:
    """Rows by module."""
    grouped = groupby(rows, key=lambda row: module_of(row.site))
    return [PageModule(name, tuple(inside)) for name, inside in grouped]


@functools.cache
def _template() -> jinja2.Template:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.globals |= {"modules": modules, "marks": MARKS}
    return environment.get_template("audit.html.jinja")
