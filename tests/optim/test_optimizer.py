"""The optimizer computes in f32 whatever the parameters are stored in, in the order it says."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lmjax.optim import muon
from lmjax.optim.loss_scale import LossScaleConfig
from lmjax.optim.optimizer import (
    OptimizerConfig,
    learning_rate_schedule,
    make_optimizer,
)
from lmjax.optim.storage import apply_updates
from lmjax.precision import parse_policy, paths
from lmjax.precision.sites import Stack
from lmjax.precision.squares import tree_root

NO_SCALE = LossScaleConfig("none")
KEY = jax.random.key(0)
STORED = ["float32", "bfloat16", "float16"]


BLOCKS = Stack("blocks", 2)


def params(dtype: str = "float32") -> dict:
    """A tree with one parameter of each kind: embedding, stacked kernel, bias, scale, norm."""
    shapes = {
        "embed": {"table": (6, 4)},
        "blocks": {"mlp": {"up": {"kernel": (2, 4, 8), "bias": (2, 8)}}, "norm": {"scale": (2, 4)}},
        "head": {"kernel": (4, 6)},
    }
    is_shape = lambda node: isinstance(node, tuple)
    return jax.tree.map(lambda shape: jnp.full(shape, 0.5, dtype), shapes, is_leaf=is_shape)


def gradients(value: float) -> dict:
    return jax.tree.map(lambda p: jnp.full(p.shape, value, jnp.float32), params())


def step(config: OptimizerConfig, gradient: dict, dtype: str = "float32", steps: int = 1):
    stored = params(dtype)
    sites = dict.fromkeys(paths.flatten(stored), parse_policy(dtype).resolve("embed"))
    optimizer = make_optimizer(config, NO_SCALE, 100, sites, BLOCKS)
    state = optimizer.init(stored)
    for _ in range(steps):
        updates, state = optimizer.update(gradient, state, stored)
        stored, _ = apply_updates(stored, updates, {}, sites, KEY)
    return stored, updates, state


@pytest.mark.parametrize("name", ["adamw", "lion", "muon"])
@pytest.mark.parametrize("dtype", STORED)
def test_moments_and_updates_are_f32_and_parameters_keep_their_format(name: str, dtype: str):
    stored, updates, state = step(OptimizerConfig(name=name), gradients(0.1), dtype)
    moments = {p: x for p, x in paths.flatten(state.inner).items() if x.ndim}
    assert {x.dtype.name for x in moments.values()} == {"float32"}
    assert len(moments) >= len(jax.tree.leaves(stored))
    assert {x.dtype.name for x in jax.tree.leaves(updates)} == {"float32"}
    assert {x.dtype.name for x in jax.tree.leaves(stored)} == {dtype}


@pytest.mark.parametrize("dtype", STORED)
def test_a_zero_gradient_gives_a_finite_update(dtype: str):
    stored, updates, _ = step(OptimizerConfig(weight_decay=0.0), gradients(0.0), dtype)
    assert all(not np.any(np.asarray(u)) for u in jax.tree.leaves(updates))
    assert all(np.all(np.isfinite(np.asarray(p, np.float32))) for p in jax.tree.leaves(stored))


def test_adamw_equals_its_formula():
    config = OptimizerConfig(
        schedule="constant", learning_rate=0.01, warmup_steps=0, b1=0.9, b2=0.95, eps=1e-3,
        weight_decay=0.1, clip_norm=0.0,
    )  # fmt: skip
    stored, _, _ = step(config, gradients(0.02), steps=3)
    w, decayed, m, v = 0.5, 0.5, 0.0, 0.0
    for t in range(1, 4):
        m, v = 0.9 * m + 0.1 * 0.02, 0.95 * v + 0.05 * 0.02**2
        direction = (m / (1 - 0.9**t)) / (np.sqrt(v / (1 - 0.95**t)) + 1e-3)
        w, decayed = w - 0.01 * direction, decayed - 0.01 * (direction + 0.1 * decayed)
    np.testing.assert_allclose(stored["blocks"]["mlp"]["up"]["kernel"], decayed, rtol=1e-6)
    np.testing.assert_allclose(stored["blocks"]["mlp"]["up"]["bias"], w, rtol=1e-6)


@pytest.mark.parametrize("name", ["adamw", "lion", "muon"])
def test_decay_goes_by_path_and_not_by_rank(name: str):
    config = OptimizerConfig(name=name, warmup_steps=0, weight_decay=0.1)
    _, updates, _ = step(config, gradients(0.0))
    moved = {path for path, update in paths.flatten(updates).items() if np.any(np.asarray(update))}
    others = set() if name == "muon" else {"embed/table", "head/kernel"}
    # Biases and scales of blocks are stacked and so have two dimensions, like a matrix.
    assert moved == {"blocks/mlp/up/kernel"} | others


def test_no_decay_patterns_are_obeyed():
    config = OptimizerConfig(warmup_steps=0, no_decay=("embed/**", "**/kernel"))
    _, updates, _ = step(config, gradients(0.0))
    moved = {path for path, update in paths.flatten(updates).items() if np.any(np.asarray(update))}
    assert moved == {"blocks/mlp/up/bias", "blocks/norm/scale"}


def test_muon_turns_the_kernels_of_blocks_alone():
    generator = np.random.default_rng(0)
    gradient = jax.tree.map(
        lambda p: jnp.asarray(generator.normal(size=p.shape), jnp.float32), params()
    )
    config = OptimizerConfig(
        name="muon", warmup_steps=0, learning_rate=0.5, adam_learning_rate=0.01, weight_decay=0.0,
        schedule="constant",
    )  # fmt: skip
    _, updates, _ = step(config, gradient)
    flat = {path: np.asarray(update) for path, update in paths.flatten(updates).items()}
    # The first step of Adam moves every element by as much, whatever its gradient; with Nesterov
    # momentum by 1 + b1 (1 - b1) / (1 - b1^2) learning rates.
    for path, update in flat.items():
        if path != "blocks/mlp/up/kernel":
            np.testing.assert_allclose(np.abs(update), 0.01 * (1 + 0.09 / 0.19), rtol=1e-3)
    # An orthogonalised matrix has one singular value; Newton-Schulz comes near, layer by layer.
    for layer in flat["blocks/mlp/up/kernel"]:
        singular = np.linalg.svd(layer, compute_uv=False)
        assert singular[0] / singular[-1] < 2.5
    raw = np.linalg.svd(np.asarray(gradient["blocks"]["mlp"]["up"]["kernel"][0]), compute_uv=False)
    assert raw[0] / raw[-1] > 2.5, "the gradient itself was not orthogonal"


def test_clipping_sees_unscaled_f32_gradients_by_their_global_norm():
    sgd_like = OptimizerConfig(
        name="lion", b1=0.0, b2=0.0, weight_decay=0.0, warmup_steps=0, clip_norm=1.0
    )
    _, _, state = step(sgd_like, gradients(100.0))  # with b2 = 0, Lion's moment is the gradient
    moments = [x for x in jax.tree.leaves(state.inner) if x.ndim]
    assert float(optax.tree.norm(moments)) == pytest.approx(1.0, rel=1e-5)
    _, _, state = step(sgd_like, gradients(1e-3))
    moments = [x for x in jax.tree.leaves(state.inner) if x.ndim]
    np.testing.assert_array_equal(moments[0], np.float32(1e-3))


def test_a_norm_in_order_is_the_norm_wherever_the_elements_lie_in_memory():
    draw = np.random.default_rng(0)
    tree = {"a": draw.normal(size=(64, 33)).astype("f4"), "b": draw.normal(size=7).astype("f4")}
    expected = np.sqrt(sum(np.sum(np.square(x, dtype=np.float64)) for x in tree.values()))
    in_order = lambda tree: tree_root(tree, in_order=True).value
    assert float(in_order(tree)) == pytest.approx(expected, rel=1e-6)
    # Transposed in the program itself, so that the compiler may sum it as it lies.
    turned = jax.jit(lambda t: in_order({"a": t["a"].T, "b": t["b"]}))
    assert float(turned({"a": tree["a"].T.copy(), "b": tree["b"]})) == float(
        jax.jit(in_order)(tree)
    )


def alternating(magnitude: float) -> dict:
    """Gradients of one magnitude and both signs."""
    sign = lambda g: g * (-1.0) ** np.arange(g.size, dtype=np.float32).reshape(g.shape)
    return jax.tree.map(sign, gradients(magnitude))


def moments(state) -> list[np.ndarray]:
    return [np.asarray(x) for x in jax.tree.leaves(state.inner) if x.ndim]


@pytest.mark.parametrize("limit", [1.0, 1e-3, 1e6])
@pytest.mark.parametrize("magnitude", [1e-25, 1e-3, 2e19, 1e30, 1e37])
def test_clipping_is_right_where_squares_overflow_or_vanish(magnitude: float, limit: float):
    momentum = OptimizerConfig(
        name="lion", b1=0.0, b2=0.0, weight_decay=0.0, warmup_steps=0, clip_norm=limit
    )  # with b2 = 0, Lion's moment is the clipped gradient
    gradient = alternating(magnitude)
    _, _, state = step(momentum, gradient)
    count = sum(g.size for g in jax.tree.leaves(gradient))
    expected = min(magnitude, limit / np.sqrt(count))
    for moment in moments(state):
        np.testing.assert_allclose(np.abs(moment), expected, rtol=1e-6)
    assert int(state.skipped_steps) == 0


@pytest.mark.parametrize("name", ["adamw", "lion", "muon"])
def test_large_gradients_move_parameters_as_ordinary_ones_do(name: str):
    config = OptimizerConfig(name=name, warmup_steps=0, weight_decay=0.0)
    for large, ordinary in zip(
        *(jax.tree.leaves(step(config, alternating(size))[1]) for size in (2e19, 100.0)),
        strict=True,
    ):
        np.testing.assert_allclose(large, ordinary, rtol=1e-4)
        assert np.any(np.asarray(large))


@pytest.mark.parametrize(
    ("name", "magnitude", "changes"),
    [
        ("adamw", 2e19, {"clip_norm": 0.0}),  # the second moment overflows
        ("adamw", 2e38, {"clip_norm": 1.0}),  # so does the norm
        ("lion", 2e38, {"clip_norm": 1.0}),
        ("lion", 2e38, {"clip_norm": 0.0}),
        ("muon", 2e38, {"clip_norm": 0.0}),
    ],
)
def test_a_step_with_an_infinite_norm_or_moment_is_skipped(
    name: str, magnitude: float, changes: dict
):
    config = OptimizerConfig(name=name, warmup_steps=0, **changes)
    stored, updates, state = step(config, alternating(magnitude))
    assert int(state.skipped_steps) == int(state.consecutive_skips) == 1
    assert not any(np.any(np.asarray(u)) for u in jax.tree.leaves(updates))
    assert not any(np.any(m) for m in moments(state) if m.shape != (3,))
    for old, new in zip(jax.tree.leaves(params()), jax.tree.leaves(stored), strict=True):
        np.testing.assert_array_equal(old, new)


def test_a_second_moment_that_overflows_where_it_is_stored_skips_the_step():
    stored = params()
    sites = dict.fromkeys(paths.flatten(stored), parse_policy("f32,nu=f16").resolve("embed"))
    config = OptimizerConfig(clip_norm=0.0, b2=0.5)
    optimizer = make_optimizer(config, NO_SCALE, steps=100, sites=sites)
    state = optimizer.init(stored)
    for size, skipped in ((100.0, 0), (1000.0, 1), (1.0, 1)):  # 1000^2 / 2 is infinite in f16
        _, state = optimizer.update(gradients(size), state, stored)
        assert int(state.skipped_steps) == skipped
    assert all(np.all(np.isfinite(m)) for m in moments(state))


@pytest.mark.parametrize("magnitude", [1e-25, 1.0, 2e19, 1e36])
def test_muon_orthogonalises_matrices_of_any_size(magnitude: float):
    matrices = np.random.default_rng(0).normal(size=(2, 4, 8)).astype(np.float32)
    matrices[1] *= np.float32(1e-3)
    turn = muon.scale_by_muon(0.9, eps=1e-35)
    state = turn.init(jnp.asarray(matrices))
    expected, _ = turn.update(jnp.asarray(matrices), state)
    found, _ = turn.update(jnp.asarray(matrices * np.float32(magnitude)), state)
    np.testing.assert_allclose(found, expected, atol=1e-4)
    assert np.linalg.svd(np.asarray(found), compute_uv=False).min() > 0.5


def test_muon_is_that_of_optax():
    matrices = {"a": jnp.asarray(np.random.default_rng(0).normal(size=(3, 8, 4)), jnp.float32)}
    dimensions = {"a": optax.contrib.MuonDimensionNumbers(1, 2)}
    theirs = optax.contrib.scale_by_muon(
        beta=0.9, mu_dtype=jnp.float32, weight_dimension_numbers=dimensions
    )
    ours, states = muon.scale_by_muon(0.9, 1e-8), [theirs.init(matrices)] * 2
    for size in (1.0, -0.3, 2.0):
        gradient = jax.tree.map(lambda x, size=size: jnp.sin(size * x), matrices)
        expected, states[0] = theirs.update(gradient, states[0])
        found, states[1] = ours.update(gradient, states[1])
        np.testing.assert_allclose(found["a"], expected["a"], atol=1e-5)
    for one, other in zip(*map(jax.tree.leaves, states), strict=True):
        np.testing.assert_array_equal(one, other)
    assert jax.tree.structure(states[0]) == jax.tree.structure(states[1])


def test_clip_norm_0_switches_clipping_off():
    config = OptimizerConfig(name="lion", b1=0.0, b2=0.0, clip_norm=0.0)
    _, _, state = step(config, gradients(100.0))
    assert {float(x.max()) for x in jax.tree.leaves(state.inner) if x.ndim} == {100.0}


def test_updates_are_added_in_f32_and_rounded_once():
    # 1 + 2^-9 is 1 in bf16, 1 + 3 * 2^-9 rounds up to 1 + 2^-7: the update is not rounded first.
    one = jnp.ones(1, jnp.bfloat16)
    update = jnp.asarray([2.0**-8 + 2.0**-20], jnp.float32)
    sites = {"w": parse_policy("bf16").resolve("embed")}
    stored, _ = apply_updates({"w": one}, {"w": update}, {}, sites, KEY)
    assert float(stored["w"][0]) == 1.0 + 2.0**-7
    assert float(one[0] + update.astype(jnp.bfloat16)[0]) == 1.0


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("cosine", {0: 0.1, 4: 0.5, 9: 1.0, 10: 1.0, 55: 0.55, 100: 0.1}),
        ("wsd", {0: 0.1, 9: 1.0, 10: 1.0, 79: 1.0, 80: 1.0, 90: 0.55, 100: 0.1}),
        ("constant", {0: 0.1, 9: 1.0, 10: 1.0, 99: 1.0}),
    ],
)
def test_schedules_at_their_corners(schedule: str, expected: dict[int, float]):
    config = OptimizerConfig(schedule=schedule, learning_rate=1.0, warmup_steps=10)
    rate = learning_rate_schedule(config, steps=100)
    for count, value in expected.items():
        assert float(rate(count)) == pytest.approx(value, abs=1e-6), count


def test_schedules_without_warmup_start_at_the_peak():
    config = OptimizerConfig(learning_rate=2.0, warmup_steps=0)
    assert float(learning_rate_schedule(config, 10)(0)) == 2.0


@pytest.mark.parametrize("schedule", ["cosine", "wsd", "constant"])
@pytest.mark.parametrize("steps", [1, 2, 5])
def test_runs_shorter_than_their_warmup_only_rise(schedule: str, steps: int):
    config = OptimizerConfig(schedule=schedule, learning_rate=1.0, warmup_steps=100)
    rate = learning_rate_schedule(config, steps)
    rates = [float(rate(count)) for count in range(steps)]
    assert rates == sorted(rates)
    assert rates[-1] == 1.0
    assert rates[0] == pytest.approx(1 / steps)


def test_the_schedule_ends_at_the_final_fraction_and_stays():
    for schedule in ("cosine", "wsd"):
        config = OptimizerConfig(schedule=schedule, learning_rate=1.0, final_fraction=0.25)
        rate = learning_rate_schedule(config, 200)
        assert float(rate(200)) == pytest.approx(0.25)
        assert float(rate(999)) == pytest.approx(0.25)


@pytest.mark.parametrize(
    "changes",
    [{"learning_rate": 0.0}, {"eps": 0.0}, {"b1": 1.0}, {"b2": -0.1}, {"final_fraction": 1.5},
     {"decay_fraction": -1.0}, {"weight_decay": -0.1}, {"clip_norm": -1.0}, {"warmup_steps": -1},
     {"learning_rate": float("nan")}],
)  # fmt: skip
def test_impossible_configs_are_refused(changes: dict):
    with pytest.raises(ValueError, match=next(iter(changes))):
        OptimizerConfig(**changes)
