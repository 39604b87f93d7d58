"""A run is evaluated on any number of devices, whatever its batch size."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from run_helpers import ROOT, finish, result, rows, start, tiny

from lmjax.inference import evaluate, load_model
from lmjax.train import Config, InputError, train

EIGHT = "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"


def odd(home: Path, parts: int, batch_size: int) -> Config:
    """Three steps, each followed by an evaluation in batches of 3."""
    return tiny(
        home,
        steps=3,
        batch_size=batch_size,
        deterministic_reductions=parts,
        evaluation={"batch_size": 3, "every": 1},
    )


@pytest.fixture(scope="module")
def alone(home: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on one device with a batch of 3, which eight devices cannot divide."""
    folder = tmp_path_factory.mktemp("devices") / "run"
    train(tiny(home, batch_size=3, steps=3), folder, progress=False)
    return folder


def test_the_command_line_evaluates_a_batch_of_3_on_8_devices(alone: Path) -> None:
    child = start("lmjax", "evaluate", str(alone), "--json", cwd=alone, XLA_FLAGS=EIGHT)
    code, out, err = finish(child)
    assert code == 0, err
    assert json.loads(out)["eval_loss"] == pytest.approx(result(alone)["eval_loss"], rel=1e-6)


@pytest.mark.long
def test_losses_in_a_fixed_order_are_the_same_on_1_and_8_devices(
    home: Path, tmp_path: Path
) -> None:
    """To the bit; and a run whose order two devices at most can share is evaluated on two."""
    train(odd(home, parts=2, batch_size=2), tmp_path / "two", progress=False)
    done = subprocess.run(
        [sys.executable, __file__, str(home), str(tmp_path)],
        env={**os.environ, "XLA_FLAGS": EIGHT, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["two"] == result(tmp_path / "two")["eval_loss"]
    eight = result(tmp_path / "eight")["eval_loss"]
    assert found["eight"] == eight
    assert evaluate(load_model(tmp_path / "eight"), progress=False).eval_loss == eight
    assert len([row for row in rows(tmp_path / "eight") if "eval_loss" in row]) == 3
    for words in ("4 rows", "8 devices", "--batch-size", "--micro-batches"):
        assert words in found["refused"]


def _on_8_devices(home: Path, folder: Path) -> dict[str, Any]:
    """What the test above needs eight devices for."""
    train(odd(home, parts=8, batch_size=8), folder / "eight", progress=False)
    found = {
        name: evaluate(load_model(folder / name), progress=False).eval_loss
        for name in ("two", "eight")
    }
    try:
        train(odd(home, parts=0, batch_size=4), folder / "refused", progress=False)
    except InputError as error:
        return {**found, "refused": str(error)}
    raise AssertionError("a batch of 4 rows was divided among 8 devices")


if __name__ == "__main__":
    print(json.dumps(_on_8_devices(*map(Path, sys.argv[1:]))))
