"""Stored parameters and moments: narrow between steps, f32 within them."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lmjax.precision import exact, parse_policy
from lmjax.storage import apply_updates, initial_residuals, with_stored_moments

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


@pytest.mark.parametrize(("name", "result"), [("f16", np.inf), ("e4m3", 448.0), ("e5m7", 65280.0)])
def test_updates_beyond_the_format_overflow_alike_in_every_rounding(name, result):
    """A narrow native format overflows as its hardware does; an emulated one saturates."""
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
    from lmjax.storage import _decode

    read = _decode(state.mu["w"], sites["w"].mu)
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
