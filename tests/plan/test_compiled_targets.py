"""What the compilers of chips make of a step. Needs `lmjax[aot-tpu]` or `lmjax[aot-cuda]`.

Each test compiles one program, in about a minute on 2 cores.
"""

from __future__ import annotations

import dataclasses
import importlib.util
from collections import Counter
from collections.abc import Callable

import pytest

from lmjax.model import structure
from lmjax.parallel.sharding import MeshConfig
from lmjax.plan import ChipPlan, parse_target, plan_for_chips
from lmjax.precision import paths
from lmjax.train import Config

pytestmark = pytest.mark.long

E4M3, E5M2, E2M1 = "f8e4m3fn", "f8e5m2", "f4e2m1fn"


@pytest.fixture(scope="module")
def compiled(tiny: Callable[..., Config]) -> Callable[..., ChipPlan]:
    """Plans a tiny Llama, whose axes are whole blocks, on chips; once for equal arguments."""
    plans: dict[object, ChipPlan] = {}

    def plan(name: str, policy: str, **changes: object) -> ChipPlan:
        target = parse_target(name)
        if not any(importlib.util.find_spec(package) for package in target.packages):
            pytest.skip(f"needs lmjax[{target.extra}]")
        key = (name, policy, repr(changes))
        if key not in plans:
            # cuDNN pads rows and columns of blocks to 128; these need none.
            model = {"width": 128, "heads": 2, "kv_heads": 2, "mlp_width": 256, "vocab_size": 256}
            config = tiny(policy, "llama", batch_size=8, context=128, model=model)
            plans[key] = plan_for_chips(dataclasses.replace(config, **changes), target)
        return plans[key]

    return plan


def multiplied(plan: ChipPlan) -> dict[tuple[str, ...], float]:
    """FLOP of a step on one device by the dtypes of operands, in those of its linear layers.

    Forwards these are 1. Not the number of products, because XLA merges some of those that share
    an operand.
    """
    config = plan.config
    sizes = paths.flatten(structure(config.model)[1]).items()
    linear = sum(leaf.size for path, leaf in sizes if path.startswith("blocks/") and leaf.ndim == 3)
    forwards = 2 * linear * config.batch_size * config.context / plan.target.devices
    found: Counter[tuple[str, ...]] = Counter()
    for product in plan.products:
        found[tuple(sorted(product.operands))] += product.flops / forwards
    return found


@pytest.mark.parametrize("name", ["h100:8", "b200:1"])
def test_fp8_products_are_fp8_on_gpus_that_multiply_it(name: str, compiled):
    found = multiplied(compiled(name, "fp8"))
    # Forwards e4m3 with itself, and with cotangents in e5m2 for both gradients.
    assert found[E4M3, E4M3] == pytest.approx(1)
    assert found[E4M3, E5M2] == pytest.approx(2)
    assert not any("f32" in operands for operands in found)


def test_fp8_products_are_emulated_in_bf16_on_a_gpu_without_them(compiled):
    found = multiplied(compiled("a100:1", "fp8"))
    assert set(found) == {("bf16", "bf16")}


@pytest.mark.parametrize(("policy", "dtype"), [("mxfp8", E4M3), ("nvfp4", E2M1)])
def test_blocks_are_multiplied_by_cudnn_on_b200(policy: str, dtype: str, compiled):
    plan = compiled("b200:8", policy, mesh=MeshConfig(data=1, fsdp=8))
    assert multiplied(plan)[dtype, dtype] == pytest.approx(3)
    assert ("cuDNN", "blockScaledDot") in {(one.library, one.name) for one in plan.kernels}


def test_blocks_are_emulated_on_h100(compiled):
    assert set(multiplied(compiled("h100:1", "mxfp8"))) == {("bf16", "bf16")}


def test_int8_products_are_int8_on_tpus(compiled):
    found = multiplied(compiled("tpu-v5e:2x2", "int8"))
    assert found["s8", "s8"] == pytest.approx(3)


@pytest.mark.parametrize("name", ["tpu-v5e:2x2", "tpu-v5p:2x2x1", "tpu-v6e:2x2", "h200:2"])
def test_a_step_has_an_exact_memory_on_every_chip(name: str, compiled):
    plan = compiled(name, "mixed_bf16", mesh=MeshConfig(data=1, fsdp=-1))
    assert plan.fits
    parameters = 4 * 3 * 2 * 128 * (3 * 256 + 4 * 128)  # a lower bound: kernels and moments
    assert plan.memory.arguments > parameters / plan.target.devices
    assert plan.memory.temporaries > 0
    assert {one.axes for one in plan.sent} == {("fsdp",)}
    assert {product.operands for product in plan.products} == {("bf16", "bf16")}


def test_f32_products_of_a_tpu_are_asked_for_in_full(compiled):
    plan = compiled("tpu-v5e:1x1", "f32")
    assert {(product.operands, product.precision) for product in plan.products} == {
        (("f32", "f32"), "highest")
    }


@pytest.mark.parametrize(
    "changes", [{"deterministic_reductions": 8}, {"precision": "mxfp8,r=bf16"}]
)
def test_block_scaled_products_compile_where_parts_of_a_batch_are_apart(changes, compiled):
    plan = compiled("b200:8", "mxfp8", mesh=MeshConfig(data=8), **changes)
    assert multiplied(plan)[E4M3, E4M3] == pytest.approx(3)


def test_a_step_that_a_tpu_has_no_memory_for_is_said_to_need_more(compiled):
    plan = compiled("tpu-v5e:1x1", "f32", context=16384, batch_size=2**12)
    assert not plan.fits
    assert plan.compiled is None
    assert plan.memory.temporaries > plan.target.memory
