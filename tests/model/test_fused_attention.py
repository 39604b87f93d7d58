"""Fused attention kernels: where they are used, and what chips' compilers make of them.

The compilers are the extras `aot-tpu` and `aot-cuda`. Run `JAX_PLATFORMS=cpu TPU_SKIP_MDS_QUERY=1
python -m pytest -m long FILE`: without the first, JAX leaves out the compiler for GPUs where there
is no driver.
"""

from __future__ import annotations

import os
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding

from lmjax.model import kernels
from lmjax.model.attention_form import Form, Situation, form_of
from lmjax.model.mask import CAUSAL, Causal, CausalWithinDocuments, Padded
from lmjax.model.sheet import Rules
from lmjax.parallel import sharding
from lmjax.parallel.sharding import MeshConfig
from lmjax.precision.backend import Backend
from lmjax.precision.grammar import parse_policy

CPU, H100, TPU = Backend("cpu"), Backend("gpu", (9, 0)), Backend("tpu")
NAMES = ("scores", "softmax", "combine")


def sites_of(policy: str) -> dict[str, Any]:
    return {name: parse_policy(policy).resolve(f"blocks/0/attention/{name}") for name in NAMES}


@pytest.mark.parametrize(
    ("policy", "backend", "mask", "changes", "expected"),
    [
        ("mixed_bf16", CPU, Causal, {}, ("blockwise", "")),
        ("mixed_bf16", H100, Causal, {}, ("cuDNN", "")),
        ("fp8", H100, Causal, {}, ("cuDNN", "")),
        ("mixed_f16", H100, Causal, {}, ("cuDNN", "")),
        ("mixed_bf16", TPU, Causal, {}, ("splash attention", "")),
        ("mixed_bf16", TPU, CausalWithinDocuments, {"parts": 2}, ("splash attention", "")),
        ("f32", H100, Causal, {}, ("blockwise", "operands in f32")),
        ("mixed_f16", TPU, Causal, {}, ("blockwise", "operands in f16")),
        ("mixed_bf16", H100, Causal, {"dropout": True}, ("blockwise", "dropout")),
        ("mixed_bf16", H100, Causal, {"unit": True}, ("blockwise", "unit scaling")),
        ("mixed_bf16", TPU, Causal, {"watched": True}, ("blockwise", "measured inside")),
        ("mixed_bf16", TPU, Causal, {"from_start": False}, ("blockwise", "a cache")),
        ("mixed_bf16", H100, Causal, {"parts": 2}, ("blockwise", "the context is divided")),
        ("mixed_bf16", H100, Causal, {"head_size": 20}, ("blockwise", "heads 20 wide")),
        ("mixed_bf16", TPU, Padded, {}, ("blockwise", "padding")),
        ("mixed_bf16; **/softmax: c=bf16", TPU, Causal, {}, ("whole matrix", "softmax has c=bf16")),
    ],
)
def test_a_kernel_is_used_where_policy_and_devices_allow(policy, backend, mask, changes, expected):
    situation = Situation(
        backend, mask, **{"queries": 1024, "keys": 1024, "head_size": 64} | changes
    )
    assert form_of(sites_of(policy), situation) == Form(*expected)
    uneven = Situation(backend, mask, **{"queries": 1000, "keys": 1000, "head_size": 64} | changes)
    if expected[0] == "splash attention":
        assert form_of(sites_of(policy), uneven).name == "blockwise"


MESHES = [
    ("tpu-v5e:2x2", {"fsdp": 2, "tensor": 2}, Causal, 3),
    ("tpu-v5e:2x2", {"tensor": 2, "sequence": 2}, CausalWithinDocuments, 3),
    ("h100:8", {"fsdp": 4, "tensor": 2}, Causal, 2),
    ("b200:8", {"data": 8}, Causal, 2),
]
"""Chips, meshes, masks, and how many kernels the passes compile to."""


@pytest.mark.long
@pytest.mark.parametrize(("chips", "mesh", "mask", "count"), MESHES)
def test_compilers_of_chips_find_the_kernels(chips, mesh, mask, count):
    """Grouped heads, forwards and backwards; the compiled text has the kernels."""
    plan = pytest.importorskip("lmjax.plan.targets")
    target = plan.parse_target(chips)
    if target.compiler is None:
        pytest.skip(f"no compiler for {chips}")
    if target.backend.platform == "gpu" and os.environ.get("JAX_PLATFORMS") != "cpu":
        pytest.skip("JAX_PLATFORMS is not cpu, so JAX may have left out the compiler for GPUs")
    on = sharding.make_mesh(MeshConfig(**{"data": 1} | mesh), plan.topology_devices(target))
    place, tpu = sharding.Placement(on), target.backend.platform == "tpu"
    rules, read = Rules(**sites_of("mixed_bf16")), kernels.splash if tpu else kernels.cudnn

    def array(shape: tuple[int, ...], *axes: str, dtype: Any = jnp.bfloat16) -> Any:
        where = NamedSharding(on, place.spec(axes, shape))
        return jax.ShapeDtypeStruct(shape, dtype, sharding=where)

    q = array((8, 512, 4, 2, 64), "batch", "length", "heads", "group", "width")
    k = array((8, 512, 4, 64), "batch", "length", "heads", "width")
    starts = array((8, 512), "batch", "length", dtype=jnp.int32)

    def total(q: Any, k: Any, v: Any, starts: Any) -> Any:
        seen = CAUSAL if mask is Causal else mask(starts)
        with jax.numpy_dtype_promotion("strict"):
            return jnp.sum(read(rules, q, k, v, seen, place).astype(jnp.float32))

    text = jax.jit(jax.grad(total, (0, 1, 2))).lower(q, k, k, starts).compile().as_text()
    called = 'custom_call_target="tpu_custom_call"' if tpu else 'custom_call_target="__cudnn$fmha'
    assert text.count(called) == count
