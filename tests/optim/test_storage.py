"""Stored parameters and moments: narrow between steps, f32 within them."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lmjax.optim.storage import (
    _encode,
    apply_updates,
    convert_moments,
    convert_params,
    initial_residuals,
    with_stored_moments,
)
from lmjax.precision import exact, parse_policy

SITE = "head"


def sites_for(text: str) -> dict:
    return {"w": parse_policy(text).resolve(SITE)}


def walk(text: str, steps: int, update: float, size: int = 4096) -> np.ndarray:
    """1.0 in the stored format, after `steps` updates of the same size."""
    sites = sites_for(text)
    params = {"w": sites["w"].to_params(jnp.ones(size, jnp.float32))}
    updates = {"w": jnp.full(size, update, jnp.float32)}

    def body(carry, index):
        key = jax.random.fold_in(jax.random.key(0), index)
        return apply_updates(*carry[:1], updates, carry[1], sites, key), None

    start = (params, initial_residuals(params, sites))
    (params, _), _ = exact.jit(lambda: jax.lax.scan(body, start, jnp.arange(steps)))()
    return np.asarray(params["w"], np.float64)


def test_nearest_bf16_loses_every_small_update():
    """1 + 1000 x 1e-3 stays 1: the failure that master weights exist for."""
    assert np.all(walk("p=bf16", 1000, 1e-3) == 1.0)


def test_f32_keeps_them():
    np.testing.assert_allclose(walk("p=f32", 1000, 1e-3), 2.0, rtol=1e-4)


def test_kahan_compensation_arrives_where_f32_does():
    """The residual array carries what each rounding lost; XLA must not fold it to zero."""
    np.testing.assert_allclose(walk("p=bf16.kahan", 1000, 1e-3), 2.0, rtol=2**-7)


def test_stochastic_rounding_arrives_on_average():
    values = walk("p=bf16.sr", 1000, 1e-3)
    error = values.std() / np.sqrt(values.size)
    assert abs(values.mean() - 2.0) < 4 * error + 1e-5
    assert values.std() > 0


def test_emulated_storage_holds_only_values_of_the_format():
    values = walk("p=e4m3,c=f32", 3, 0.3)
    assert set(values) <= set(parse_policy("p=e4m3,c=f32").resolve(SITE).params.values())


@pytest.mark.parametrize(("name", "result"), [("f16", np.inf), ("e4m3", 448.0), ("e5m7", np.inf)])
def test_updates_beyond_the_format_overflow_alike_in_every_rounding(name, result):
    """To infinity where the format has one, native or emulated; else to its largest value."""
    for update in ("", ".sr"):
        assert np.all(walk(f"p={name}{update},c=f32", 2, 1e5, size=8) == result), update


def test_residuals_exist_for_kahan_alone():
    params = {"w": jnp.ones(3, jnp.bfloat16)}
    assert initial_residuals(params, sites_for("p=bf16")) == {}
    residual = initial_residuals(params, sites_for("p=bf16.kahan"))["w"]
    assert residual.dtype == jnp.bfloat16
    assert not residual.any()


@pytest.mark.parametrize(
    ("policy", "mu_dtype", "nu_dtype"),
    [
        ("f32", "float32", "float32"),
        ("f32,mu=bf16,nu=bf16", "bfloat16", "bfloat16"),
        ("f32,mu=int8@block16,nu=e4m3@block16", "int8", "float8_e4m3fn"),
    ],
)
def test_moments_are_stored_as_the_policy_says(policy, mu_dtype, nu_dtype):
    tx = with_stored_moments(optax.scale_by_adam(), sites_for(policy))
    state = tx.init({"w": jnp.ones(64, jnp.float32)})
    stored = {name: jax.tree.leaves(getattr(state, name))[0].dtype for name in ("mu", "nu")}
    assert stored == {"mu": mu_dtype, "nu": nu_dtype}
    _, after = tx.update({"w": jnp.ones(64, jnp.float32)}, state)
    assert jax.tree.map(jnp.dtype, after) == jax.tree.map(jnp.dtype, state)


def test_the_step_uses_moments_before_they_are_rounded():
    """Only what the next step starts from is rounded: the first update equals that of f32."""
    gradients = {"w": jnp.asarray([1e-3, 0.37, -2.0], jnp.float32)}
    params = {"w": jnp.zeros(3, jnp.float32)}

    def first_update(policy):
        tx = with_stored_moments(optax.scale_by_adam(), sites_for(policy))
        return tx.update(gradients, tx.init(params))[0]["w"]

    np.testing.assert_array_equal(first_update("f32"), first_update("f32,mu=bf16,nu=e5m2"))


def test_block_moments_round_like_quantize_and_dequantize():
    gradients = {"w": jnp.linspace(-1, 1, 64, dtype=jnp.float32)}
    sites = sites_for("f32,mu=int8@block16")
    tx = with_stored_moments(optax.scale_by_adam(), sites)
    _, state = tx.update(gradients, tx.init(gradients))
    from lmjax.precision.scaling import fake_quantize
    from lmjax.precision.stored import decode

    read = decode(state.mu["w"], sites["w"].mu)
    exact_mu = 0.1 * gradients["w"]
    np.testing.assert_allclose(read, fake_quantize(exact_mu, sites["w"].mu), rtol=1e-6)
    assert float(jnp.max(jnp.abs(read - exact_mu))) > 0


def test_bf16_second_moment_with_b2_999_never_decays():
    """bf16 cannot hold 0.999 of a number: once large, the moment stays (optax#1552)."""

    def after(policy):
        tx = with_stored_moments(optax.scale_by_adam(b2=0.999), sites_for(policy))
        params = {"w": jnp.ones(1, jnp.float32)}
        state = tx.init(params)
        state = state._replace(nu=jax.tree.map(jnp.ones_like, state.nu))

        def body(state, _):
            return tx.update({"w": jnp.zeros(1, jnp.float32)}, state)[1], None

        state, _ = exact.jit(lambda s: jax.lax.scan(body, s, None, length=1000))(state)
        return float(jax.tree.leaves(state.nu)[0][0])

    assert after("f32") == pytest.approx(0.999**1000, rel=1e-3)
    assert after("f32,nu=bf16") == 1.0


# --- From the formats of one policy to those of another


def converted(old: str, new: str, values: np.ndarray, residuals: np.ndarray | None = None):
    """Values stored under `old`, with their residuals, as `new` stores them: values, residuals."""
    before, after = sites_for(old), sites_for(new)
    params = {"w": before["w"].to_params(jnp.asarray(values))}
    kept = {} if residuals is None else {"w": before["w"].to_params(jnp.asarray(residuals))}
    new_params, new_kept = exact.jit(lambda p, r: convert_params(p, r, before, after))(params, kept)
    return new_params["w"], new_kept.get("w")


def every_value(name: str) -> np.ndarray:
    """All finite values of a 16-bit format, in its own dtype; both zeros."""
    dtype = parse_policy(name).resolve(SITE).params.dtype
    values = np.arange(2**16, dtype=np.uint32).astype(np.uint16).view(dtype)
    return values[np.isfinite(values.astype(np.float32))]


@pytest.mark.parametrize("name", ["bf16", "f16"])
def test_widening_loses_nothing_and_leads_back(name: str):
    values = every_value(name)
    wide, _ = converted(f"p={name}", "p=f32", values)
    assert wide.dtype == jnp.float32
    np.testing.assert_array_equal(wide, values.astype(np.float32))
    back, _ = converted("p=f32", f"p={name}", np.asarray(wide))
    np.testing.assert_array_equal(np.asarray(back).view(np.uint16), values.view(np.uint16))


@pytest.mark.parametrize(("old", "new"), [("bf16", "f16"), ("f16", "bf16"), ("f16", "e4m3")])
def test_narrowing_rounds_once_to_nearest_however_updates_are_rounded(old: str, new: str):
    from lmjax.precision import parse_format, quantize

    values, number_format = every_value(old), parse_format(new)
    expected = quantize(jnp.asarray(values.astype(np.float32)), number_format, overflow="clamp")
    for update in ("", ".sr", ".kahan"):
        stored, _ = converted(f"p={old},c=f32", f"p={new}{update},c=f32", values)
        assert stored.dtype == (jnp.float32 if new == "e4m3" else number_format.dtype)
        np.testing.assert_array_equal(np.asarray(stored, np.float32), expected)


def sums_near_ties() -> tuple[np.ndarray, np.ndarray]:
    """Values of f32 halfway between values of f16, subnormal ones too, and what is beside them."""
    values = np.unique(every_value("f16").astype(np.float64))[1:-1]
    middle = ((values[1:] + values[:-1]) / 2).astype(np.float32)
    signs = np.resize([-1.0, 1.0, 0.0], middle.shape)
    return middle, (signs * np.abs(middle) * 2.0**-40).astype(np.float32)


def test_a_residual_that_disappears_is_rounded_into_its_parameter_once():
    """Added in f32 first, each of these sums would be a tie, and half of them would go astray."""
    param, residual = sums_near_ties()
    stored, kept = converted("p=f32.kahan", "p=f16,c=f32", param, residual)
    assert kept is None
    exactly = (param.astype(np.float64) + residual).astype(np.float16)
    np.testing.assert_array_equal(stored, exactly)
    assert np.mean((param + residual).astype(np.float16) != exactly) > 0.2


def test_widening_takes_the_residual_along():
    param = np.linspace(-2, 2, 999, dtype=np.float32)
    rounded = np.asarray(sites_for("p=bf16")["w"].to_params(jnp.asarray(param)))
    residual = param - rounded.astype(np.float32)
    stored, kept = converted("p=bf16.kahan", "p=f32", rounded, residual)
    residual = np.asarray(jnp.asarray(residual, jnp.bfloat16), np.float32)
    assert kept is None
    np.testing.assert_array_equal(stored, rounded.astype(np.float32) + residual)
    assert np.any(residual != 0)


def test_a_residual_that_appears_holds_what_narrowing_lost():
    values = np.random.default_rng(0).normal(size=999).astype(np.float32)
    stored, kept = converted("p=f32", "p=bf16.kahan", values)
    lost = jnp.asarray(values - np.asarray(stored, np.float32), jnp.bfloat16)
    np.testing.assert_array_equal(kept, lost)
    assert np.any(np.asarray(lost, np.float32) != 0)
    stored, kept = converted("p=bf16", "p=bf16.kahan", np.asarray(stored))
    assert kept.dtype == jnp.bfloat16
    assert not np.any(np.asarray(kept, np.float32))


def test_residuals_move_to_another_format_with_their_parameters():
    stored, kept = converted("p=f32", "p=bf16.kahan", np.float32([1 + 2**-9 + 2**-15, 65535]))
    stored, kept = converted("p=bf16.kahan", "p=f16.kahan,c=f32", stored, kept)
    assert stored.dtype == kept.dtype == jnp.float16
    assert float(stored[0]) + float(kept[0]) == 1 + 2**-9 + 2**-15
    assert np.isinf(stored[1]), "f16 ends there, as it does for an update"


def test_what_stays_alike_is_not_touched():
    old = sites_for("p=bf16.kahan,mu=int8@block16,nu=f32")
    new = sites_for("p=bf16.kahan,c=f32,mu=int8@block16,nu=bf16")
    params, residuals = {"w": jnp.ones(32, jnp.bfloat16)}, {"w": jnp.ones(32, jnp.bfloat16)}
    kept_params, kept_residuals = convert_params(params, residuals, old, new)
    assert kept_params["w"] is params["w"]
    assert kept_residuals["w"] is residuals["w"]
    state = with_stored_moments(optax.adamw(1e-3), old).init({"w": jnp.ones(32, jnp.float32)})
    after = convert_moments(state, old, new)
    assert after[0].count is state[0].count
    assert after[0].mu["w"].values is state[0].mu["w"].values
    assert after[0].mu["w"].scale is state[0].mu["w"].scale
    assert after[0].nu["w"].dtype == jnp.bfloat16


@pytest.mark.parametrize("name", ["bf16", "e5m7", "int8@block16", "e4m3@tensor"])
def test_moments_are_read_and_stored_anew(name: str):
    wide, narrow = sites_for("f32"), sites_for(f"f32,mu={name}")
    mu = jnp.asarray(np.random.default_rng(0).normal(size=(3, 32)), jnp.float32)
    tx = with_stored_moments(optax.scale_by_lion(), wide)
    state = tx.init({"w": mu})._replace(mu={"w": mu})
    there = convert_moments(state, wide, narrow)
    assert bits(there.mu["w"]) == bits(_encode(mu, narrow["w"].mu))
    back = convert_moments(there, narrow, wide).mu["w"]
    assert back.dtype == jnp.float32
    assert float(jnp.max(jnp.abs(back - mu))) < 0.25
    again = convert_moments(state._replace(mu={"w": back}), wide, narrow)
    assert bits(again.mu["w"]) == bits(there.mu["w"]), "widening lost nothing"


def bits(tree) -> list[bytes]:
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(tree)]
