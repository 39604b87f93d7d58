"""The quickstart learns the same on every mesh: 50 steps of real runs on eight devices, in f32.

To rounding as a rule, and to the last bit with `deterministic_reductions`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from run_helpers import finish, result, rows, start

pytestmark = pytest.mark.long

STEPS = 50
MESHES = {
    "8x1x1": {"data": 8},
    "1x8x1": {"data": 1, "fsdp": 8},
    "2x2x2": {"data": 2, "fsdp": 2, "tensor": 2},
    "4x1x2": {"data": 4, "tensor": 2},
    "1x4x2": {"data": 1, "fsdp": 4, "tensor": 2},
    "2x1x2, sequence 2": {"data": 2, "tensor": 2, "sequence": 2},
}
FAMILIES = {
    "gpt2": "",
    "llama": "--model.positions rope --model.norm rms --model.activation swiglu "
    "--model.kv-heads 2 --model.no-bias",
}
RUNS: dict[str, list[float]] = {}


def losses(
    workdir: Path, family: str, mesh: dict[str, int], devices: int, **changes: Any
) -> list[float]:
    """The training losses of a run of the quickstart, step by step."""
    flags = {"precision": "f32", "steps": STEPS, "log-every": 1, "sample": 0} | changes
    flags |= {f"mesh.{axis}": size for axis, size in mesh.items()}
    flags |= {"evaluation.every": 0, "evaluation.batches": 1, "checkpoint.every": STEPS}
    arguments = [part for name, value in flags.items() for part in (f"--{name}", str(value))]
    process = start(
        "experiments.quickstart",
        "--workdir",
        str(workdir),
        *arguments,
        *FAMILIES[family].split(),
        cwd=workdir.parent,
        XLA_FLAGS=f"--xla_force_host_platform_device_count={devices}",
        JAX_PLATFORMS="cpu",
    )
    code, _, err = finish(process)
    assert code == (75 if "stop-after" in changes else 0), err
    return [float(row["loss"]) for row in rows(workdir) if "loss" in row]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("mesh", MESHES)
def test_a_mesh_changes_no_loss(mesh: str, family: str, tmp_path: Path):
    if family not in RUNS:
        RUNS[family] = losses(tmp_path / "one", family, {}, 1)
        assert len(RUNS[family]) == STEPS
    found = losses(tmp_path / "eight", family, MESHES[mesh], 8)
    assert found == pytest.approx(RUNS[family], rel=1e-5)
    assert found[-1] < found[0] - 1, "it learned something"


ORDERED = {"deterministic-reductions": 8, "precision": "mixed_f16"}


def test_a_run_that_moves_between_meshes_is_the_undisturbed_run_bit_for_bit(tmp_path: Path):
    """1 -> 8 -> 2 x 2 -> 1 devices, stopped and resumed each time."""
    one: tuple[dict[str, int], int] = ({}, 1)
    expected = losses(tmp_path / "one", "llama", *one, **ORDERED)
    moves = [one, ({"data": 1, "fsdp": 8}, 8), ({"data": 2, "fsdp": 2}, 4), one]
    for index, (mesh, devices) in enumerate(moves):
        stop = {} if index == 3 else {"stop-after": 12}
        found = losses(tmp_path / "moving", "llama", mesh, devices, **ORDERED | stop)
    assert found == expected
    undisturbed, moving = result(tmp_path / "one"), result(tmp_path / "moving")
    assert moving["parameters_sha256"] == undisturbed["parameters_sha256"]
    assert moving["eval_loss"] == undisturbed["eval_loss"]
