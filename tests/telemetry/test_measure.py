"""What a step measures reaches those who asked, and a step that measures is the same step."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmjax.model import layout
from lmjax.optim import loss_scale
from lmjax.optim.loss_scale import LossScaleConfig
from lmjax.parallel import sharding
from lmjax.precision import paths
from lmjax.precision.past import ScaleState
from lmjax.precision.probes import Census, Fate, FullCensus, is_slot
from lmjax.runs.resolved import phase_of
from lmjax.telemetry import measure
from lmjax.telemetry.rows import TelemetryConfig
from lmjax.train import Config
from lmjax.train.step import evaluated, make_scaled_loss, slots_of, train_step


def scaling_of(config: Config) -> Any:
    """Fresh histories for a run."""
    return measure.initial_scaling(layout(config.model), phase_of(config).sites)


DELAYED = "f32,w=e4m3@tensor.delayed4,x=e4m3@tensor.delayed4,g=e5m2@tensor.delayed4"


@pytest.fixture(scope="module")
def step_of(compile_fast):
    """`step_of(config, telemetry)`: the compiled step on one device, not donating; kept."""
    steps: dict[Any, Any] = {}

    def make(config: Any, telemetry: bool = False) -> Any:
        if (config, telemetry) not in steps:
            mesh = sharding.make_mesh(config.mesh, jax.devices()[:1])
            step = train_step(phase_of(config), mesh, telemetry=telemetry)
            steps[config, telemetry] = compile_fast(step)
        return steps[config, telemetry]

    return make


def narrow(tiny: Any, family: str = "gpt2", **changes: Any) -> Any:
    """One block in f16 under a static loss scale, with 128 logits for each of 512 tokens."""
    return tiny(
        "mixed_f16",
        family,
        model={"layers": 1, "vocab_size": 128},
        batch_size=32,
        loss_scale=LossScaleConfig("static", 1.0),
        **changes,
    )


def bits(tree: Any) -> list[bytes]:
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(tree)]


@pytest.mark.parametrize("family", ["gpt2", pytest.param("llama", marks=pytest.mark.long)])
def test_a_watched_step_fills_every_slot_and_is_the_same_step(
    family, tiny, draw_state, draw_batch, step_of
):
    config = narrow(tiny, family)
    state, batch = draw_state(config, std=0.02), draw_batch(config)
    plain, metrics = step_of(config)(state, batch)
    watched, more = step_of(config, True)(state, batch)
    assert bits(plain) == bits(watched)
    census, updates = more.pop("telemetry"), more.pop("updates")
    assert set(updates) == set(phase_of(config).param_sites)
    assert bits(metrics) == bits(more)
    sites = {path.replace("blocks/0/", "blocks/", 1) for path in phase_of(config).sites}
    assert {path.rsplit("/", 1)[0] for path in census} == sites
    unfilled = [path for path, c in census.items() if not np.all(c.size > 0)]
    assert not unfilled
    shares = [np.asarray(c.histogram).sum(-1) / np.asarray(c.size) for c in census.values()]
    np.testing.assert_allclose(np.concatenate([np.atleast_1d(s) for s in shares]), 1)


def test_asking_for_nothing_gives_the_program_without_this_file(tiny, draw_state, draw_batch):
    config = tiny("mixed_f16; blocks/1: c=f32").resolved()
    assert slots_of(phase_of(config), telemetry=False) == {} == scaling_of(config)
    state, batch = draw_state(config), draw_batch(config)
    loss = make_scaled_loss(phase_of(config), sharding.make_mesh(config.mesh, jax.devices()[:1]))
    arguments = (state.params, batch, jax.random.key(0), jnp.float32(1))
    gradient = jax.grad(loss, has_aux=True)
    with_empty = jax.make_jaxpr(lambda *a: gradient(*a, {}, {}))(*arguments)
    assert str(with_empty) == str(jax.make_jaxpr(gradient)(*arguments))


@pytest.mark.long
def test_micro_batches_are_counted_together(tiny, draw_state, draw_batch, step_of):
    def census(micro_batches: int) -> Any:
        config = narrow(tiny, micro_batches=micro_batches)
        state, batch = draw_state(config, std=0.02), draw_batch(config)
        return step_of(config, True)(state, batch)[1]["telemetry"]

    whole, parts = census(1), census(2)
    for path, counted in whole.items():
        # A weight is looked at once for each part; cotangents of a mean over half are doubled.
        looked = 2 if path.endswith(("/w", "/dw")) and "scores" not in path else 1
        looked = 1 if path.endswith(("combine/w", "combine/dw")) else looked
        looked = 2 if path.startswith("positions") else looked
        np.testing.assert_array_equal(parts[path].size, looked * counted.size, err_msg=path)
    np.testing.assert_array_equal(parts["head/x"].histogram, whole["head/x"].histogram)
    np.testing.assert_allclose(parts["loss/dx"].maximum, 2 * whole["loss/dx"].maximum, rtol=1e-5)


@pytest.mark.parametrize(("exponent", "zeros"), [(-6, 0.0), (-9, 0.50), (-10, 0.992)])
def test_telemetry_shows_the_logit_cotangent_die(
    exponent, zeros, tiny, draw_state, draw_batch, step_of
):
    """(p - y) / N of 512 tokens and 128 logits underflows f16 as `tests/mechanisms` derives it."""
    config = narrow(tiny)
    state, batch = draw_state(config, std=0.02), draw_batch(config)
    # A loss scale below 1 makes cotangents as small as a larger batch would.
    scale = jnp.asarray(2.0**exponent, jnp.float32)
    state = state._replace(opt_state=state.opt_state._replace(scale=scale))
    g = step_of(config, True)(state, batch)[1]["telemetry"]["head/g"]
    lost = (g.elements(Fate.ZERO) + g.elements(Fate.UNDERFLOW)) / g.size
    assert float(lost) == pytest.approx(zeros, abs=0.04 if exponent == -9 else 2e-3)


def delayed(state: Any) -> dict[str, ScaleState]:
    return paths.flatten(state.scaling, lambda node: isinstance(node, ScaleState))


def test_delayed_factors_follow_the_maxima_of_the_step_before(
    tiny, draw_state, draw_batch, step_of
):
    config = tiny(DELAYED, loss_scale=LossScaleConfig("static", 2.0**10))
    step = step_of(config)
    first = draw_state(config, std=0.2)
    assert {float(s) for d in delayed(first).values() for s in d.scale} == {1.0}
    second, _ = step(first, draw_batch(config))
    for path, one in delayed(second).items():
        assert one.history.shape == (2, 4), path
        np.testing.assert_array_equal(one.history > 0, [[True, False, False, False]] * 2, path)
        largest = 57344 if path.endswith("/g") else 448
        np.testing.assert_allclose(one.scale, one.history[:, 0] / largest, rtol=1e-6)
    kernel = np.abs(np.asarray(first.params["blocks"]["mlp"]["up"]["kernel"])).max((1, 2))
    np.testing.assert_array_equal(delayed(second)["blocks/mlp/up/w"].history[:, 0], kernel)
    third, _ = step(second, draw_batch(config, 1))
    assert np.all(delayed(third)["blocks/mlp/up/x"].history[:, :2] > 0)


def test_learned_factors_follow_the_loss_and_no_loss_scale(tiny, draw_state, draw_batch, step_of):
    """The second step learns; the loss scale changes nothing."""
    policy = "f32,w=int4@tensor.learned,x=int8@tensor.observed2"
    config = tiny(policy, loss_scale=LossScaleConfig("static", 2.0**10))
    step, batch = step_of(config), draw_batch(config)

    def after(scale: float) -> Any:
        state = draw_state(config, std=0.2)
        state = state._replace(opt_state=state.opt_state._replace(scale=jnp.float32(scale)))
        first = step(state, batch)[0]._replace(params=state.params)
        return delayed(first), delayed(step(first, batch)[0])

    first, second = after(2.0**3)
    _, other = after(2.0**12)
    for path, one in second.items():
        np.testing.assert_allclose(other[path].scale, one.scale, rtol=1e-4, err_msg=path)
        moved = np.asarray(one.scale != first[path].scale)
        assert moved.all() if path.endswith("/w") else not moved.any(), path


def test_evaluation_uses_learned_and_observed_factors(tiny, draw_state):
    config = tiny("f32,w=int4@tensor.learned,x=int8@tensor.delayed,g=int8@tensor.observed")
    state, phase = draw_state(config), phase_of(config)
    found = evaluated(state.params, state.scaling, phase)
    assert set(paths.flatten(found.factors)) == {
        path for path in delayed(draw_state(config)) if path.endswith("/w")
    }
    plain = tiny(DELAYED)
    state = draw_state(plain)
    assert evaluated(state.params, state.scaling, phase_of(plain)) is state.params


def test_histories_of_cotangents_are_free_of_the_loss_scale(tiny, draw_state, draw_batch, step_of):
    config = tiny(DELAYED, loss_scale=LossScaleConfig("static", 2.0**10))
    step, batch = step_of(config), draw_batch(config)

    def after(scale: float) -> Any:
        state = draw_state(config, std=0.2)
        state = state._replace(opt_state=state.opt_state._replace(scale=jnp.float32(scale)))
        # The very first step rounds cotangents at factor one, and that does see the loss scale.
        state = step(state, batch)[0]._replace(params=state.params)
        return step(state, batch)[0]

    small, large = delayed(after(2.0**8)), delayed(after(2.0**16))
    for path in small:
        newest = [d[path].history[:, 0] for d in (small, large)]
        np.testing.assert_allclose(*newest, rtol=0.05, err_msg=path)


def test_a_skipped_step_leaves_histories_alone(tiny, draw_state, draw_batch, step_of):
    config = tiny(DELAYED, loss_scale=LossScaleConfig("static", 2.0**10))
    step, batch = step_of(config), draw_batch(config)
    good, _ = step(draw_state(config, std=0.2), batch)
    params = jax.tree.map(lambda p: p, good.params)
    params["norm"]["scale"] = params["norm"]["scale"].at[0].set(jnp.nan)
    skipped, metrics = step(good._replace(params=params), batch)
    assert int(metrics["skipped_steps"]) == 1
    assert bits(skipped.scaling) == bits(good.scaling)


def test_delayed_scaling_of_some_blocks(tiny, draw_state, draw_batch, step_of):
    config = tiny("f32; blocks/1/mlp/up: w=e4m3@tensor.delayed4")
    assert set(delayed(draw_state(config))) == {"blocks/mlp/up/w"}
    state, metrics = step_of(config)(draw_state(config, std=0.2), draw_batch(config))
    assert np.isfinite(float(metrics["loss"]))
    assert np.all(delayed(state)["blocks/mlp/up/w"].history[1, 0] > 0)
    with pytest.raises(ValueError, match=r"blocks/\*/mlp/up.*every block the same"):
        scaling_of(
            tiny(
                "f32; blocks/0/mlp/up: w=e4m3@tensor.delayed4; "
                "blocks/1/mlp/up: w=e4m3@tensor.delayed8"
            )
        )


def test_scales_of_blocks_change_no_gradient_that_fits(tiny, draw_state, draw_batch, compile_fast):
    """Powers of two in f32: every cotangent is multiplied, and the gradient is the same bits."""
    config = tiny("f32", loss_scale=LossScaleConfig("dynamic", per_block=True)).resolved()
    mesh = sharding.make_mesh(config.mesh, jax.devices()[:1])
    loss = make_scaled_loss(phase_of(config), mesh)
    state, batch = draw_state(config, std=0.2), draw_batch(config)

    @compile_fast
    def gradients(scale: jax.Array) -> Any:
        scaled, _ = jax.grad(loss, has_aux=True)(state.params, batch, jax.random.key(0), scale)
        return loss_scale.unscale(scaled, scale, layout(config.model).stack)

    plain = gradients(jnp.ones(3, jnp.float32))
    scaled = gradients(jnp.asarray([2.0**5, 2.0**-3, 2.0**7], jnp.float32))
    assert bits(plain) == bits(scaled)


def underflow_and_skips(config: Any, draw: Any, step_of: Any) -> tuple[float, int]:
    """Over 60 steps: mean share of cotangents lost to underflow, and steps skipped."""
    draw_state, draw_batch = draw
    step, state, shares = step_of(config, True), draw_state(config, std=0.2), []
    for index in range(60):
        state, metrics = step(state, draw_batch(config, index % 4))
        census = [c for path, c in metrics["telemetry"].items() if path.endswith(("/dx", "/dw"))]
        lost = sum(float(np.sum(c.elements(Fate.UNDERFLOW))) for c in census)
        shares.append(lost / sum(float(np.sum(c.size)) for c in census))
    return float(np.mean(shares)), int(metrics["skipped_steps"])


def hard(tiny: Any, kind: str, per_block: bool = False) -> Any:
    """f16 on a loss times 2^-10; dynamic scaling tries a larger scale every other step."""
    scale = LossScaleConfig(kind, growth_interval=2, maximum=2.0**40, per_block=per_block)
    return tiny("mixed_f16", loss_multiplier=2.0**-10, loss_scale=scale)


@pytest.mark.long
def test_predictive_scaling_skips_nothing_and_loses_no_more_than_dynamic(
    tiny, draw_state, draw_batch, step_of
):
    draw = (draw_state, draw_batch)
    dynamic, skips = underflow_and_skips(hard(tiny, "dynamic"), draw, step_of)
    predictive, none = underflow_and_skips(hard(tiny, "predictive"), draw, step_of)
    assert skips > 0 == none
    assert predictive <= dynamic


def test_a_predicted_scale_for_each_block(tiny, draw_state, draw_batch, step_of):
    config = hard(tiny, "predictive", per_block=True)
    step, state = step_of(config), draw_state(config, std=0.2)
    for index in range(40):
        state, metrics = step(state, draw_batch(config, index % 4))
    assert int(metrics["skipped_steps"]) == 0
    assert state.opt_state.scale.shape == (3,)
    assert len(set(np.asarray(state.opt_state.scale).tolist())) > 1


def test_a_new_phase_keeps_the_histories_that_it_can_use(tiny, draw_state):
    old = tiny("f32,w=e4m3@tensor.delayed4,x=e4m3@tensor.delayed4")
    new = tiny("f32,w=e4m3@tensor.delayed4,x=e5m2@tensor.delayed4,g=e5m2@tensor.delayed4")
    seen = jax.tree.map(lambda leaf: leaf + 3, draw_state(old).scaling)
    carried = measure.carried_scaling(
        seen, layout(new.model), phase_of(old).sites, phase_of(new).sites
    )
    assert jax.tree.structure(carried) == jax.tree.structure(scaling_of(new))
    up = carried["blocks"]["mlp"]["up"]
    assert [float(up[role].history[0, 0]) for role in ("w", "x", "g")] == [3, 0, 0]


@pytest.mark.parametrize(("exact", "kind"), [(False, Census), (True, FullCensus)])
def test_telemetry_counts_a_sample_or_everything_as_the_config_says(tiny, exact, kind):
    config = tiny(telemetry=TelemetryConfig(every=1, exact=exact))
    found = jax.tree.leaves(slots_of(phase_of(config), telemetry=True), is_leaf=is_slot)
    assert {type(slot) for slot in found} == {kind}
