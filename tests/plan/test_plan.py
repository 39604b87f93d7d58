"""A plan says what a compiled step sends and holds, and the arithmetic says the same."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import pytest

from experiments import llama_1b, quickstart
from lmjax.parallel.sharding import MeshConfig
from lmjax.plan import CPU_ONLY, Plan, PlanError, TrafficRow, cuts, make_plan, partitioned, scaled
from lmjax.train import Config

CUBE = MeshConfig(data=2, fsdp=2, tensor=2)


@pytest.fixture(scope="module")
def cube(tiny: Callable[..., Config]) -> Plan:
    """A tiny Llama on data x fsdp x tensor, rematerialised, in two micro-batches."""
    model = {"remat": "full"}
    config = tiny("mixed_bf16", "llama", model=model, batch_size=16, micro_batches=2, mesh=CUBE)
    return make_plan(config, 8)


def by_purpose(rows: list[TrafficRow]) -> dict[str, set[tuple[str, str, tuple[str, ...]]]]:
    """What each purpose sends: kind, dtype, axes."""
    found: dict[str, set[tuple[str, str, tuple[str, ...]]]] = {}
    for row in rows:
        found.setdefault(row.purpose, set()).add((row.kind, row.dtype, row.axes))
    return found


def assert_as_computed(rows: list[TrafficRow], within: float) -> None:
    """Bytes of every purpose, as compiled, are those of the arithmetic."""
    for row in rows:
        if row.purpose != "other":
            assert row.sent == pytest.approx(row.expected, rel=within), row
    others = sum(row.sent for row in rows if row.purpose == "other")
    assert others <= 0.05 * sum(row.sent for row in rows)


def test_a_step_sends_what_the_arithmetic_says(cube: Plan):
    assert_as_computed(cube.rows, 0.0)
    assert not cube.program.warnings


def test_weights_travel_in_the_compute_format_and_sums_in_the_accumulator(cube: Plan):
    found = by_purpose(cube.rows)
    assert found["parameters"] == {("all-gather", "bf16", ("fsdp",))}
    assert found["activations"] == {("all-reduce", "f32", ("tensor",))}
    assert found["gradients"] == {
        ("reduce-scatter", "f32", ("fsdp",)),
        ("all-reduce", "f32", ("data",)),
        ("all-reduce", "f32", ("data", "fsdp")),
    }


def test_the_embedding_table_stays_where_it_is(cube: Plan):
    """Left to itself, XLA gathers all of it on such a mesh; rows and tokens travel instead."""
    kinds = {(row.kind, row.dtype) for row in cube.rows if row.purpose == "embedding"}
    assert kinds == {("all-gather", "s32"), ("all-to-all", "bf16"), ("all-reduce", "f32")}


def test_the_table_of_arrays_adds_up_to_what_the_program_is_given(cube: Plan):
    found = {cut.path: cut for cut in cuts(cube.config, 8)}
    up = found["blocks/mlp/up/kernel"]
    assert (up.spec, up.bytes) == (("-", "fsdp", "tensor"), 2 * 16 * 32 * 4 // 4)
    assert found["norm/scale"].spec == ("-",)
    assert found["inputs, targets"].spec == ("dataxfsdp", "-")
    # Beside these: the step and the key of the state.
    rest = cube.program.memory.arguments - sum(cut.bytes for cut in found.values())
    assert rest == 4 + 8


def test_a_batch_that_does_not_fit_is_refused_before_anything_is_compiled(
    tiny: Callable[..., Config],
):
    config = tiny(batch_size=16, micro_batches=4, mesh=MeshConfig(fsdp=8, data=1))
    with pytest.raises(ValueError, match="a micro-batch of 4 rows cannot be divided among 8"):
        partitioned(config, 8)


def test_a_step_that_does_not_compile_says_why(
    tiny: Callable[..., Config], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("lmjax.plan.program.CHILD", "lmjax.plan.nothing")
    with pytest.raises(PlanError, match=r"8 devices: .*No module named lmjax\.plan\.nothing"):
        partitioned(tiny(batch_size=8), 8)


def test_weak_scaling_keeps_the_rows_of_a_device(tiny: Callable[..., Config]):
    config = tiny(batch_size=8)
    assert scaled(config, 8, 64).batch_size == 64
    with pytest.raises(ValueError, match="no whole number of rows on 15"):
        scaled(tiny(batch_size=2), 8, 15)
    with pytest.raises(ValueError, match="leave one at -1"):
        scaled(tiny(mesh=CUBE), 8, 64)


@pytest.mark.long
def test_gradients_are_reduced_in_the_format_of_the_policy(tiny: Callable[..., Config]):
    mesh = MeshConfig(data=1, fsdp=8)
    config = tiny("f32,c=bf16,r=bf16", batch_size=8, mesh=mesh, model={"width": 32})
    rows = make_plan(config, 8).rows
    gradients = [row for row in rows if row.purpose == "gradients"]
    assert {row.dtype for row in gradients} == {"bf16"}
    assert_as_computed(gradients, 0.0)
    assert {row.dtype for row in rows if row.purpose == "parameters"} == {"bf16"}


@pytest.mark.long
@pytest.mark.parametrize(
    ("sizes", "purposes"),
    [
        ({}, set()),
        ({"data": 8}, {"gradients"}),
        ({"data": 1, "fsdp": 8}, {"gradients", "parameters"}),
        ({"data": 2, "fsdp": 2}, {"gradients", "parameters"}),
    ],
)
def test_a_fixed_order_costs_what_the_arithmetic_says(sizes: dict[str, int], purposes: set[str]):
    config = dataclasses.replace(
        quickstart.config(), deterministic_reductions=8, mesh=MeshConfig(**sizes)
    )
    plan = make_plan(config, math.prod(sizes.values()))
    assert {row.purpose for row in plan.rows if row.expected} == purposes
    assert_as_computed(plan.rows, 0.0)
    assert plan.program.memory.peak == pytest.approx(sum(plan.memory.values()), rel=0.1)


LLAMA_MESHES = {
    8: {"data": 1, "fsdp": 8},
    64: {"data": 1, "fsdp": 16, "tensor": 4},
    256: {"data": 4, "fsdp": 32, "tensor": 2},
}


@pytest.mark.long
@pytest.mark.parametrize("devices", LLAMA_MESHES)
def test_llama_1b_sends_what_the_arithmetic_says(devices: int):
    mesh = MeshConfig(**LLAMA_MESHES[devices])
    plan = make_plan(dataclasses.replace(llama_1b.config(), mesh=mesh), devices)
    assert_as_computed(plan.rows, 0.05)
    assert {row.dtype for row in plan.rows if row.purpose == "parameters"} == {"bf16"}
    assert {row.dtype for row in plan.rows if row.purpose == "gradients"} == {"f32"}


@pytest.mark.long
@pytest.mark.parametrize("devices", [8, 64, 256])
def test_llama_1b_holds_the_sum_of_its_parts(devices: int):
    """With the rows that a device has on 8; with one row, CPU's allocator leaves gaps of 15%."""
    plan = make_plan(scaled(llama_1b.config(), 8, devices), devices)
    assert plan.program.memory.peak == pytest.approx(sum(plan.memory.values()), rel=0.1)
    assert plan.memory[CPU_ONLY] < 0.1 * plan.program.memory.peak
