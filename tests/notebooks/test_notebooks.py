"""Every notebook runs from a clean kernel, in an empty folder, and shows a picture or a page."""

from __future__ import annotations

from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient
from run_helpers import ROOT, home

__all__ = ["home"]

NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
LONG = {"ablation"}  # nine runs in processes of their own
SHORTER = {
    "quickstart.config(), steps=40": """quickstart.config(), steps=4, batch_size=4,
        model=replace(quickstart.config().model, width=32, layers=1, heads=2, unroll=1)""",
}
"""What is replaced in the code before it runs here: steps and sizes show nothing to a test."""


def test_the_notebooks_are_found() -> None:
    assert [path.stem for path in NOTEBOOKS] == ["ablation", "quickstart"]


@pytest.mark.parametrize(
    "path",
    [
        pytest.param(path, id=path.stem, marks=pytest.mark.long if path.stem in LONG else ())
        for path in NOTEBOOKS
    ],
)
def test_the_notebook_runs(
    path: Path, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("XLA_FLAGS", "--xla_backend_optimization_level=0")
    notebook = nbformat.read(path, as_version=4)
    for cell in notebook.cells:
        for text, shorter in SHORTER.items():
            cell.source = cell.source.replace(text, shorter)
    client = NotebookClient(
        notebook,
        timeout=600,
        kernel_name="python3",
        resources={"metadata": {"path": str(tmp_path)}},
    )
    client.execute()  # raises the error of a cell
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    assert not [output for output in outputs if output.output_type == "error"]
    shown = [output.get("data", {}) for output in outputs]
    assert any("image/png" in data or "<iframe" in data.get("text/html", "") for data in shown)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_the_notebook_is_stored_without_outputs(path: Path) -> None:
    """Outputs would grow stale, and carry what one machine printed into the repository."""
    cells = [cell for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]
    assert not [cell for cell in cells if cell.outputs or cell.execution_count]
