"""Writes the report of an ablation, one HTML page and one Markdown file, from its run directories.

Trains nothing. The same files give the same page, byte for byte.

report_data.py    what the report says, worked out from the files of the runs
curves.py         metrics over steps
setting.py        what was run
account.py        the claim that it was run for
report_text.py    the Markdown
report_page.py    the page, with report.html.jinja for its layout
pictures_plot.py  its charts
"""

from __future__ import annotations

import html
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from lmjax.ablation.report_data import gather
from lmjax.ablation.report_page import page
from lmjax.ablation.report_text import cells_table, markdown
from lmjax.ablation.statistics import Monitoring
from lmjax.runs.metrics import replace_text

if TYPE_CHECKING:
    from lmjax.ablation.account import Account
    from lmjax.ablation.grid import Ablation, Cell

PAGE = "report.html"


def write_report(
    ablation: Ablation | None,
    cells: Iterable[Cell],
    out: str | Path,
    *,
    monitoring: Monitoring = "fixed",
    account: Account | None = None,
) -> Path:
    """Writes a page and its summary as Markdown; returns the path of the page.

    Args:
      ablation: the question and its arms; None for a claim that trains nothing.
      cells: of any status; their directories are only read.
      out: a directory for `report.html` and `report.md`, or the page itself (`*.html`), with the
        Markdown written next to it. Missing directories are created. Links to runs are relative.
      monitoring: `anytime` where seeds are added until the question is settled.
      account: of the claim that the ablation serves; the report is then about the claim.
    """
    out = Path(out)
    path = out if out.suffix == ".html" else out / PAGE
    path.parent.mkdir(parents=True, exist_ok=True)
    report = None
    if ablation is not None:
        report = gather(ablation, list(cells), monitoring, alone=account is not None)
    lines = [] if account is None else [account.markdown()]
    if report is not None:
        whole = account is None
        lines += [markdown(report, path.parent)] if whole else cells_table(report, path.parent)
    replace_text(path.with_suffix(".md"), "\n".join(lines).rstrip() + "\n")
    replace_text(path, page(report, path.parent, account))
    return path


@dataclass(frozen=True)
class Inline:
    """A report's page as the output of a notebook cell.

    Attributes:
      page: what `write_report` returned.
      height: of the frame, in pixels; the page scrolls in it.
    """

    page: Path
    height: int = 900

    def _repr_html_(self) -> str:
        # The output contains the page itself, so the notebook shows it on any machine.
        text = html.escape(self.page.read_text(encoding="utf-8"), quote=True)
        style = f"width: 100%; height: {self.height}px; border: 0"
        return f'<iframe srcdoc="{text}" style="{style}"></iframe>'
