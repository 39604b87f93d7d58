"""Silent failures of loss scalers, each named after the place where it happens."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lmjax.optim import loss_scale
from lmjax.optim.loss_scale import LossScaleConfig, with_loss_scale
from lmjax.optim.optimizer import OptimizerConfig, make_optimizer
from lmjax.parallel.sharding import MeshConfig, abstract_mesh, state_shardings
from lmjax.precision import exact, parse_policy

PARAMS = {"scale": jnp.ones(4, jnp.float32), "w": jnp.ones((4, 4), jnp.float32)}
ZERO = jax.tree.map(jnp.zeros_like, PARAMS)
NAN = ZERO | {"w": jnp.full((4, 4), jnp.nan, jnp.float32)}
ADAMW = OptimizerConfig(learning_rate=0.1, warmup_steps=4, weight_decay=0.5)
SITES = dict.fromkeys(PARAMS, parse_policy("f32").resolve("embed"))


def optimizer(**fields):
    scale = LossScaleConfig(**{"kind": "dynamic"} | fields)
    return make_optimizer(ADAMW, scale, steps=20, sites=SITES)


def test_jmp_minimum_is_lost_in_tree_flatten():
    """The lower bound becomes 1.0 again after any jit or tree_map."""
    transformation = optimizer(initial=2.0**-10, minimum=2.0**-10)
    state = jax.tree.map(lambda leaf: leaf, transformation.init(PARAMS))
    step = exact.jit(lambda s: transformation.update(NAN, s, PARAMS)[1])
    assert float(step(step(state)).scale) == 2.0**-10


@pytest.mark.parametrize("kind", ["static", "dynamic"])
def test_jmp_scale_is_not_a_leaf(kind: str):
    """A static scale is trace-time metadata: it is not checkpointed."""
    transformation = optimizer(kind=kind, initial=2.0**7)
    leaves, structure = jax.tree.flatten(transformation.init(PARAMS))
    (index,) = [i for i, leaf in enumerate(leaves) if leaf.ndim == 0 and float(leaf) == 2.0**7]
    leaves[index] = jnp.asarray(2.0**9, jnp.float32)
    restored = jax.tree.unflatten(structure, leaves)
    assert float(loss_scale.current(restored)) == 2.0**9
    assert float(transformation.update(ZERO, restored, PARAMS)[1].scale) == 2.0**9


def test_jmp_weakly_typed_scale_unscales_in_f16():
    """A gradient of 1e-3 divided by 2^15 in f16 is 0 or 6e-8, and a loss of 3 becomes inf."""
    scale = optimizer().init(PARAMS).scale
    assert not scale.weak_type
    gradient = jnp.asarray(1e-3, jnp.float16)
    unscaled = float(loss_scale.unscale([gradient], scale)[0])
    assert unscaled == pytest.approx(1e-3 / 2**15, rel=1e-3)
    assert float(gradient / jnp.float16(2**15)) != pytest.approx(1e-3 / 2**15, rel=0.1)


def test_jmp_scale_without_upper_bound():
    """At 1.7e38 the reciprocal flushes to 0: every gradient is silently 0, and still finite."""
    transformation = optimizer(growth_interval=1)
    step = exact.jit(lambda s: transformation.update(ZERO, s, PARAMS)[1])
    state = transformation.init(PARAMS)
    for _ in range(20):
        state = step(state)
    assert float(state.scale) == LossScaleConfig().maximum
    assert float(loss_scale.unscale([state.scale], state.scale)[0]) == 1.0
    with pytest.raises(ValueError, match=r"2\*\*64"):
        LossScaleConfig(maximum=2.0**126)


def test_jmp_state_breaks_tree_map_over_shardings():
    """A loss scale that insists on arrays can sit in no tree of shardings."""
    state = jax.eval_shape(optimizer().init, PARAMS)
    mesh = abstract_mesh(MeshConfig(), 8)
    placed = state_shardings(mesh, {}, state)
    assert jax.tree.structure(placed) == jax.tree.structure(state)
    assert jax.tree.map(str, placed).scale == str(placed.scale)


def test_flax_dynamic_scale_starts_above_the_f16_maximum():
    """65536 is infinite in f16, so the first steps are always skipped."""
    initial = np.float32(LossScaleConfig().initial)
    assert np.isfinite(initial.astype(np.float16))


def test_mpx_unscales_with_the_grown_scale():
    """The gradient of every growth step is halved."""
    transformation = optimizer(growth_interval=1, initial=4.0)
    state = transformation.init(PARAMS)
    used = loss_scale.current(state)
    gradient = loss_scale.unscale([jnp.float32(2.0) * used], used)[0]
    _, after = transformation.update(ZERO, state, PARAMS)
    assert float(after.scale) == 8.0
    assert float(gradient) == 2.0
    assert float(used) == 4.0, "the step read its scale before it grew"


def test_mpx_scale_that_is_not_a_power_of_two():
    """65504 as a scale is exact for 0.2% of all f16 numbers."""
    with pytest.raises(ValueError, match="power of two"):
        LossScaleConfig(initial=65504.0)
    values = jnp.arange(1, 1024, dtype=jnp.float32) / 1024
    exactly = lambda scale: np.mean(
        np.asarray((values * scale / scale).astype(jnp.float32) == values)
    )
    assert exactly(jnp.float32(LossScaleConfig().initial)) == 1.0


def test_zeroing_nan_gradients_instead_of_skipping():
    """AdamW still decays the weights and advances the count and the schedule."""
    transformation = optimizer()
    _, before = transformation.update(ZERO, transformation.init(PARAMS), PARAMS)
    updates, after = transformation.update(NAN, before, PARAMS)
    assert not any(np.any(np.asarray(u)) for u in jax.tree.leaves(updates))
    jax.tree.map(np.testing.assert_array_equal, after.inner, before.inner)
    decayed, _ = transformation.update(ZERO, before, PARAMS)
    assert np.all(np.asarray(decayed["w"]) < 0), "zeros instead of a skip would have decayed"


def test_optax_apply_if_finite_gives_up():
    """After n failures in a row the NaN update is accepted."""
    transformation = optimizer(max_consecutive_skips=3)
    state = transformation.init(PARAMS)
    for _ in range(10):
        updates, state = transformation.update(NAN, state, PARAMS)
        assert not any(np.any(np.asarray(u)) for u in jax.tree.leaves(updates))
    assert int(state.consecutive_skips) == 10


def test_optax_tree_get_and_a_parameter_called_scale():
    """Looking the scale up by name raises once a parameter has its name."""
    state = optimizer(initial=2.0**5).init(PARAMS)
    assert loss_scale.current(state).shape == ()
    assert float(loss_scale.current(state)) == 2.0**5
    with pytest.raises(KeyError):
        optax.tree.get(state, "scale")


def test_clip_before_unscale():
    """Clipping scaled gradients turns (0.3, 0.4) into (9e-6, 1.2e-5)."""
    sgd = optax.chain(optax.clip_by_global_norm(1.0), optax.identity())
    transformation = with_loss_scale(sgd, LossScaleConfig("static", 2.0**15))
    state = transformation.init({"w": jnp.zeros(2, jnp.float32)})
    scaled = {"w": jnp.asarray([0.3, 0.4], jnp.float32) * state.scale}
    gradient = loss_scale.unscale(scaled, loss_scale.current(state))
    updates, _ = transformation.update(gradient, state)
    np.testing.assert_allclose(updates["w"], [0.3, 0.4], rtol=1e-6)
