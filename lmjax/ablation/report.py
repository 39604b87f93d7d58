"""An ablation's run directories to one HTML page and one Markdown table; nothing is trained.

The same files give the same page, byte for byte.

report_data.py   what the report says, worked out from the files of the runs
report_text.py   how it writes numbers; the Markdown table
report_html.py   the page
pictures.py      its charts
"""

from __future__ import annotations

import html
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from lmjax.ablation.report_data import gather
from lmjax.ablation.report_html import page
from lmjax.ablation.report_text import markdown
from lmjax.ablation.statistics import Monitoring
from lmjax.train.metrics import replace_text

if TYPE_CHECKING:
    from lmjax.ablation.grid import Ablation, Cell


def write_report(
    ablation: Ablation,
    cells: Iterable[Cell],
    directory: str | Path,
    *,
    monitoring: Monitoring = "fixed",
) -> Path:
    """Writes `report.html` and `report.md` and returns the path of the page.

    Args:
      ablation: what was asked.
      cells: of any status; their directories are read and nothing in them is changed.
      directory: where the two files go; it is made if it is not there. Links to run directories
        are relative to it.
      monitoring: `anytime` where seeds are added until the question is settled.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    report = gather(ablation, list(cells), monitoring)
    replace_text(directory / "report.md", markdown(report, directory))
    path = directory / "report.html"
    replace_text(path, page(report, directory))
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
        # The page stands in the output itself, so it shows wherever the notebook is opened.
        text = html.escape(self.page.read_text(encoding="utf-8"), quote=True)
        style = f"width: 100%; height: {self.height}px; border: 0"
        return f'<iframe srcdoc="{text}" style="{style}"></iframe>'
