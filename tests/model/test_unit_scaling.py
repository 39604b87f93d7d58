"""Unit scaling: unit variance at the start, exact directions of gradients, no loss scale."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from experiments.ablations.unit_scaling import (
    COTANGENTS,
    EVERYTHING,
    Moments,
    deviations,
    gradients,
)
from lmjax.model import ModelConfig, apply, parametrisation_of, token_losses, unit_scaling
from lmjax.model.standard import Standard
from lmjax.optim.loss_scale import LossScaleConfig
from lmjax.parallel import sharding
from lmjax.parallel.sharding import MeshConfig
from lmjax.precision import paths
from lmjax.precision.probes import Census, Fate
from lmjax.runs.resolved import phase_of, resolve
from lmjax.runs.state import optimizer_of
from lmjax.train import abstract_state, make_train_step
from lmjax.train.cautions import warnings

UNIT = {"parametrisation": "unit"}
WIDE = UNIT | {"vocab_size": 256, "max_positions": 64, "heads": 4}


@pytest.fixture(scope="module")
def at_start(tiny, draw_params, draw_batch, compile_fast) -> Callable[..., dict[str, np.ndarray]]:
    """`at_start(family, **model)`: deviations of all tensors of a fresh model on random tokens."""

    def measure(
        family: str, roles: frozenset[str], *, loss_multiplier: float = 1.0, **model: Any
    ) -> dict[str, np.ndarray]:
        changes = {"context": 64, "batch_size": 8, "loss_multiplier": loss_multiplier}
        config = tiny("f32", family, model=model, **changes)
        params = draw_params(config, std=parametrisation_of(config.model).weight_std)
        params = jax.tree_util.tree_map_with_path(neutral, params)
        run = compile_fast(lambda p, b: gradients(config, p, b, Moments, roles))
        grads, measured = run(params, draw_batch(config))
        table = {"embed/table gradient": np.std(grads["embed"]["table"])}
        return deviations(measured) | table

    return measure


def neutral(keys: Any, leaf: jax.Array) -> jax.Array:
    """Biases 0 and norm scales 1, as a model starts with them."""
    path = paths.path_string(keys)
    if path.endswith("scale"):
        return jnp.ones_like(leaf)
    return jnp.zeros_like(leaf) if path.endswith("bias") else leaf


@pytest.mark.parametrize(
    ("family", "shape"),
    [
        ("gpt2", {"width": 64, "layers": 4}),
        ("llama", {"width": 64, "layers": 3, "mlp_width": 128}),
        pytest.param("gpt2", {"width": 128, "layers": 2}, marks=pytest.mark.long),
        pytest.param("gpt2", {"width": 64, "layers": 12}, marks=pytest.mark.long),
        pytest.param(
            "llama", {"width": 128, "layers": 4, "mlp_width": 320}, marks=pytest.mark.long
        ),
    ],
)
def test_every_tensor_starts_at_unit_variance(family: str, shape: dict[str, int], at_start):
    found = at_start(family, EVERYTHING, **WIDE, **shape)
    assert len(found) > 50
    wrong = {path: d for path, d in found.items() if not np.all((d >= 0.5) & (d <= 2.0))}
    assert not wrong


def test_the_standard_cotangents_are_far_below_f16(at_start):
    """With a multiplier that unit scaling cancels; see the gradients below."""
    model = WIDE | {"parametrisation": "standard", "width": 64}
    found = at_start("gpt2", COTANGENTS, loss_multiplier=2.0**-10, **model)
    assert max(np.max(d) for d in found.values()) < 2.0**-14


@pytest.mark.parametrize("family", ["gpt2", pytest.param("llama", marks=pytest.mark.long)])
def test_every_gradient_is_a_multiple_of_the_true_one(
    family: str, tiny, draw_params, draw_batch, compile_fast, monkeypatch
):
    """Against plain autodiff of the same forward pass: one ratio a parameter of a block."""
    config = tiny("f32", family, model=UNIT | {"z_loss": 1e-3}, loss_multiplier=2.0**-10)
    params, batch = draw_params(config, std=1.0), draw_batch(config)

    def plain(params: Any) -> jax.Array:
        logits = apply(params, batch["inputs"], config=config.model, sites=phase_of(config).sites)
        losses = token_losses(logits, batch["targets"], phase_of(config).sites["loss"])
        return jnp.mean(losses.cross_entropy) + 1e-3 * jnp.mean(losses.z)

    scaled = compile_fast(lambda p: gradients(config, p, batch)[0])(params)
    with monkeypatch.context() as patch:
        patch.setattr(unit_scaling, "scaled", lambda x, forward=1.0, backward=1.0: x * forward)
        for file in ("layers", "attention", "head"):
            patch.setattr(f"lmjax.model.{file}.einsum", plain_product)
        true = compile_fast(jax.grad(plain))(params)
    ratios = {}
    for path, gradient in paths.flatten(true).items():
        if path.endswith("key/bias"):
            continue  # 0: a softmax does not see what all scores of a row have in common
        blocks = config.model.layers if path.startswith("blocks") else 1
        ours = np.asarray(paths.flatten(scaled)[path], np.float64).reshape(blocks, -1)
        theirs = np.asarray(gradient, np.float64).reshape(blocks, -1)
        ratios[path] = np.sum(ours * theirs, 1) / np.sum(theirs**2, 1)
        assert np.all(ratios[path] > 1), path
        np.testing.assert_allclose(
            ours, ratios[path][:, None] * theirs, atol=1e-4 * np.abs(ours).max(), err_msg=path
        )
    table = config.model.vocab_size * config.model.width
    of_head = ratios["embed/table" if config.model.tied else "head/kernel"]
    assert of_head == pytest.approx(math.sqrt(table * batch["inputs"].size)), "no loss_multiplier"


def plain_product(spec: str, x: Any, w: Any, site: Any, *, unit: bool, **_: Any) -> jax.Array:
    """A product divided as unit scaling divides it, whose gradients are what autodiff makes."""
    assert unit
    operands, y_axes = spec.split("->")
    x_axes, w_axes = operands.split(",")
    summed = set(x_axes) & set(w_axes) - set(y_axes)
    terms = math.prod(x.shape[x_axes.index(axis)] for axis in summed)
    return jnp.einsum(spec, x, w, precision="highest") / np.float32(math.sqrt(terms))


def test_the_gains_are_integrals_over_normal_numbers():
    nodes, weights = np.polynomial.hermite_e.hermegauss(100)
    weights = weights / weights.sum()
    for activation, gain in (
        (jax.nn.gelu, unit_scaling.GELU_GAIN),
        (jax.nn.silu, unit_scaling.GATED_SILU_GAIN * 2**0.25),
    ):
        values = np.asarray(activation(jnp.asarray(nodes, jnp.float32)), np.float64)
        assert gain * math.sqrt(weights @ values**2) == pytest.approx(1.0, abs=1e-4)


def test_a_factor_is_rounded_together_with_what_it_multiplies():
    x = jnp.float16(3.0)
    factor = 1.0 + 2.0**-11  # which f16 rounds to 1
    value, pull = jax.vjp(lambda x: unit_scaling.scaled(x, factor, 2.0**-30), x)
    assert value == np.float16(3.0 * factor) == np.float16(3.0) + np.float16(2.0**-9)
    assert pull(jnp.float16(2.0**10))[0] == 2.0**-20, "2^-30 itself is 0 in f16"


def test_stream_and_branches_keep_the_variance():
    weights = unit_scaling.UnitScaling(ModelConfig(layers=3)).branches()
    np.testing.assert_allclose(weights.stream**2 + weights.branch**2, 1.0, rtol=1e-6)
    shares = np.array(weights.branch).reshape(-1)
    for later in range(1, 6):
        shares[:later] *= np.asarray(weights.stream).reshape(-1)[later]
    np.testing.assert_allclose(shares**2, 1 / 12, rtol=1e-5)


def test_the_standard_parametrisation_calls_nothing_of_it(tiny, draw_batch, monkeypatch):
    standard, unit = tiny("mixed_f16"), tiny("mixed_f16", model=UNIT)
    batch = draw_batch(standard)
    trace = lambda c: make_train_step(c, MESH).trace(abstract_state(c.resolved(), MESH), batch)
    for name in vars(unit_scaling.UnitScaling).keys() & vars(Standard).keys():
        if not name.startswith("__"):
            monkeypatch.setattr(unit_scaling.UnitScaling, name, property(refused))
    trace(standard)
    with pytest.raises(AssertionError, match="unit scaling"):
        trace(unit)


def refused(scales: Any) -> None:
    raise AssertionError("unit scaling was asked")


MESH = sharding.abstract_mesh(MeshConfig(), 1)


@pytest.mark.long
@pytest.mark.parametrize(
    ("precision", "family", "changes"),
    [
        ("p=bf16.kahan,c=f16,w=e4m3@tensor,r=bf16", "llama", {"remat": "dots", "tied": True}),
        ("mixed_f16; blocks/0: c=f32", "gpt2", {"remat": "full", "dropout": 0.1}),
    ],
)
def test_it_goes_together_with_all_that_a_run_may_have(
    precision: str, family: str, changes: dict[str, Any], tiny, draw_batch
):
    """With scales of blocks, telemetry, gradients summed in bf16; traced, which checks dtypes."""
    mesh = sharding.abstract_mesh(MeshConfig(data=2, fsdp=2), 4)
    scale = LossScaleConfig(kind="dynamic", per_block=True)
    config = tiny(precision, family, model=UNIT | changes, loss_scale=scale).resolved()
    state, batch = abstract_state(config, mesh), draw_batch(config)
    out, metrics = make_train_step(config, mesh, telemetry=True).eval_shape(state, batch)
    like = lambda tree: jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), tree)
    assert like(out) == like(state), "a step keeps the formats of its state"
    assert "blocks/mlp/up/dx" in metrics["telemetry"]


def test_f16_needs_no_loss_scale(tiny, draw_params, draw_batch, compile_fast):
    config = tiny("pure_f16", model=WIDE | {"width": 32}, context=64, batch_size=8)
    params = draw_params(config, std=1.0)
    run = compile_fast(lambda p, b: gradients(config, p, b, Census, COTANGENTS - {"dw"})[1])
    measured = run(params, draw_batch(config))
    counted = paths.flatten(measured, lambda node: isinstance(node, Census))
    assert len(counted) > 20
    for path, census in counted.items():
        assert not np.any(census.elements(Fate.OVERFLOW)), path
        assert np.all(census.maximum < 2.0**10), path
        # The first position of 64 has one key and so no gradient of its scores: rounding errors.
        assert np.all(census.elements(Fate.UNDERFLOW) < census.size / 64), path


@pytest.mark.parametrize(
    ("kind", "resolved"), [("auto", "none"), ("static", "static"), ("dynamic", "dynamic")]
)
def test_auto_stands_for_no_loss_scale(kind: Any, resolved: str, tiny):
    config = tiny("mixed_f16", model=UNIT, loss_scale=LossScaleConfig(kind=kind))
    assert config.resolved().loss_scale.kind == resolved
    assert tiny("mixed_f16").resolved().loss_scale.kind == "dynamic"


@pytest.mark.long
@pytest.mark.parametrize(
    "precision", ["c=f16,w=e4m3,x=e4m3,g=e5m2", "pure_f16", "c=bf16,w=e4m3,x=e4m3,g=e5m2"]
)
def test_it_learns_a_batch_by_heart_without_a_loss_scale(
    precision: str, tiny, draw_state, draw_batch, compiled_step
):
    optimizer = {"learning_rate": 0.1, "weight_decay": 0.0}
    config = tiny(precision, model=UNIT, optimizer=optimizer, loss_multiplier=2.0**-20)
    state, batch = draw_state(config, std=1.0), draw_batch(config)
    step = compiled_step(config)
    for _ in range(100):
        state, metrics = step(state, batch)
    assert metrics["loss_scale"] == 1
    assert metrics["skipped_steps"] == 0
    assert metrics["loss"] < 0.3


def test_clipping_bounds_the_root_mean_square_and_rates_follow_the_fan_in(
    tiny, draw_state, compile_fast
):
    """Of equal gradients and parameters of 0, whose first update by Adam is the learning rate."""
    settings = {"clip_norm": 0.5, "warmup_steps": 0, "b1": 0.0, "learning_rate": 2.0}
    config = tiny(model=UNIT | {"mlp_width": 64}, optimizer=settings).resolved()
    state = draw_state(config, std=0.0)
    fours = jax.tree.map(lambda p: jnp.full(p.shape, 4.0, jnp.float32), state.params)
    zeros = jax.tree.map(jnp.zeros_like, state.params)
    updates, opt_state = compile_fast(optimizer_of(phase_of(config)).update)(
        fours, state.opt_state, zeros
    )
    for moment in jax.tree.leaves(optax.tree.get(opt_state, "mu")):
        np.testing.assert_allclose(moment, 0.5, rtol=1e-5)
    fan_in = {"blocks/mlp/down/kernel": 64, "blocks/mlp/up/kernel": 16, "embed/table": 16}
    for path, size in fan_in.items():
        np.testing.assert_allclose(paths.flatten(updates)[path], -2 / math.sqrt(size), rtol=1e-4)


def test_a_learning_rate_for_small_weights_is_warned_about(tiny):
    usual = {"optimizer": {"learning_rate": 1e-3}}
    assert warnings(resolve(tiny(**usual))) == []
    (warning,) = warnings(resolve(tiny(model=UNIT, **usual)))
    assert "0.001" in warning
    assert warnings(resolve(tiny(model=UNIT, optimizer={"learning_rate": 0.5}))) == []
