"""Every part of a compiled step says what it is for: a site of the model, or a part of the step."""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from lmjax.hlo.operations import Operation, operations
from lmjax.hlo.scopes import Scope, scope_of
from lmjax.model import layout
from lmjax.parallel import sharding
from lmjax.plan import partitioned
from lmjax.runs.resolved import phase_of
from lmjax.train import Config, abstract_state
from lmjax.train.step import PARTS, train_step

PRODUCTS_BACKWARD = 2
ON_EIGHT = sharding.MeshConfig(data=2, fsdp=2, tensor=2)


def compiled(config: Config, compile_fast: Any) -> str:
    """The step on one device, as XLA compiles it."""
    mesh = sharding.make_mesh(config.mesh, jax.devices()[:1])
    rows = jax.ShapeDtypeStruct((config.batch_size, config.context), jnp.int32)
    batch = {"inputs": rows, "targets": rows}
    step = compile_fast(train_step(phase_of(config), mesh))
    return step.lower(abstract_state(config, mesh), batch).compile().as_text()


def attributed(config: Config, text: str) -> dict[Scope | None, list[Operation]]:
    """The arithmetic of a program, by what it was made for."""
    found = defaultdict(list)
    for operation in operations(text):
        found[scope_of(operation.source, layout(config.model), PARTS)].append(operation)
    return found


def flops(operations: list[Operation], op: str = "") -> float:
    return sum(one.flops for one in operations if op in ("", one.op))


@pytest.mark.parametrize(
    ("family", "devices"),
    [
        ("gpt2", 1),
        ("llama", 1),
        ("llama", 8),
        pytest.param("gpt2", 8, marks=pytest.mark.long),
    ],
)
def test_the_arithmetic_of_a_step_belongs_to_sites_and_named_parts(
    family: str, devices: int, tiny, compile_fast
):
    config = tiny("mixed_f16", family, batch_size=8, model={"width": 32, "vocab_size": 256})
    config = config.resolved()
    if devices == 1:
        text = compiled(config, compile_fast)
    else:
        text = partitioned(dataclasses.replace(config, mesh=ON_EIGHT), devices).text
    found = attributed(config, text)
    total = sum(map(flops, found.values()))
    unnamed = sorted(found.get(None, []), key=lambda one: -one.flops)
    assert flops(unnamed) < 0.01 * total, [(o.op, o.flops, o.source) for o in unnamed[:9]]
    for place in layout(config.model).places:
        forward, backward = (
            [o for scope, ops in found.items() for o in ops
             if scope and (scope.path, scope.backward) == (place.path, direction)]
            for direction in (False, True)
        )  # fmt: skip
        if place.site.is_product:
            dots = flops(forward, "dot")
            assert dots > 0, place
            again = place.site.name == "scores"  # the backward pass computes them again
            assert flops(backward, "dot") == (PRODUCTS_BACKWARD + again) * dots, place
    assert flops(found[Scope("optimizer")]) > 0


def test_blocks_that_differ_have_scopes_of_their_own(tiny, compile_fast):
    config = tiny("mixed_bf16; blocks/-1: c=f32", model={"layers": 3}).resolved()
    found = attributed(config, compiled(config, compile_fast))
    members = {scope.members for scope in found if scope and scope.members}
    assert members == {"0-1", "2"}
