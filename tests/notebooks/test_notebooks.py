"""Every notebook runs from a clean kernel, in an empty folder, and says what its runs recorded.

Text that is written before a run cannot know its numbers. So text states none; cells print them,
and the tests below compare what was printed with the files of the runs, and check that the runs
show what the text explains.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient
from run_helpers import ROOT, home

from lmjax.runs.metrics import read_rows

__all__ = ["home"]

NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
LONG = {"ablation", "numerics"}  # nine runs in processes of their own; a dozen programs
SHORTER = {
    "quickstart": {
        "steps=60,": """steps=16, batch_size=4, context=32,
            model={"width": 32, "layers": 2, "heads": 2, "unroll": 1},""",
        '"warmup_steps": 15': '"warmup_steps": 3',
        '"growth_interval": 15': '"growth_interval": 5',
        '"every": 20': '"every": 16',
    },
    "ablation": {
        "steps=60,": """steps=6, batch_size=4,
            model={"width": 32, "layers": 1, "heads": 2, "unroll": 1},""",
        '"warmup_steps": 10': '"warmup_steps": 2',
    },
    "numerics": {
        "batch_size=8,": "batch_size=4,",
        "context=64,": "context=32,",
        '"width": 64': '"width": 32',
    },
}
"""By notebook, what is replaced in its code before it runs here: lengths and sizes."""


def test_the_notebooks_are_found() -> None:
    assert [path.stem for path in NOTEBOOKS] == ["ablation", "numerics", "quickstart"]


@pytest.mark.parametrize(
    "path",
    [
        pytest.param(path, id=path.stem, marks=pytest.mark.long if path.stem in LONG else ())
        for path in NOTEBOOKS
    ],
)
def test_the_notebook_runs_and_tells_the_truth(
    path: Path, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("XLA_FLAGS", "--xla_backend_optimization_level=0")
    notebook = nbformat.read(path, as_version=4)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    for text, shorter in SHORTER[path.stem].items():
        assert sum(cell.source.count(text) for cell in code) == 1, text
        for cell in code:
            cell.source = cell.source.replace(text, shorter)
    client = NotebookClient(
        notebook,
        timeout=600,
        kernel_name="python3",
        resources={"metadata": {"path": str(tmp_path)}},
    )
    client.execute()  # raises the error of a cell
    outputs = [output for cell in code for output in cell.outputs]
    assert not [output for output in outputs if output.output_type == "error"]
    shown = [output.get("data", {}) for output in outputs]
    assert any("image/png" in data or "<iframe" in data.get("text/html", "") for data in shown)
    FACTS[path.stem](tmp_path / "runs", "".join(output.get("text", "") for output in outputs))


def quickstart_facts(runs: Path, printed: str) -> None:
    """The run in f16 skips, recovers and passes its warm-up; pure bf16 loses updates."""
    folders = {name: runs / "notebook" / name for name in ("f32", "f16", "pure_bf16")}
    configs = {name: read(folder / "config.json") for name, folder in folders.items()}
    rows = {
        name: [row for row in read_rows(folder / "metrics.jsonl") if "loss" in row]
        for name, folder in folders.items()
    }
    config, f16 = configs["f16"], rows["f16"]
    for name, other in configs.items():
        same = {"precision": config["precision"], "loss_scale": config["loss_scale"]}
        assert {**other, **same} == config, name  # the kind of loss scale follows from the policy
        assert rows[name][0]["loss"] == pytest.approx(f16[0]["loss"], rel=2**-8), name

    totals = [0] + [row["skipped_steps"] for row in f16]
    skipped = [step for step in range(1, len(totals)) if totals[step] > totals[step - 1]]
    assert skipped, "the text explains skipped steps; let the first loss scale overflow"
    listed = ", ".join(map(str, skipped))
    assert f"skipped {len(skipped)} of {config['steps']} steps: {listed}\n" in printed
    scales = [row["loss_scale"] for row in f16]
    changes = {after / before for before, after in pairwise(scales)}
    assert changes == {0.5, 1, 2}, "the text says that the scale is halved and doubled"
    assert all(scales[step] == scales[step - 1] / 2 for step in skipped if step < len(scales))
    assert (
        f"loss scale: first {scales[0]:g}, lowest {min(scales):g}, last {scales[-1]:g}\n" in printed
    )
    rates = [row["learning_rate"] for row in f16]
    peak = rates.index(max(rates))
    assert len(f16) - len(skipped) > config["optimizer"]["warmup_steps"]
    assert rates[-1] < rates[peak], "the run ends in its warm-up"
    assert (
        f"learning rate: highest {rates[peak]:.2e} at step {peak + 1}, last {rates[-1]:.2e}\n"
        in printed
    )

    losses = {name: read(folder / "result.json")["eval_loss"] for name, folder in folders.items()}
    for name, loss in losses.items():
        last = rows[name][-1]
        assert (
            f"{name:10} held-out loss {loss:.4f}, {loss - losses['f32']:+.4f} against f32; "
            f"{last['skipped_steps']} steps skipped; "
            f"{last['unchanged_weights']:.1%} of parameters unchanged by step {config['steps']}\n"
        ) in printed
    assert rows["f32"][-1]["skipped_steps"] == rows["pure_bf16"][-1]["skipped_steps"] == 0
    assert rows["pure_bf16"][-1]["unchanged_weights"] > rows["f32"][-1]["unchanged_weights"]
    computes = dict(re.findall(r"^(loss|blocks/0/\S*(?:norm|softmax))\s+(.*)$", printed, re.M))
    assert len(computes) > 2, printed
    for site, formats in computes.items():
        assert ("c=f16" if "softmax" in site else "c=f32") in formats, (site, formats)


def ablation_facts(runs: Path, printed: str) -> None:
    """Each printed difference is that of two runs with the same seed."""
    losses: dict[str, dict[int, float]] = {}
    for result in (runs / "bf16_parameters" / "cells").glob("*/result.json"):
        config = read(result.with_name("config.json"))
        assert config["optimizer"]["warmup_steps"] < config["steps"]
        losses.setdefault(config["precision"], {})[config["seed"]] = read(result)["eval_loss"]
    control = losses["p=f32,c=f32,o=f32"]
    assert f"{len(losses)} arms, {len(control)} seeds, margin " in printed
    arms = {"bf16": "p=bf16,c=bf16,o=bf16", "bf16 stochastic": "p=bf16.sr,c=bf16,o=bf16"}
    for arm, policy in arms.items():
        differences = ", ".join(
            f"seed {seed}: {losses[policy][seed] - control[seed]:+.4f}" for seed in sorted(control)
        )
        assert f"{arm:16} {differences}; smallest detectable " in printed


def numerics_facts(runs: Path, printed: str) -> None:
    """The run in f16 does not learn, that in f32 does; gradients underflow, and advice mends it."""
    folders = {name: runs / "numerics" / name for name in ("f32", "f16", "mended", "scaled")}
    first, last = {}, {}
    for name, folder in folders.items():
        losses = [row["loss"] for row in read_rows(folder / "metrics.jsonl") if "loss" in row]
        first[name], last[name] = losses[0], losses[-1]
    for name in ("f32", "f16"):
        steps = read(folders[name] / "config.json")["steps"]
        line = f"{name}: loss {first[name]:.3f} at step 1, {last[name]:.3f} at step {steps}\n"
        assert line in printed
    learned = first["f32"] - last["f32"]
    assert first["f16"] - last["f16"] < 0.5 * learned, "the text says that it fails"
    for name in ("mended", "scaled"):
        assert first[name] - last[name] > 0.9 * learned, name
    assert re.search(r"underflow$", printed, re.M)
    assert "bit-identical: True\n" in printed
    named = re.search(r"first tensor with a relative error above \S+: (\S+), ", printed)
    assert named, printed
    assert named[1].rpartition("/")[2] in ("dy", "dx", "dw"), "the text says gradients"
    assert re.search(r"^(pass|opaque): 0 failures, (100\.000|99\.9..)% attributed$", printed, re.M)
    for name, folder in folders.items():
        loss = read(folder / "result.json")["eval_loss"]
        assert f"{name:8} held-out loss {loss:.4f}\n" in printed


FACTS: Mapping[str, Callable[[Path, str], None]] = {
    "ablation": ablation_facts,
    "numerics": numerics_facts,
    "quickstart": quickstart_facts,
}


def read(path: Path) -> dict[str, Any]:
    """A JSON file of a run."""
    return json.loads(path.read_text(encoding="utf-8"))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_the_text_states_no_numbers(path: Path) -> None:
    """Names such as f16 and anything in backticks are not numbers."""
    for cell in nbformat.read(path, as_version=4).cells:
        if cell.cell_type == "markdown":
            prose = re.sub(r"`[^`]*`", "", cell.source)
            assert not re.findall(r"(?<!\w)\d[\d.,]*", prose), cell.source


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_the_notebook_is_stored_without_outputs(path: Path) -> None:
    """Outputs would grow stale, and carry what one machine printed into the repository."""
    cells = [cell for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]
    assert not [cell for cell in cells if cell.outputs or cell.execution_count]
