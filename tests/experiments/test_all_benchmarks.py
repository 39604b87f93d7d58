"""The page of all benchmarks says what was measured, and what a machine lacks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from experiments.benchmarks import __main__ as everything

THROUGHPUT: dict[str, Any] = {
    "shape": {"name": "S"},
    "peaks": {"float32": 2.0e11},
    "ratios": {"lmjax f32 / jnp f32": {"median": 1.25, "low": 1.1, "high": 1.4}},
}

DECODING: dict[str, Any] = {
    "tokens_per_second": {"lmjax f32, 1": [50.0, 70.0, 60.0]},
    "ratios": {"lmjax f32, 1 / transformers f32, 1": {"median": 2.4, "low": 2.2, "high": 2.6}},
}


def test_results_and_what_is_missing_are_on_one_page(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    def measured(command: list[str]) -> tuple[dict[str, Any] | None, str]:
        if command[0].endswith("throughput"):
            return THROUGHPUT, "left out: torch f32: No module named 'torch'"
        if command[0].endswith("decoding"):
            return DECODING, ""
        return (None, "exit 1") if command[0].endswith("fixed_order") else ({"seconds": 3.25}, "")

    monkeypatch.setattr(everything, "measured", measured)
    assert everything.main(["--out", str(tmp_path), "--shapes", "S", "--rounds", "2"]) == 1
    page = (tmp_path / "index.md").read_text()
    assert "## python -m experiments.benchmarks.throughput --shape S --rounds 2" in page
    assert "| ratios, lmjax f32 / jnp f32 | 1.25 (1.1 to 1.4) |" in page
    assert "- left out: torch f32: No module named 'torch'" in page
    assert "| seconds | 3.25 |" in page
    assert "| tokens_per_second, lmjax f32, 1, median | 60 |" in page
    assert "| ratios, lmjax f32, 1 / transformers f32, 1 | 2.4 (2.2 to 2.6) |" in page
    assert "- exit 1" in page
    assert (tmp_path / "ratios.png").stat().st_size > 1000
    assert str(tmp_path / "index.md") in capsys.readouterr().out
