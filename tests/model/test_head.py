"""Head and loss in one pass compute what the plain form computes, without its logits."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lmjax
from lmjax.model import ModelConfig, head, parametrisation_of, token_losses
from lmjax.model.head import Backward, Head, mean_loss, token_nats
from lmjax.model.sites import Context
from lmjax.parallel import sharding
from lmjax.precision import exact, parse_policy
from lmjax.precision.backend import Backend, planned_for
from lmjax.precision.probes import FullCensus

POLICIES = {
    "f32": 24,
    "mixed_bf16": 8,
    "mixed_f16": 11,
    "p=f32,c=bf16,o=f32": 8,
    "mixed_bf16; head: c=f32": 24,
    "mixed_f16; loss: c=f16": 11,
    "f32; head: w=e4m3,x=e4m3,g=e5m2": 24,
    "mixed_bf16; head: x=e4m3@tensor,a=bf16@block16": 8,
}
"""Policies, and the significant bits of what their heads compute in."""

CHEAP = ("mixed_bf16", "mixed_f16", "f32; head: w=e4m3,x=e4m3,g=e5m2")

SPECS = {"tied": ("btd,vd->btv", (40, 16)), "llama": ("btk,kn->btn", (16, 40))}
ROWS = (8, 6)
SCALE = 2.0**7


def fused(spec: str, sites: Any, backward: Backward, context: Context, x: Any, w: Any) -> Any:
    options: dict[str, Any] = {"scales": parametrisation_of(ModelConfig()), "z_loss": 0.01}
    loss = mean_loss(
        x, Head(spec, w, False), targets(), sites, context, backward=backward, **options
    )
    return loss.astype(jnp.float32) * SCALE


def plain(spec: str, sites: Any, context: Context, x: Any, w: Any) -> Any:
    logits = Head(spec, w, False)(x, sites["head"], context.at("head"))
    losses = token_losses(logits, targets(), sites["loss"], context.at("loss").probe)
    loss = jnp.mean(losses.cross_entropy) + 0.01 * jnp.mean(losses.z)
    return loss.astype(jnp.float32) * SCALE


def targets() -> jax.Array:
    return jnp.asarray(np.random.default_rng(1).integers(0, 40, ROWS), jnp.int32)


def both(policy: str, kind: str, mesh: Any) -> tuple[Any, Any]:
    """Loss, dx and dw of the fused form on a mesh and of the plain one."""
    spec, shape = SPECS[kind]
    sites = {name: parse_policy(policy).resolve(name) for name in ("head", "loss")}
    draw = np.random.default_rng(0)
    x = jnp.asarray(draw.normal(size=(*ROWS, 16)), sites["head"].jmp.compute_dtype)
    w = jnp.asarray(draw.normal(size=shape), jnp.float32)
    constrain = sharding.Placement(mesh)
    backward = Backward(jnp.float32(SCALE), constrain=constrain)
    with jax.numpy_dtype_promotion("strict"):
        ours = functools.partial(fused, spec, sites, backward, Context())
        theirs = functools.partial(plain, spec, sites, Context())
        found = [exact.jit(jax.value_and_grad(f, (0, 1)))(x, w) for f in (ours, theirs)]
    wide = lambda tree: [np.asarray(leaf, np.float64) for leaf in jax.tree.leaves(tree)]
    return wide(found[0]), wide(found[1])


def difference(policy: str, kind: str, mesh: Any) -> float:
    """The largest difference in units of the last place of the format of the head."""
    pairs = zip(*both(policy, kind, mesh), strict=True)
    relative = max(np.max(np.abs(a - b)) / np.max(np.abs(b)) for a, b in pairs)
    return float(relative * 2.0 ** (POLICIES[policy] - 1))


def allowed(policy: str) -> float:
    """One rounding; in f32 every sum over rows and columns rounds as well."""
    return 8 if POLICIES[policy] == 24 else 1


def one_device() -> Any:
    return sharding.make_mesh(sharding.MeshConfig(), jax.devices()[:1])


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(head, "CHUNK", 16)


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("kind", [pytest.param("llama", marks=pytest.mark.long), "tied"])
@pytest.mark.parametrize(
    "policy", [p if p in CHEAP else pytest.param(p, marks=pytest.mark.long) for p in POLICIES]
)
def test_loss_and_gradients_are_those_of_the_plain_form_to_one_rounding(policy: str, kind: str):
    assert difference(policy, kind, one_device()) <= allowed(policy)


@pytest.mark.long
def test_so_they_are_on_eight_devices():
    done = subprocess.run(
        [sys.executable, __file__],
        env={
            **os.environ,
            "XLA_FLAGS": "--xla_force_host_platform_device_count=8 "
            "--xla_backend_optimization_level=0",
            "JAX_PLATFORMS": "cpu",
            "PYTHONPATH": str(Path(lmjax.__file__).parents[1]),
        },
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["sums"] <= 2, "dw and the loss are summed over devices once, after all chunks"
    for policy, ulps in found["differences"].items():
        assert ulps <= allowed(policy), (policy, ulps)


@pytest.mark.usefixtures("small_chunks")
def test_logits_never_exist_whole(equations: Callable[..., list[Any]]):
    spec, shape = SPECS["tied"]
    sites = {name: parse_policy("mixed_bf16").resolve(name) for name in ("head", "loss")}
    forms = (
        jax.grad(
            functools.partial(fused, spec, sites, Backward(jnp.float32(1)), Context()), (0, 1)
        ),
        functools.partial(plain, spec, sites, Context()),
    )
    x, w = jnp.zeros((*ROWS, 16), jnp.bfloat16), jnp.zeros(shape, jnp.float32)
    outputs = ([v for e in equations(jax.make_jaxpr(f)(x, w)) for v in e.outvars] for f in forms)
    ours, theirs = (max(var.aval.size for var in found) for found in outputs)
    logits = ROWS[0] * ROWS[1] * 40
    assert max(x.size, w.size) <= ours < logits == theirs


@pytest.mark.usefixtures("small_chunks")
def test_an_unexpected_cotangent_is_made_up_for():
    spec, shape = SPECS["tied"]
    sites = {name: parse_policy("f32").resolve(name) for name in ("head", "loss")}
    draw = np.random.default_rng(0)
    x, w = (jnp.asarray(draw.normal(size=size), jnp.float32) for size in ((*ROWS, 16), shape))
    told = functools.partial(fused, spec, sites, Backward(jnp.float32(SCALE)), Context())
    untold = functools.partial(fused, spec, sites, Backward(jnp.float32(1)), Context())
    for a, b in zip(jax.grad(told, (0, 1))(x, w), jax.grad(untold, (0, 1))(x, w), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.usefixtures("small_chunks")
def test_what_is_measured_is_that_of_the_plain_form(compile_fast: Callable[..., Any]):
    spec, shape = SPECS["tied"]
    sites = {name: parse_policy("mixed_bf16").resolve(name) for name in ("head", "loss")}
    draw = np.random.default_rng(0)
    x = jnp.asarray(draw.normal(size=(*ROWS, 16)), jnp.bfloat16)
    w = jnp.asarray(draw.normal(size=shape), jnp.float32)
    census = lambda: {"telemetry": FullCensus.empty()}
    slots = {"head": {role: census() for role in ("w", "g", "dw")}, "loss": {"dx": census()}}
    ours = lambda slots: fused(
        spec, sites, Backward(jnp.float32(SCALE)), Context(slots=slots), x, w
    )
    theirs = lambda slots: plain(spec, sites, Context(slots=slots), x, w)
    a, b = (compile_fast(jax.grad(f))(slots) for f in (ours, theirs))
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for one, other in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert np.abs(one - other).max() <= max(2, 0.01 * np.abs(other).max())
        assert float(one.sum()) == pytest.approx(float(other.sum()), rel=1e-2)


@pytest.mark.usefixtures("small_chunks")
def test_evaluation_reads_chunks_too():
    spec, shape = SPECS["llama"]
    sites = {name: parse_policy("f32").resolve(name) for name in ("head", "loss")}
    draw = np.random.default_rng(0)
    x, w = (jnp.asarray(draw.normal(size=size), jnp.float32) for size in ((*ROWS, 16), shape))
    constrain = sharding.Placement(one_device())
    nats = token_nats(x, Head(spec, w, False), targets(), sites, Context(), constrain)
    logits = np.asarray(x, np.float64) @ np.asarray(w, np.float64)
    expected = np.log(np.exp(logits).sum(-1)) - np.take_along_axis(
        logits, np.asarray(targets())[..., None], -1
    ).squeeze(-1)
    np.testing.assert_allclose(nats, expected, rtol=1e-5)


def on_eight_devices() -> dict[str, Any]:
    """What the test of the same name reads: chunks of 2 rows, 6 rows to a device."""
    head.CHUNK = 2
    config = sharding.MeshConfig(data=2, fsdp=2, tensor=1, sequence=2)
    mesh = sharding.make_mesh(config)
    spec, shape = SPECS["tied"]
    sites = {name: parse_policy("f32").resolve(name) for name in ("head", "loss")}
    constrain = sharding.Placement(mesh)
    backward = Backward(jnp.float32(SCALE), constrain=constrain)
    step = jax.jit(
        jax.value_and_grad(functools.partial(fused, spec, sites, backward, Context()), (0, 1)),
        in_shardings=(
            sharding.named_sharding(mesh, ("batch", "length", "width"), (*ROWS, 16)),
            sharding.named_sharding(mesh, ("vocab", "width"), shape),
        ),
    )
    text = step.lower(jnp.zeros((*ROWS, 16)), jnp.zeros(shape)).compile().as_text()
    return {
        "sums": text.count(" all-reduce("),
        "differences": {policy: difference(policy, "tied", mesh) for policy in POLICIES},
    }


if __name__ == "__main__":
    print(json.dumps(on_eight_devices()))


@pytest.mark.parametrize(("platform", "chunks"), [("cpu", 16), ("tpu", 16), ("gpu", 2)])
def test_gpus_take_more_rows_at_a_time(platform: str, chunks: int):
    with planned_for(Backend(platform)):
        rows = jax.eval_shape(lambda x: head._cut(x, whole=False), jnp.zeros((8, 1024, 4)))
    assert rows.shape == (chunks, 1, 8192 // chunks, 4)
