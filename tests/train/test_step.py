"""The train step: every policy learns, a skipped step changes nothing, scaling leaves no trace."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmjax.parallel import sharding
from lmjax.precision import paths
from lmjax.runs.resolved import phase_of
from lmjax.runs.state import initial_state
from lmjax.train import make_eval_step, make_train_step
from lmjax.train.step import make_scaled_loss

POLICIES = ["f32", "mixed_bf16", "mixed_f16", "pure_bf16", "pure_f16"]


def with_scale(state, **fields):
    """The state with some fields of its loss scale replaced."""
    typed = {
        name: jnp.asarray(x, getattr(state.opt_state, name).dtype) for name, x in fields.items()
    }
    return state._replace(opt_state=state.opt_state._replace(**typed))


def assert_equal(actual, expected):
    """Equal bit for bit; a NaN equals itself."""
    bits = lambda tree: {path: np.asarray(x).tobytes() for path, x in paths.flatten(tree).items()}
    assert bits(actual) == bits(expected)


@pytest.mark.parametrize(
    ("policy", "family"),
    [
        *((policy, "gpt2") for policy in POLICIES),
        *(pytest.param(policy, "llama", marks=pytest.mark.long) for policy in POLICIES[:-1]),
        (POLICIES[-1], "llama"),
    ],
)
def test_one_batch_is_learnt_by_heart(policy, family, tiny, draw_state, draw_batch, compiled_step):
    config = tiny(policy, family)
    state, batch, step = draw_state(config), draw_batch(config), compiled_step(config)
    losses = []
    for _ in range(60):
        state, metrics = step(state, batch)
        losses.append(float(metrics["loss"]))
    assert losses[0] == pytest.approx(np.log(64), rel=0.1)
    assert losses[-1] < 1.0
    assert int(metrics["skipped_steps"]) == 0, "not even the first steps are skipped"
    assert int(state.step) == 60


@pytest.mark.long
@pytest.mark.parametrize("name", ["lion", "muon"])
def test_other_optimizers_learn_it_too(name, tiny, draw_state, draw_batch, compiled_step):
    rates = {"learning_rate": 5e-3, "adam_learning_rate": 1e-2}
    config = tiny("mixed_bf16", optimizer={"name": name} | rates)
    state, batch, step = draw_state(config), draw_batch(config), compiled_step(config)
    for _ in range(80):
        state, metrics = step(state, batch)
    assert float(metrics["loss"]) < 2.0


def test_an_overflow_skips_the_step_and_halves_the_scale(
    tiny, draw_state, draw_batch, compiled_step
):
    config = tiny("mixed_f16")
    batch, step = draw_batch(config), compiled_step(config)
    before, _ = step(draw_state(config), batch)  # moments, counts and schedule are under way
    before = with_scale(before, scale=2.0**24)
    after, metrics = step(before, batch)
    assert int(metrics["skipped_steps"]) == int(metrics["consecutive_skips"]) == 1
    assert np.isfinite(float(metrics["loss"]))
    assert not np.isfinite(float(metrics["grad_norm"]))
    assert float(metrics["loss_scale"]) == 2.0**24, "the scale that this step used"
    assert float(after.opt_state.scale) == 2.0**23
    assert_equal(after.params, before.params)
    assert_equal(after.opt_state.inner, before.opt_state.inner)
    assert int(after.step) == int(before.step) + 1
    following, _ = step(with_scale(before, scale=2.0**15), batch)
    recovered, metrics = step(with_scale(after, scale=2.0**15), batch)
    assert_equal(recovered.params, following.params)
    assert float(metrics["learning_rate"]) == pytest.approx(1e-2 * 2 / 5), "skips do not count"


def test_the_scale_falls_until_training_continues(tiny, draw_state, draw_batch, compiled_step):
    config = tiny("pure_f16")
    state, batch, step = draw_state(config), draw_batch(config), compiled_step(config)
    state = with_scale(state, scale=2.0**24)
    while True:
        state, metrics = step(state, batch)
        if not int(metrics["consecutive_skips"]):
            break
        assert int(metrics["skipped_steps"]) < 24
    assert int(metrics["skipped_steps"]) > 0
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(state.params))


def test_the_growth_step_keeps_the_gradient(tiny, draw_state, draw_batch, compiled_step):
    config = tiny("mixed_f16")
    start, batch, step = draw_state(config), draw_batch(config), compiled_step(config)
    growing = with_scale(start, good_steps=config.loss_scale.growth_interval - 1)
    plain, plain_metrics = step(start, batch)
    grown, metrics = step(growing, batch)
    assert float(grown.opt_state.scale) == 2 * float(plain.opt_state.scale)
    assert float(metrics["loss_scale"]) == float(plain_metrics["loss_scale"])
    assert float(metrics["grad_norm"]) == float(plain_metrics["grad_norm"])
    assert_equal(grown.params, plain.params)
    assert_equal(grown.opt_state.inner, plain.opt_state.inner)


@pytest.mark.parametrize("policy", ["f32", "mixed_bf16"])
def test_a_power_of_two_scale_leaves_no_trace(policy, tiny, draw_state, draw_batch, compiled_step):
    config = tiny(policy)
    state, batch, step = draw_state(config), draw_batch(config), compiled_step(config)
    plain, plain_metrics = step(state, batch)
    scaled, metrics = step(with_scale(state, scale=2.0**12), batch)
    assert_equal(scaled.params, plain.params)
    assert float(metrics["loss"]) == float(plain_metrics["loss"]), "metrics are not scaled"


def test_four_micro_batches_equal_one_batch(tiny, draw_state, draw_batch, compiled_step):
    whole, cut = tiny(), tiny(micro_batches=4)
    state, batch = draw_state(whole, std=0.2), draw_batch(whole)
    expected, expected_metrics = compiled_step(whole)(state, batch)
    actual, metrics = compiled_step(cut)(state, batch)
    for name in ("loss", "grad_norm"):
        assert float(metrics[name]) == pytest.approx(float(expected_metrics[name]), rel=1e-5)
    moments = lambda s: s.opt_state.inner
    close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-7)
    jax.tree.map(close, moments(actual), moments(expected))


def micro_config(tiny):
    return tiny(
        "p=bf16,c=bf16,o=f32", "llama", micro_batches=2, optimizer={"clip_norm": 0.0, "b1": 0.5}
    )


def test_narrow_gradients_of_micro_batches_are_summed_in_f32(
    tiny, draw_state, draw_batch, compiled_step, compile_fast
):
    config = micro_config(tiny)
    state, batch = draw_state(config, std=0.2), draw_batch(config)
    mesh = sharding.make_mesh(config.mesh, jax.devices()[:1])
    gradient = compile_fast(jax.grad(make_scaled_loss(phase_of(config), mesh), has_aux=True))
    scale, key = jnp.ones((), jnp.float32), jax.random.key(0)
    parts = [jax.tree.map(lambda rows, i=i: rows[i::2], batch) for i in range(2)]
    wide = [
        jax.tree.map(lambda g: np.asarray(g, np.float32), gradient(state.params, p, key, scale)[0])
        for p in parts
    ]
    expected = jax.tree.map(lambda a, b: (a + b) / 2, *wide)
    after, _ = compiled_step(config)(state, batch)
    (mu,) = [s.mu for s in jax.tree.leaves(after.opt_state.inner, is_leaf=has_mu) if has_mu(s)]
    jax.tree.map(
        lambda m, g: np.testing.assert_allclose(m, 0.5 * g, rtol=1e-6, atol=1e-9), mu, expected
    )
    rounded = jax.tree.map(lambda g: g.astype(jnp.bfloat16).astype(np.float32), expected)
    off = [np.any(a != b) for a, b in zip(*map(jax.tree.leaves, (rounded, expected)), strict=True)]
    assert all(off), "a bf16 sum would have been seen"


def has_mu(node) -> bool:
    return hasattr(node, "mu")


def test_one_bad_micro_batch_skips_the_step_and_poisons_nothing(
    tiny, draw_state, draw_batch, compiled_step
):
    config = micro_config(tiny)
    state, batch, step = draw_state(config), draw_batch(config), compiled_step(config)
    table = state.params["embed"]["table"].at[63].set(jnp.nan)
    state = state._replace(params=state.params | {"embed": {"table": table}})
    good = jax.tree.map(lambda rows: jnp.minimum(rows, 62), batch)
    bad = good | {"inputs": good["inputs"].at[1, 0].set(63)}  # row 1: the second micro-batch alone
    state, _ = step(state, good)
    after, metrics = step(state, bad)
    assert int(metrics["skipped_steps"]) == 1
    assert_equal(after.params, state.params)
    assert_equal(after.opt_state.inner, state.opt_state.inner)
    expected, _ = step(state, good)
    recovered, metrics = step(after, good)
    assert np.isfinite(float(metrics["loss"]))
    assert_equal(recovered.params, expected.params)
    assert np.any(recovered.params["head"]["kernel"] != after.params["head"]["kernel"])


def test_dropout_differs_by_step_and_repeats_with_it(tiny, draw_state, draw_batch, compiled_step):
    config = tiny(model={"dropout": 0.3})
    state, batch, step = draw_state(config, std=0.3), draw_batch(config), compiled_step(config)
    loss = lambda number: float(step(state._replace(step=jnp.int32(number)), batch)[1]["loss"])
    assert loss(0) == loss(0)
    assert len({loss(number) for number in range(4)}) == 4
    other_key = state._replace(key=state.key + 1)
    assert float(step(other_key, batch)[1]["loss"]) != loss(0)


def test_the_z_loss_is_added_with_its_weight(tiny, draw_params, draw_batch, compile_fast):
    def loss(weight: float) -> float:
        config = tiny(model={"z_loss": weight})
        mesh = sharding.make_mesh(config.mesh, jax.devices()[:1])
        run = compile_fast(make_scaled_loss(phase_of(config), mesh))
        return float(
            run(draw_params(config), draw_batch(config), None, jnp.ones((), jnp.float32))[1]
        )

    # With logits near 0 the log-partition is log(64) for every token.
    assert loss(0.1) - loss(0.0) == pytest.approx(0.1 * np.log(64) ** 2, rel=1e-2)


def test_initial_states_follow_the_seed(tiny, compile_fast):
    one, two = tiny(seed=1).resolved(), tiny(seed=2).resolved()
    a, b, c = compile_fast(lambda: (initial_state(one), initial_state(one), initial_state(two)))()
    assert_equal(a, b)
    drawn = {p: x for p, x in paths.flatten(a.params).items() if p.endswith(("kernel", "table"))}
    others = paths.flatten(c.params)
    for path, values in drawn.items():
        assert np.mean(np.asarray(values) != np.asarray(others[path])) > 0.99, path
        ends = path.endswith(("out/kernel", "down/kernel"))
        assert np.std(values) == pytest.approx(0.02 / (2.0 if ends else 1.0), rel=0.15), path
        if path.startswith("blocks"):
            assert np.any(values[0] != values[1]), "blocks start out different"
    assert not np.array_equal(a.key, c.key)


def test_the_public_step_donates_and_evaluation_weighs_tokens(tiny, draw_state, draw_batch):
    config = tiny("mixed_f16")
    mesh = sharding.make_mesh(config.mesh, jax.devices()[:1])
    state = draw_state(config)
    batch = draw_batch(config)
    evaluate = make_eval_step(config, mesh)
    ones = jnp.ones(batch["inputs"].shape, jnp.float32)
    nats, tokens = evaluate(state.params, batch | {"weights": ones})
    first, rest = ones.at[1:].set(0), ones.at[0].set(0)
    parts = [evaluate(state.params, batch | {"weights": w})[0] for w in (first, rest)]
    assert float(tokens) == 64
    assert float(sum(parts)) == pytest.approx(float(nats), rel=1e-6)

    after, metrics = make_train_step(config, mesh)(state, batch)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state))
    assert float(metrics["loss"]) == pytest.approx(float(nats / tokens), rel=1e-6)
    assert int(after.step) == 1


def test_padding_does_not_count_even_where_it_is_nan(tiny, draw_params):
    """Only the padding reads the token whose embedding is NaN."""
    config = tiny("f32", "llama", batch_size=2)
    params = draw_params(config)
    table = params["embed"]["table"].at[63].set(jnp.nan)
    tokens = np.asarray([[1, 2] * 8, [63] * 16], np.int32)
    weights = np.repeat(np.asarray([[1.0], [0.0]], np.float32), 16, axis=1)
    batch = {"inputs": tokens, "targets": np.ones_like(tokens), "weights": weights}
    mesh = sharding.make_mesh(config.mesh, jax.devices()[:1])
    evaluate = make_eval_step(config, mesh)
    expected = [float(x) for x in evaluate(params, batch)]
    poisoned = params | {"embed": params["embed"] | {"table": table}}
    assert [float(x) for x in evaluate(poisoned, batch)] == expected
    assert expected[1] == 16


def test_without_z_loss_large_logits_do_not_make_the_loss_nan(tiny, draw_params, draw_batch):
    config = tiny("f32")
    params = draw_params(config)
    params["embed"]["table"] = params["embed"]["table"] * 1e22
    mesh = sharding.make_mesh(config.mesh, jax.devices()[:1])
    scaled_loss = make_scaled_loss(phase_of(config), mesh)
    _, loss = scaled_loss(params, draw_batch(config), jax.random.key(0), jnp.ones(()))
    assert 1e19 < float(loss) < np.inf
