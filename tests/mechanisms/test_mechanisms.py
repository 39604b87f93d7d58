"""How narrow arithmetic fails: the mechanisms behind published ablations, each in about a second.

They need no training: each is arithmetic that can be stated beforehand, done by the same functions
that a run uses. A mechanism that is gone here cannot be seen in a loss either.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lmjax.model import ModelConfig, token_losses
from lmjax.model.layers import rotary_angles, rotate
from lmjax.precision import exact, parse_policy
from lmjax.precision.matmul import einsum
from lmjax.precision.rounding import quantize
from lmjax.storage import with_stored_moments

TOKENS, VOCABULARY = 512, 128


def logit_cotangent(exponent: int) -> tuple[float, float]:
    """Share of zeros of the f16 logit cotangent, and its row sums in units of the true class'."""
    generator = np.random.default_rng(0)
    logits = jnp.asarray(generator.normal(0, 0.02, (1, TOKENS, VOCABULARY)), jnp.float16)
    targets = jnp.asarray(generator.integers(0, VOCABULARY, (1, TOKENS)), jnp.int32)
    site = parse_policy("mixed_f16").resolve("loss")

    def loss(logits: jax.Array) -> jax.Array:
        return jnp.mean(token_losses(logits, targets, site).cross_entropy) * 2.0**exponent

    cotangent = np.asarray(exact.jit(jax.grad(loss))(logits)[0], np.float64)
    true_class = 2.0**exponent / TOKENS * (1 - 1 / VOCABULARY)
    return float(np.mean(cotangent == 0)), float(cotangent.sum(-1).mean() / true_class)


@pytest.mark.parametrize(
    ("exponent", "zeros", "row_sum"),
    [(0, 0.0, 0.0), (-6, 0.0, 0.0), (-9, 0.50, -0.009), (-10, 0.992, -1.000)],
)
def test_f16_logit_cotangents_lose_the_push_down_term_first(exponent, zeros, row_sum):
    """(p - y) / N rounds to 0 below 2^-25: p / N = 2^-16 does at 2^-9 for half of all logits.

    The -1 / N of the true class survives, so the gradient is biased and not just small
    (Micikevicius et al. 2018, section 3.2, is the case for loss scaling).
    """
    share, total = logit_cotangent(exponent)
    assert share == pytest.approx(zeros, abs=0.03 if exponent == -9 else 1e-3)
    assert total == pytest.approx(row_sum, abs=0.04 if exponent == -9 else 0.01)


def second_moments(nu: str, b2: float, steps: int = 300) -> np.ndarray:
    """Stored second moments `[steps, 256]`: large gradients for a third of the time, then small."""
    sites = {"w": parse_policy(f"f32,nu={nu}").resolve("head")}
    optimizer = with_stored_moments(optax.scale_by_adam(b2=b2), sites)
    draws = jax.random.normal(jax.random.key(0), (steps, 256), jnp.float32)
    sizes = jnp.where(jnp.arange(steps) < steps // 3, 1.0, 1e-3)[:, None].astype(jnp.float32)

    def body(state, gradient):
        _, state = optimizer.update({"w": gradient}, state)
        return state, state.nu["w"].astype(jnp.float32)

    start = optimizer.init({"w": jnp.zeros(256, jnp.float32)})
    return np.asarray(exact.jit(lambda: jax.lax.scan(body, start, draws * sizes)[1])())


def test_bf16_second_moments_cannot_fall_at_b2_999():
    """A fall of 0.1% is less than half the spacing of bf16 (Collage, Yu et al. 2024)."""
    assert float(quantize(jnp.float32(0.999), "bf16")) == 1.0
    stuck, wide = second_moments("bf16", 0.999), second_moments("f32", 0.999)
    assert np.all(np.diff(stuck, axis=0) >= 0)
    assert np.all(wide[-1] < 0.9 * wide[99])
    assert np.all(stuck[-1] >= stuck[99])


def test_bf16_second_moments_fall_at_b2_95():
    """DeepSeek-V3 keeps moments in bf16, with b2 = 0.95."""
    narrow, wide = second_moments("bf16", 0.95), second_moments("f32", 0.95)
    np.testing.assert_allclose(narrow[150], wide[150], rtol=0.1)
    assert np.all(narrow[150] < 0.2 * narrow[99])


def accumulation_error(accumulator: str, terms: int) -> float:
    """Mean relative error of sums of numbers from U(0.5, 1.5)."""
    x = np.random.default_rng(0).uniform(0.5, 1.5, (1, 16, terms)).astype(np.float32)
    site = parse_policy(f"f32,a={accumulator}").resolve("embed")
    ones = jnp.ones((terms, 1), jnp.float32)
    total = exact.jit(lambda x: einsum("btk,kn->btn", x, ones, site))(x)
    wanted = x.astype(np.float64).sum(-1, keepdims=True)
    return float(np.mean(np.abs(np.asarray(total, np.float64) - wanted) / wanted))


@pytest.mark.parametrize(("name", "terms", "lost"), [("bf16", 1024, 0.50), ("f16", 16384, 0.75)])
def test_chunks_repair_a_narrow_accumulator(name: str, terms: int, lost: float):
    """A running sum swamps its terms; sums of 64 do not (Wang et al. 2018, section 2.3)."""
    sequential = accumulation_error(f"{name}@block1", terms)
    chunked = accumulation_error(f"{name}@block64", terms)
    assert sequential == pytest.approx(lost, abs=0.05)
    assert chunked <= sequential / 20


def rotary_error(rule: str, start: int, distance: int = 16, pairs: int = 256) -> float:
    """Mean error of scores q(start + distance) . k(start) of N(0, 1) vectors, 64 wide."""
    config = ModelConfig(width=64, heads=1, positions="rope", rope_base=10000.0)
    site = parse_policy(f"f32{rule}").resolve("blocks/0/attention/rope")
    generator = np.random.default_rng(0)
    q, k = generator.normal(size=(2, pairs, 1, 1, 64))

    def turned(x: np.ndarray, position: int) -> np.ndarray:
        angles = rotary_angles(config, position + 1, site)
        here = tuple(a[position:] for a in angles)
        return np.asarray(rotate(jnp.asarray(x, jnp.float32), here, site), np.float64)

    def exactly(x: np.ndarray, position: int) -> np.ndarray:
        angles = position * 10000.0 ** (-np.arange(32) / 32)
        turn = np.exp(1j * angles) * (x[..., :32] + 1j * x[..., 32:])
        return np.concatenate([turn.real, turn.imag], -1)

    def scores(rotated) -> np.ndarray:
        return np.sum(rotated(q, start + distance) * rotated(k, start), axis=-1) / 8

    return float(np.mean(np.abs(scores(turned) - scores(exactly))))


def test_bf16_rotary_angles_go_wrong_at_long_positions():
    """bf16 has no odd integers above 256 (Wang et al. 2024, arXiv 2411.13476)."""
    narrow = {start: rotary_error("; **/rope: c=bf16", start) for start in (0, 4096)}
    assert narrow[4096] >= 5 * narrow[0]
    wide = {start: rotary_error("; **/rope: c=f32,o=bf16", start) for start in (0, 4096)}
    assert wide[4096] <= 2 * wide[0]
    assert narrow[4096] >= 5 * wide[4096]
