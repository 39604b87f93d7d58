"""The loss scale adjusts as written, and a skipped step changes nothing but its own counters."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lmjax.optim import loss_scale
from lmjax.optim.loss_scale import LossScaleConfig, LossScaleState, resolve_kind, with_loss_scale
from lmjax.precision import exact
from lmjax.precision.sites import Stack

PARAMS = {"w": jnp.asarray([1.0, -2.0, 3.0], jnp.float32), "scale": jnp.ones(2, jnp.float32)}
GOOD = jax.tree.map(lambda p: jnp.full_like(p, 0.25), PARAMS)
BAD = GOOD | {"w": GOOD["w"].at[1].set(jnp.nan)}
DYNAMIC = LossScaleConfig("dynamic", 8.0, growth_interval=3, minimum=2.0, maximum=32.0)


def adamw() -> optax.GradientTransformation:
    return optax.adamw(optax.linear_schedule(0.1, 0.0, 10), weight_decay=0.1)


def scales(config: LossScaleConfig, gradients: list) -> list[float]:
    """The scale that each step would use, the one after the last step included."""
    transformation = with_loss_scale(optax.identity(), config)
    state = transformation.init(PARAMS)
    trace = [float(state.scale)]
    for gradient in gradients:
        _, state = transformation.update(gradient, state, PARAMS)
        trace.append(float(loss_scale.current(state)))
    return trace


@pytest.mark.parametrize(("kind", "scale"), [("none", 1.0), ("static", 8.0)])
def test_none_and_static_never_change(kind: str, scale: float):
    config = dataclasses.replace(DYNAMIC, kind=kind)
    assert scales(config, [GOOD] * 4 + [BAD] + [GOOD]) == [scale] * 7


def test_grows_by_the_factor_after_the_interval_up_to_the_maximum():
    assert scales(DYNAMIC, [GOOD] * 10) == [8, 8, 8, 16, 16, 16, 32, 32, 32, 32, 32]
    quadruple = dataclasses.replace(DYNAMIC, factor=4.0, growth_interval=1)
    assert scales(quadruple, [GOOD] * 2) == [8, 32, 32]


def test_shrinks_at_once_down_to_the_minimum():
    assert scales(DYNAMIC, [BAD] * 4) == [8, 4, 2, 2, 2]


def test_a_skip_restarts_the_interval():
    assert scales(DYNAMIC, [GOOD, GOOD, BAD, GOOD, GOOD, GOOD]) == [8, 8, 8, 4, 4, 4, 8]


def test_counters():
    transformation = with_loss_scale(optax.identity(), DYNAMIC)
    state = transformation.init(PARAMS)
    seen = []
    for gradient in [BAD, BAD, GOOD, BAD, GOOD, GOOD]:
        _, state = transformation.update(gradient, state, PARAMS)
        seen.append((int(state.skipped_steps), int(state.consecutive_skips), int(state.good_steps)))
    assert seen == [(1, 1, 0), (2, 2, 0), (2, 0, 1), (3, 1, 0), (3, 0, 1), (3, 0, 2)]


@pytest.mark.parametrize("kind", ["none", "static", "dynamic"])
@pytest.mark.parametrize("poison", [np.nan, np.inf, -np.inf])
def test_a_skipped_step_keeps_everything_bit_for_bit(kind: str, poison: float):
    transformation = with_loss_scale(adamw(), dataclasses.replace(DYNAMIC, kind=kind))
    _, before = transformation.update(GOOD, transformation.init(PARAMS), PARAMS)
    bad = GOOD | {"scale": GOOD["scale"].at[0].set(poison)}
    updates, after = transformation.update(bad, before, PARAMS)
    assert all(not np.any(np.asarray(u)) for u in jax.tree.leaves(updates)), "not even decay"
    jax.tree.map(np.testing.assert_array_equal, after.inner, before.inner)


def test_after_a_skip_training_continues_as_if_nothing_had_happened():
    transformation = with_loss_scale(adamw(), DYNAMIC)
    first = transformation.init(PARAMS)
    _, skipped = transformation.update(BAD, first, PARAMS)
    expected, direct = transformation.update(GOOD, first, PARAMS)
    actual, after = transformation.update(GOOD, skipped, PARAMS)
    jax.tree.map(np.testing.assert_array_equal, (actual, after.inner), (expected, direct.inner))


def test_the_state_is_arrays_of_fixed_dtype():
    state = with_loss_scale(adamw(), DYNAMIC).init(PARAMS)
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(state))
    own = state._replace(inner=())
    assert [leaf.dtype.name for leaf in own[:4]] == ["float32", "int32", "int32", "int32"]
    assert not any(leaf.weak_type for leaf in own[:4])


def test_survives_jit_scan_and_donation():
    transformation = with_loss_scale(optax.identity(), DYNAMIC)
    gradients = [BAD, BAD, BAD, *[GOOD] * 13]
    expected = scales(DYNAMIC, gradients)[1:]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *gradients)

    def body(state: LossScaleState, gradient: dict) -> tuple[LossScaleState, jax.Array]:
        _, state = transformation.update(gradient, state, PARAMS)
        return state, state.scale

    run = exact.jit(lambda state: jax.lax.scan(body, state, stacked), donate_argnums=0)
    state, traced = run(transformation.init(PARAMS))
    assert list(traced) == expected, "both bounds were reached inside the scan"
    assert min(expected) == DYNAMIC.minimum
    assert max(expected) == DYNAMIC.maximum
    assert float(jax.tree.map(lambda x: x, state).scale) == expected[-1]


def test_unscale_divides_in_f32():
    # 1e-3 / 2^15 is 3e-8, below every f16 number but 0 and 6e-8.
    gradient = jnp.asarray([1e-3], jnp.float16)
    unscaled = loss_scale.unscale({"w": gradient}, jnp.asarray(2.0**15, jnp.float32))["w"]
    assert unscaled.dtype == jnp.float32
    assert float(unscaled[0]) == float(gradient[0]) / 2**15


def test_all_finite():
    assert loss_scale.all_finite(GOOD)
    assert not loss_scale.all_finite(BAD)
    largest = jnp.full(4, jnp.finfo(jnp.float32).max)
    assert loss_scale.all_finite([largest]), "large is not infinite"
    assert not loss_scale.all_finite([largest, jnp.asarray(-jnp.inf)])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"initial": 65504.0}, "power of two"),
        ({"initial": 1e38, "maximum": 1e38}, "power of two"),
        ({"initial": 0.0}, "power of two"),
        ({"maximum": float("inf")}, "power of two"),
        ({"maximum": 2.0**127}, r"at least 2\*\*-64"),
        ({"minimum": 2.0**-100}, r"at least 2\*\*-64"),
        ({"initial": 2.0**25}, "from loss_scale.minimum"),
        ({"minimum": 2.0**16}, "from loss_scale.minimum"),
        ({"factor": 1.0}, "at least 2"),
        ({"factor": 0.5}, "at least 2"),
        ({"growth_interval": 0}, "at least 1"),
        ({"max_consecutive_skips": 0}, "at least 1"),
    ],
)
def test_impossible_configs_are_refused(changes: dict, message: str):
    with pytest.raises(ValueError, match=message):
        LossScaleConfig(**changes)


def test_auto_must_be_resolved_first():
    with pytest.raises(ValueError, match="resolve it"):
        with_loss_scale(optax.identity(), LossScaleConfig("auto"))


@pytest.mark.parametrize(
    ("kind", "exponent_bits", "expected"),
    [("auto", 5, "dynamic"), ("auto", 8, "none"), ("auto", 11, "none"), ("static", 5, "static"),
     ("none", 5, "none"), ("dynamic", 8, "dynamic")],
)  # fmt: skip
def test_auto_is_dynamic_where_exponents_are_short(kind, exponent_bits, expected):
    assert resolve_kind(kind, exponent_bits) == expected


BLOCKS = Stack("blocks", 2)
STACKED = {
    "blocks": {"w": jnp.ones((2, 3), jnp.float32)},
    "head": {"w": jnp.ones(2, jnp.float32)},
}
PER_BLOCK = dataclasses.replace(DYNAMIC, per_block=True)


def test_each_block_is_unscaled_by_its_own_scale():
    scale = jnp.asarray([2.0, 4.0, 8.0], jnp.float32)
    gradients = loss_scale.unscale(STACKED, scale, BLOCKS)
    np.testing.assert_array_equal(gradients["blocks"]["w"], [[0.5] * 3, [0.25] * 3])
    np.testing.assert_array_equal(gradients["head"]["w"], [0.125] * 2)
    assert float(loss_scale.of_the_loss(scale)) == 8.0


def test_only_the_scale_of_the_block_that_overflows_shrinks_and_all_skip():
    transformation = with_loss_scale(optax.identity(), PER_BLOCK, BLOCKS)
    state = transformation.init(STACKED)
    assert state.scale.shape == (3,)
    bad = STACKED | {"blocks": {"w": STACKED["blocks"]["w"].at[1, 0].set(jnp.inf)}}
    updates, state = transformation.update(bad, state, STACKED)
    np.testing.assert_array_equal(state.scale, [8.0, 4.0, 8.0])
    assert int(state.skipped_steps) == 1
    assert not any(jnp.any(u) for u in jax.tree.leaves(updates))
    outside = STACKED | {"head": {"w": STACKED["head"]["w"].at[0].set(jnp.nan)}}
    _, state = transformation.update(outside, state, STACKED)
    np.testing.assert_array_equal(state.scale, [8.0, 4.0, 4.0])


def test_a_predictive_scale_wants_to_see_cotangents():
    config = LossScaleConfig("predictive", format="f16")
    transformation = with_loss_scale(optax.identity(), config)
    with pytest.raises(ValueError, match="cotangents"):
        transformation.update(GOOD, transformation.init(PARAMS), PARAMS)


@pytest.mark.parametrize(
    "wrong",
    [
        {"overflow_probability": 0.0},
        {"memory": 0},
        {"format": "f17x"},
        {"kind": "static", "per_block": True},
    ],
)
def test_settings_of_predictive_and_block_scales_are_checked(wrong):
    with pytest.raises(ValueError, match=r"loss_scale|format"):
        LossScaleConfig(**wrong)
