"""Every setting of a policy is obeyed by the whole train step: each test goes red if it is not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmjax.precision import parse_format, paths
from lmjax.precision.rounding import quantize
from lmjax.precision.scaling import Quantized
from lmjax.runs.resolved import phase_of


def one_block(tiny: Any, policy: str) -> Any:
    """A tiny config; without clipping, which would spread a change to every gradient."""
    return tiny(policy, model={"layers": 1}, optimizer={"clip_norm": 0.0})


@pytest.fixture(scope="module")
def trained(tiny, draw_state, draw_batch, compiled_step) -> Callable[..., Any]:
    """`trained(policy, steps)`: the states and metrics of a few steps from one starting point."""

    def run(policy: str, steps: int = 1, change: Any = None) -> tuple[list[Any], list[Any]]:
        config = one_block(tiny, policy)
        state, batch = draw_state(config, std=0.2), draw_batch(config)
        if change is not None:
            state = state._replace(params=change(state.params))
        states, metrics = [state], []
        for _ in range(steps):
            state, measured = compiled_step(config)(state, batch)
            states.append(state)
            metrics.append(measured)
        return states, metrics

    return run


def bits(tree: Any) -> dict[str, bytes]:
    return {path: np.asarray(x).tobytes() for path, x in paths.flatten(tree).items()}


def moments(state: Any, name: str) -> dict[str, Any]:
    """Stored first or second moments, by the path of their parameter."""
    has = lambda node: hasattr(node, name)
    (adam,) = [s for s in jax.tree.leaves(state.opt_state, is_leaf=has) if has(s)]
    leaves, _ = jax.tree_util.tree_flatten_with_path(
        getattr(adam, name), is_leaf=lambda node: isinstance(node, Quantized)
    )
    return {paths.path_string(keys): leaf for keys, leaf in leaves}


def is_value(x: Any, name: str) -> bool:
    return bool(np.all(np.isin(np.asarray(x, np.float64), parse_format(name).values())))


def round_block_kernels(params: Any) -> Any:
    """What `w=e4m3` makes of the linear layers inside blocks."""
    flat = paths.flatten(params)
    return paths.unflatten(
        {
            path: quantize(x, "e4m3") if paths.matches("blocks/**/kernel", path) else x
            for path, x in flat.items()
        }
    )


def test_w_is_a_rounding_of_the_kernels_through_which_gradients_pass(trained):
    states, metrics = trained("f32,w=e4m3")
    rounded_states, rounded_metrics = trained("f32", change=round_block_kernels)
    _, plain = trained("f32")
    loss = lambda measured: float(measured[0]["loss"])
    assert loss(metrics) == pytest.approx(loss(rounded_metrics), rel=1e-6)
    assert abs(loss(metrics) - loss(plain)) > 1e-5
    wanted = moments(rounded_states[1], "mu")
    for path, mu in moments(states[1], "mu").items():
        np.testing.assert_allclose(mu, wanted[path], rtol=1e-3, atol=1e-7, err_msg=path)
    assert not is_value(states[1].params["blocks"]["mlp"]["up"]["kernel"], "e4m3"), "masters stay"


@pytest.mark.parametrize("setting", ["x=e4m3", "a=e8m5@block4", "m=tf32"])
def test_x_a_and_m_reach_forward_and_backward(setting: str, trained):
    (_, after), (metrics,) = trained(f"f32,{setting}")
    (_, plain), (plain_metrics,) = trained("f32")
    assert float(metrics["loss"]) != float(plain_metrics["loss"])
    assert float(metrics["loss"]) == pytest.approx(float(plain_metrics["loss"]), rel=0.05)
    wanted = moments(plain, "mu")
    for path, mu in moments(after, "mu").items():
        assert np.any(np.asarray(mu) != np.asarray(wanted[path])), path


def test_g_rounds_cotangents_alone_and_anew_in_every_step(trained, tiny, draw_batch, compiled_step):
    policy = "f32,g=e5m2@tensor.sr"
    (start, after), (metrics,) = trained(policy)
    (_, plain), (plain_metrics,) = trained("f32")
    assert float(metrics["loss"]) == float(plain_metrics["loss"]), "forward is untouched"
    ours, theirs = moments(after, "mu"), moments(plain, "mu")
    for path in ("blocks/mlp/up/kernel", "blocks/attention/query/kernel", "embed/table"):
        assert np.any(np.asarray(ours[path]) != np.asarray(theirs[path])), path
    # What lies behind the blocks has seen no quantized cotangent yet.
    np.testing.assert_array_equal(ours["norm/scale"], theirs["norm/scale"])

    step, batch = compiled_step(one_block(tiny, policy)), draw_batch(one_block(tiny, policy))
    norm = lambda n: float(step(start._replace(step=jnp.int32(n)), batch)[1]["grad_norm"])
    assert norm(0) == norm(0)
    assert len({norm(n) for n in range(4)}) == 4


def test_moments_are_stored_in_their_formats_and_read_by_the_next_step(trained):
    states, _ = trained("f32,mu=int8@block16,nu=e5m7", steps=2)
    plain, _ = trained("f32", steps=2)
    for path, moment in moments(states[1], "mu").items():
        assert isinstance(moment, Quantized), path
        assert moment.values.dtype == np.int8, path
        assert np.abs(np.asarray(moment.values, np.int32)).max() == 127, path
    for path, moment in moments(states[1], "nu").items():
        assert moment.dtype == jnp.float16, path
        assert is_value(moment, "e5m7"), path
    assert bits(states[1].params) == bits(plain[1].params), "the first step has unrounded moments"
    assert bits(states[2].params) != bits(plain[2].params)


def test_emulated_parameters_are_values_of_their_format_after_every_step(trained):
    name = "e5m7"
    states, _ = trained(f"p={name},c=f32", steps=2)
    for state in states:
        for path, value in paths.flatten(state.params).items():
            assert value.dtype == jnp.float32, path
            assert is_value(value, name), path
    assert bits(states[2].params) != bits(states[0].params)


def test_an_emulated_compute_format_reaches_the_logits(tiny, draw_params, draw_batch, compile_fast):
    from lmjax.model import apply

    def logits(policy: str) -> Any:
        config = tiny(policy, model={"layers": 1})
        run = compile_fast(
            lambda params, tokens: apply(
                params, tokens, config=config.model, sites=phase_of(config).sites
            )
        )
        return run(draw_params(config, std=0.2), draw_batch(config)["inputs"])

    assert is_value(logits("p=f32,c=e5m7"), "e5m7")
    assert is_value(logits("p=f32,c=f32,o=e3m4"), "e3m4")
    assert not is_value(logits("f32"), "e5m7")


# --- stored updates


@pytest.mark.long
def test_stochastic_updates_are_one_of_both_neighbours_and_follow_the_key(
    trained, tiny, draw_batch, compiled_step
):
    policy = "p=bf16.sr,c=f32"
    (start, after), _ = trained(policy)
    (_, nearest), _ = trained("p=bf16,c=f32")
    assert {x.dtype.name for x in jax.tree.leaves(after.params)} == {"bfloat16"}
    ours, theirs = paths.flatten(after.params), paths.flatten(nearest.params)
    apart = {path: np.asarray(ours[path] != theirs[path]) for path in ours}
    assert sum(d.sum() for d in apart.values()) > 0.05 * sum(d.size for d in apart.values())
    for path, other in theirs.items():
        gap = np.abs(np.asarray(ours[path], np.float32) - np.asarray(other, np.float32))
        spacing = np.spacing(np.abs(np.asarray(other)).astype(np.float32)) * 2.0**16
        assert np.all(gap <= spacing), path

    config = one_block(tiny, policy)
    step = lambda state: compiled_step(config)(state, draw_batch(config))[0].params
    assert bits(step(start)) == bits(after.params)
    assert bits(step(start._replace(key=start.key + 1))) != bits(after.params)
    assert start.residuals == {}


def test_kahan_residuals_hold_what_the_parameters_lost(trained):
    (start, after), _ = trained("p=bf16.kahan,c=f32")
    (_, nearest), _ = trained("p=bf16,c=f32")
    assert bits(after.params) == bits(nearest.params), "the first step has nothing to compensate"
    wide = jax.tree.map(lambda x: x.astype(jnp.float32), start.params)
    (_, exact), _ = trained("f32", change=lambda _: wide)
    assert not any(np.any(np.asarray(x, np.float32)) for x in jax.tree.leaves(start.residuals))
    lost, stored = paths.flatten(after.residuals), paths.flatten(after.params)
    for path, wanted in paths.flatten(exact.params).items():
        assert lost[path].dtype == jnp.bfloat16
        assert np.any(np.asarray(lost[path], np.float32)), path
        sum_ = np.asarray(stored[path], np.float32) + np.asarray(lost[path], np.float32)
        off, rounded = np.abs(sum_ - wanted), np.abs(np.asarray(stored[path], np.float32) - wanted)
        assert off.max() < rounded.max() / 64, path


def test_kahan_residuals_come_back_in_the_next_step(trained):
    compensated, _ = trained("p=bf16.kahan,c=f32", steps=2)
    nearest, _ = trained("p=bf16,c=f32", steps=2)
    assert bits(compensated[2].params) != bits(nearest[2].params)


def test_a_skipped_step_keeps_residuals_and_narrow_moments(
    tiny, draw_state, draw_batch, compiled_step
):
    config = one_block(tiny, "p=bf16.kahan,c=f16,o=f32,mu=bf16,nu=int8@block16")
    batch, step = draw_batch(config), compiled_step(config)
    before, _ = step(draw_state(config), batch)
    assert any(np.any(np.asarray(x, np.float32)) for x in jax.tree.leaves(before.residuals))
    scale = before.opt_state._replace(scale=jnp.float32(2.0**24))
    after, metrics = step(before._replace(opt_state=scale), batch)
    assert int(metrics["skipped_steps"]) == 1
    assert bits(after.params) == bits(before.params)
    assert bits(after.residuals) == bits(before.residuals)
    assert bits(after.opt_state.inner) == bits(before.opt_state.inner)
    following, metrics = step(before, batch)
    assert int(metrics["skipped_steps"]) == 0
    assert bits(following.residuals) != bits(before.residuals)


# --- asking for nothing


def test_a_plain_policy_traces_to_no_quantization(tiny, draw_state, draw_batch, equations):
    """Rounding works on bits. Without any, only norms look at them, to scale what they square."""
    from lmjax.parallel import sharding
    from lmjax.train.step import train_step

    def on_bits(policy: str) -> int:
        config = tiny(policy, model={"layers": 1}).resolved()
        mesh = sharding.make_mesh(config.mesh, jax.devices()[:1])
        jaxpr = jax.make_jaxpr(train_step(phase_of(config), mesh))(
            draw_state(config), draw_batch(config)
        )
        return len(
            equations(jaxpr, "bitcast_convert_type", "shift_right_logical", "reduce_precision")
        )

    plain = on_bits("f32")
    for policy in ("mixed_bf16", "mixed_f16", "pure_bf16", "p=bf16.kahan,c=bf16,o=f32"):
        assert on_bits(policy) == plain, policy
    for policy in ("fp8", "f32,m=tf32", "p=bf16.sr", "f32,a=bf16", "f32,mu=int8@block16"):
        assert on_bits(policy) > plain, policy
