"""What only a GPU shows: that it rounds, uses its kernels, and finds the gradients of a CPU.

Skipped without a GPU. With one: `XLA_PYTHON_CLIENT_PREALLOCATE=false python -m pytest -m long -n 4
tests/test_on_gpu.py`.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmjax.hlo.kernels import products
from lmjax.parallel import sharding
from lmjax.precision import exact, parse_policy
from lmjax.precision.matmul import einsum
from lmjax.runs.resolved import phase_of
from lmjax.train.step import make_scaled_loss, train_step


def gpu() -> Any:
    """The first GPU, or None."""
    device = jax.devices()[0]
    return device if device.platform == "gpu" else None


pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(gpu() is None, reason="needs a GPU"),
]

SIZES = {"width": 128, "vocab_size": 512, "max_positions": 256}
HEADS = {"gpt2": {"heads": 2}, "llama": {"heads": 4, "kv_heads": 2, "width": 256, "mlp_width": 512}}
POLICIES = {
    "f32": "",
    "p=f32,c=bf16,o=f32,m=default": "fmha",
    "mixed_bf16": "fmha",
    "mixed_f16": "fmha",
    "pure_bf16": "fmha",
    "mixed_bf16; **/softmax: c=bf16": "",
    "fp8": "e4m3",
    "mxfp8": "fmha",
    "f32; **/mlp/*: c=bf16,m=default": "",
}
"""Policies, and the name of a kernel, or the format of a product, that a step under them has."""


def found(device: Any, config: Any, params: Any, batch: Any) -> tuple[dict[str, Any], str]:
    """The loss and every gradient on a device, in f64, and the compiled program."""
    mesh = sharding.make_mesh(config.mesh, [device])
    loss = make_scaled_loss(phase_of(config), mesh)
    program = exact.jit(sharding.traced_for(mesh, jax.value_and_grad(loss, has_aux=True)))
    given = jax.device_put((params, batch, jax.random.key(0), jnp.float32(2**10)), device)
    compiled = program.lower(*given).compile()
    (value, _), gradients = compiled(*given)
    leaves = jax.tree_util.tree_leaves_with_path({"loss": value, "gradients": gradients})
    wide = {jax.tree_util.keystr(path): np.asarray(leaf, np.float64) for path, leaf in leaves}
    return wide, compiled.as_text()


def error(result: dict[str, Any], exact_result: dict[str, Any]) -> dict[str, float]:
    """Relative to the norm of each array; biases of keys, whose gradient is 0, are left out."""
    return {
        name: float(np.linalg.norm(result[name] - right) / np.linalg.norm(right))
        for name, right in exact_result.items()
        if "['key']['bias']" not in name
    }


def test_roundings_happen():
    exact.check_canary()


@pytest.mark.parametrize("family", HEADS)
@pytest.mark.parametrize("policy", POLICIES)
def test_gradients_are_as_close_to_those_of_f32_as_on_a_cpu(
    policy, family, tiny, draw_params, draw_batch
):
    model = SIZES | HEADS[family]
    config = tiny(policy, family, model=model, context=256, batch_size=4)
    wide = tiny("f32", family, model=model, context=256, batch_size=4)
    params, batch = draw_params(config, std=0.05), draw_batch(config)
    cpu = jax.devices("cpu")[0]
    right, _ = found(cpu, wide, draw_params(wide, std=0.05), batch)
    ours, text = found(gpu(), config, params, batch)
    theirs, _ = found(cpu, config, params, batch)
    assert POLICIES[policy] in (text + " ".join(map(str, products(text))))
    on_gpu, on_cpu = error(ours, right), error(theirs, right)
    if policy == "f32":
        assert max(error(ours, theirs).values()) < 1e-5
        return
    worst = max(on_gpu[name] / (on_cpu[name] + 1e-6) for name in on_cpu if name != "['loss']")
    print(f"{policy} {family}: at most {worst:.2f} times the error on a CPU")
    assert worst < 2
    assert on_gpu["['loss']"] < 2e-3


@pytest.mark.parametrize("pair", ["w=e4m3@tensor,x=e4m3@tensor", "w=e4m3@tensor,x=e5m2@tensor"])
def test_fp8_products_are_native_and_sums_are_those_of_f32_but_for_their_last_bits(pair):
    site = parse_policy(f"p=f32,c=bf16,o=f32,{pair}").resolve("head")
    draw = np.random.default_rng(0)
    x, w = (
        jnp.asarray(draw.normal(size=shape), jnp.bfloat16) for shape in ((4, 64, 4096), (512, 4096))
    )
    product = functools.partial(einsum, "btd,vd->btv", site=site)
    results = {}
    for device in (gpu(), jax.devices("cpu")[0]):
        mesh = sharding.make_mesh(sharding.MeshConfig(), [device])
        program = exact.jit(sharding.traced_for(mesh, product))
        given = jax.device_put((x, w), device)
        compiled = program.lower(*given).compile()
        results[device.platform] = np.asarray(compiled(*given), np.float64)
        narrow = "e4m3" in str(products(compiled.as_text()))
        assert narrow == (device.platform == "gpu")
    difference = np.abs(results["gpu"] - results["cpu"]).max() / np.abs(results["cpu"]).max()
    print(f"{pair}: largest difference {difference:.2e} of the largest result")
    assert difference < 2**-9


def test_a_watched_step_differs_from_a_plain_one_by_roundings_of_attention(
    tiny, draw_state, draw_batch
):
    config = tiny("mixed_bf16", model=SIZES | HEADS["gpt2"], context=256, batch_size=4)
    mesh = sharding.make_mesh(config.mesh, [gpu()])
    steps = [
        exact.jit(train_step(phase_of(config), mesh, telemetry=watched))
        for watched in (False, True)
    ]
    plain, watched = (step(draw_state(config), draw_batch(config))[1] for step in steps)
    for name in ("loss", "grad_norm"):
        np.testing.assert_allclose(watched[name], plain[name], rtol=2**-9)
