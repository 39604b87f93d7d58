"""Every product of every program runs at a precision somebody decided, whoever multiplies.

A product of f32 operands without an explicit precision is one pass in bf16 on a TPU and TF32 on a
GPU, and nothing on a CPU shows it. These tests trace whole programs and look at all of their
products, those inside libraries included.
"""

from __future__ import annotations

import ast
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lmjax
from lmjax.model import decoding
from lmjax.optim import optimizer
from lmjax.optim.loss_scale import LossScaleConfig
from lmjax.parallel import sharding
from lmjax.precision.backend import Backend
from lmjax.runs.resolved import phase_of
from lmjax.runs.state import initial_state
from lmjax.telemetry.rows import TelemetryConfig
from lmjax.train.step import evaluation, train_step

FAMILIES = ["gpt2", "llama"]
OPTIMIZERS = ["adamw", "lion", "muon"]
MULTIPLICATIONS = {"dot", "dot_general", "einsum", "inner", "matmul", "tensordot", "vdot"}

AS_F32 = (
    (jax.lax.Precision.HIGHEST, jax.lax.Precision.HIGHEST),
    jax.lax.DotAlgorithmPreset.F32_F32_F32,
)


def careless(dot: Any) -> str:
    """What a product leaves to the backend; empty if nothing."""
    operands = {np.dtype(operand.aval.dtype) for operand in dot.invars}
    summed = dot.outvars[0].aval.dtype
    if operands == {np.dtype(np.int8)}:
        return "" if summed == np.int32 else f"int8 summed in {summed}"
    if summed.itemsize < 4:
        return f"summed in {summed}"
    wide = any(operand.itemsize >= 4 for operand in operands)
    precision = dot.params["precision"]
    return f"f32 at {precision}" if wide and precision not in AS_F32 else ""


@pytest.fixture(scope="module")
def products(equations) -> Callable[..., list[Any]]:
    """The products of a program, which must have some."""

    def collect(program: Callable[..., Any], *arguments: Any) -> list[Any]:
        dots = equations(jax.make_jaxpr(program)(*arguments), "dot_general")
        assert dots
        return dots

    return collect


def traced_step(config: Any, batch: Any, products: Callable[..., list[Any]]) -> list[Any]:
    config, telemetry = config.resolved(), config.telemetry.every > 0
    mesh = sharding.make_mesh(config.mesh, jax.devices()[:1])
    state = jax.eval_shape(lambda: initial_state(config))
    return products(train_step(phase_of(config), mesh, telemetry=telemetry), state, batch)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_products_of_a_step_with_any_optimizer(name, family, tiny, draw_batch, products):
    config = tiny("f32", family, optimizer={"name": name})
    dots = traced_step(config, draw_batch(config), products)
    assert not list(filter(None, map(careless, dots)))
    # Eight products in a block (nine with a gate) and the head, each with two gradients; scores are
    # computed again in the backward pass; and five iterations of three for each of the kernels.
    of_model, kernels = {"gpt2": (28, 6), "llama": (31, 7)}[family]
    assert len(dots) == of_model + (15 * kernels if name == "muon" else 0)


@pytest.mark.parametrize(
    ("policy", "changes"),
    [
        ("mixed_bf16", {"telemetry": TelemetryConfig(every=1)}),
        ("mixed_f16", {"loss_scale": LossScaleConfig("predictive", per_block=True)}),
        ("mixed_bf16,wb=mxfp4,xb=mxfp4,g=mxfp4.rht.sr", {}),
        ("f32,w=e4m3@tensor,x=e4m3@tensor.delayed,g=e5m2@tensor,a=bf16@block16", {}),
        ("int8", {"deterministic_reductions": 2}),
        ("pure_f16", {"model": {"parametrisation": "unit", "tied": False}}),
    ],
)
def test_products_of_a_step_under_any_policy(policy, changes, tiny, draw_batch, products):
    config = tiny(policy, "gpt2", **changes)
    assert not list(filter(None, map(careless, traced_step(config, draw_batch(config), products))))


def test_the_devices_of_the_mesh_decide_and_not_the_default_one(
    tiny, draw_batch, products, monkeypatch
):
    config = tiny("fp8", model={"dropout": 0.1})  # which no fused kernel of attention does
    here = traced_step(config, draw_batch(config), products)
    monkeypatch.setattr(sharding, "backend_of", lambda mesh: Backend("gpu", (9, 0)))
    there = traced_step(config, draw_batch(config), products)
    narrow = lambda dots: sum(dot.invars[0].aval.dtype.itemsize == 1 for dot in dots)
    # Six linear layers, each with two gradients, in one scan over both blocks.
    assert (narrow(here), narrow(there)) == (0, 18)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_only_products_of_the_model_obey_m(name, tiny, draw_batch, products):
    config = tiny("f32,m=default", optimizer={"name": name})
    left = list(filter(None, map(careless, traced_step(config, draw_batch(config), products))))
    assert len(left) == 28, "as counted above"


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("policy", ["f32", "mixed_bf16", "f32,kv=mxfp8"])
def test_products_of_evaluation_and_decoding(
    policy, family, tiny, draw_params, draw_batch, products
):
    config = tiny(policy, family).resolved()
    params, batch = draw_params(config), draw_batch(config)
    mesh = sharding.make_mesh(config.mesh, jax.devices()[:1])
    weights = {"weights": jnp.ones(batch["inputs"].shape)}
    dots = products(evaluation(phase_of(config), mesh), params, batch | weights)
    model = {"config": config.model, "sites": phase_of(config).sites}
    cache = decoding.initial_cache(config.model, phase_of(config).sites, 4, 16)
    params = decoding.decoding_params(params, **model)
    extend = functools.partial(decoding.extend, **model)
    dots += products(extend, params, batch["inputs"][:, :1], cache, 3)
    assert not list(filter(None, map(careless, dots)))


def test_a_library_that_multiplies_inside_an_optimizer_does_so_in_f32(products):
    multiply = optax.stateless(lambda g, _: jax.tree.map(lambda x: x @ x.T @ x, g))
    gradient = {"w": jnp.ones((3, 2))}
    assert all(map(careless, products(lambda g: multiply.update(g, multiply.init(g))[0], gradient)))
    inside = optimizer._in_f32(multiply)
    update = lambda g: inside.update(g, inside.init(g), g)[0]
    assert not list(filter(None, map(careless, products(update, gradient))))


def unspoken(source: str) -> list[int]:
    """Lines that multiply matrices in JAX without saying at what precision."""
    lines = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.MatMult):
            lines.append(node.lineno)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            of_jax = ast.unparse(node.func.value) in ("jnp", "jax.numpy", "jax.lax", "lax")
            said = any(keyword.arg in ("precision", None) for keyword in node.keywords)
            if of_jax and node.func.attr in MULTIPLICATIONS and not said:
                lines.append(node.lineno)
    return lines


def test_the_source_says_the_precision_of_every_product():
    lines = "y = x @ w\njnp.dot(x, w)\njnp.einsum(spec, x, w, precision=p)"
    assert unspoken(lines) == [1, 2]
    root = Path(lmjax.__file__).parent
    sources = {path.relative_to(root): path.read_text() for path in root.rglob("*.py")}
    found = {path: unspoken(text) for path, text in sources.items() if "import jax" in text}
    assert not {path: lines for path, lines in found.items() if lines}
