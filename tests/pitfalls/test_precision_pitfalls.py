"""Silent failures of narrow arithmetic in optimizers, layers and compilers."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import jmp
import numpy as np
import pytest

from lmjax.model import token_losses
from lmjax.optim.loss_scale import LossScaleConfig, unscale
from lmjax.optim.optimizer import OptimizerConfig, make_optimizer
from lmjax.optim.storage import apply_updates
from lmjax.precision import PolicyError, exact, parse_policy
from lmjax.precision.matmul import einsum

NO_SCALE = LossScaleConfig("none")


def stored_as(text: str) -> dict:
    """The formats of a tree with one parameter, `w`."""
    return {"w": parse_policy(text).resolve("head")}


def test_jmp_output_follows_compute():
    """`p=f32,c=bf16` hands on bf16: only an explicit `o` keeps the logits in f32."""
    assert parse_policy("p=f32,c=bf16").resolve("head").output.name == "bf16"
    assert parse_policy("p=f32,c=bf16,o=f32").resolve("head").output.name == "f32"


def test_jmp_cannot_print_policies_of_dtype_instances():
    """`str(policy)` raises KeyError for `np.dtype` members."""
    site = parse_policy("mixed_bf16").resolve("head")
    assert jmp.get_policy(str(site.jmp)) == site.jmp


@pytest.mark.parametrize("text", ["c=int8", "p=e8m0", "o=int4", "a=int8", "p=int8.sr"])
def test_a_format_that_cannot_be_computed_in_is_refused_and_not_ignored(text: str):
    """An unsupported name must never fall back to something wider."""
    with pytest.raises(PolicyError, match="nothing is stored or computed in"):
        parse_policy(text)


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_optax_adam_eps_rounds_to_zero_in_f16(name: str):
    """1e-8 is 0 in f16: a zero gradient gives NaN (optax#1754)."""
    params = {"w": jnp.ones((2, 2), jnp.float16)}
    optimizer = make_optimizer(
        OptimizerConfig(name=name, weight_decay=0.0), NO_SCALE, 10, stored_as("f16")
    )
    gradient = {"w": jnp.zeros((2, 2), jnp.float32)}
    updates, _ = optimizer.update(gradient, optimizer.init(params), params)
    stored, _ = apply_updates(params, updates, {}, stored_as("f16"), jax.random.key(0))
    np.testing.assert_array_equal(stored["w"], 1.0)
    assert float(jnp.float16(OptimizerConfig().eps)) == 0.0


def test_optax_global_norm_of_f16_overflows():
    """The norm of 1024 gradients of 100 is infinite in f16; clipping by it gives NaN."""
    params = {"w": jnp.zeros(1024, jnp.float16)}
    gradients = unscale({"w": jnp.full(1024, 100.0, jnp.float16)}, jnp.ones((), jnp.float32))
    lion = OptimizerConfig(name="lion", b2=0.0, weight_decay=0.0)
    optimizer = make_optimizer(lion, NO_SCALE, 10, stored_as("f16"))
    _, state = optimizer.update(gradients, optimizer.init(params), params)
    (moment,) = [leaf for leaf in jax.tree.leaves(state.inner) if leaf.ndim]
    np.testing.assert_allclose(np.linalg.norm(moment), 1.0, rtol=1e-5)
    assert int(state.skipped_steps) == 0


def test_optax_second_moment_sticks_in_bf16():
    """With b2 = 0.999 a bf16 moment of ones stops at 0.5 (optax#1552)."""
    params = {"w": jnp.ones(2, jnp.bfloat16)}
    optimizer = make_optimizer(
        OptimizerConfig(b2=0.999, clip_norm=0.0), NO_SCALE, 5000, stored_as("bf16")
    )
    gradient = {"w": jnp.ones(2, jnp.float32)}

    def body(state, _):
        return optimizer.update(gradient, state, params)[1], None

    run = exact.jit(lambda state: jax.lax.scan(body, state, length=3000)[0])
    state = run(optimizer.init(params))
    (nu,) = [s.nu for s in jax.tree.leaves(state.inner, is_leaf=is_adam) if is_adam(s)]
    np.testing.assert_allclose(nu["w"], 1 - 0.999**3000, rtol=1e-4)


def is_adam(node) -> bool:
    return hasattr(node, "nu")


def test_cross_entropy_of_bf16_logits_in_bf16():
    """The loss is off by up to 0.09 nats a token; the same logits through f32 by 0.016."""
    generator = np.random.default_rng(0)
    logits = generator.normal(size=(8, 64, 256)) * 2
    targets = generator.integers(0, 256, (8, 64), np.int32)
    narrow = jnp.asarray(logits, jnp.bfloat16)
    wide = np.asarray(narrow, np.float64)
    expected = (
        np.log(np.exp(wide).sum(-1)) - np.take_along_axis(wide, targets[..., None], -1)[..., 0]
    )

    def error(text: str) -> float:
        losses = token_losses(narrow, targets, parse_policy(text).resolve("loss")).cross_entropy
        return float(np.abs(np.asarray(losses, np.float64) - expected).max())

    assert error("pure_bf16") < 1e-4
    assert error("pure_bf16; loss: c=bf16") > 1e-2


def test_f16_masks_overflow_when_added_twice(compile_fast):
    """-1e9, or the smallest number twice, is -inf in f16, and a masked row NaN (flax#982)."""
    from lmjax.model import ModelConfig
    from lmjax.model.attention import Attention
    from lmjax.model.sites import QUIET

    attention = Attention(jax.random.key(0), ModelConfig(width=8, heads=1, max_positions=4))
    sites = {name: parse_policy("f16").resolve(name) for name in ("scores", "softmax")}
    sites["softmax"] = parse_policy("f16; softmax: c=f16").resolve("softmax")
    x = jnp.full((1, 4, 1, 1, 8), 100.0, jnp.float16)
    of = lambda q: attention.weights(q, -q[:, :, 0], sites, QUIET)
    weights, gradient = compile_fast(
        lambda q: (of(q), jax.grad(lambda p: jnp.sum(of(p)[..., 0]))(q))
    )(x)
    np.testing.assert_allclose(np.asarray(weights, np.float32).sum(-1), 1.0, atol=2e-3)
    assert np.isfinite(gradient).all(), "and neither is its gradient"


def test_xla_drops_roundings_by_default():
    """A bf16 chain is computed in f32 unless excess precision is off."""
    assert exact.dropped_roundings() == 0


def test_xla_keeps_f16_subnormals():
    """`reduce_precision(5, 10)` flushes 3e-7 to zero, which would fake a loss-scaling effect."""
    site = parse_policy("p=f32,c=f16").resolve("head")
    small = jnp.full((4,), 3e-7, jnp.float32)
    rounded = exact.jit(lambda x: site.to_compute(x).astype(jnp.float32))(small)
    np.testing.assert_array_equal(rounded, np.float32(np.float16(3e-7)))
    assert float(rounded[0]) > 0


def test_f32_products_are_not_tf32_or_bf16():
    """Without a precision an f32 product is TF32 on GPUs and bf16 on TPUs."""
    site = parse_policy("f32").resolve("head")
    x, w = jnp.ones((1, 2, 3), jnp.float32), jnp.ones((3, 4), jnp.float32)
    text = str(jax.make_jaxpr(lambda x, w: einsum("btk,kn->btn", x, w, site))(x, w))
    assert "HIGHEST" in text


def test_bf16_parameters_absorb_small_updates_only_when_stored_in_bf16():
    """1 + 1000 x 1e-3 is 1 in bf16: mixed policies must keep their parameters wide."""
    update = {"w": jnp.full(1, 1e-3, jnp.float32)}

    def after(text: str) -> float:
        sites, key = stored_as(text), jax.random.key(0)
        body = lambda _, params: apply_updates(params, update, {}, sites, key)[0]
        start = {"w": jnp.ones(1, sites["w"].params.dtype)}
        return float(exact.jit(lambda: jax.lax.fori_loop(0, 1000, body, start))()["w"][0])

    assert after("mixed_bf16") == pytest.approx(2.0, 1e-4)
    assert after("pure_bf16") == 1.0, "which is what it asks for"
