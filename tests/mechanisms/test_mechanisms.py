"""How narrow arithmetic fails: the mechanisms behind published ablations, each in about a second.

They need no training: each is arithmetic that can be stated beforehand, done by the same functions
that a run uses. A mechanism that is gone here cannot be seen in a loss either. How each is measured
stands with the claim that rests on it; the numbers here are closer than the claims need.
"""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

from experiments.ablations.accumulation import accumulation_error
from experiments.ablations.bf16_moments import second_moments
from experiments.ablations.loss_scaling import logit_cotangent
from experiments.ablations.rope_positions import NARROW, ROUNDED, rotary_error
from lmjax.precision.rounding import quantize


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


@pytest.mark.parametrize(("name", "terms", "lost"), [("bf16", 1024, 0.50), ("f16", 16384, 0.75)])
def test_chunks_repair_a_narrow_accumulator(name: str, terms: int, lost: float):
    """A running sum swamps its terms; sums of 64 do not (Wang et al. 2018, section 2.3)."""
    sequential = accumulation_error(f"{name}@block1", terms)
    chunked = accumulation_error(f"{name}@block64", terms)
    assert sequential == pytest.approx(lost, abs=0.05)
    assert chunked <= sequential / 20


def test_bf16_rotary_angles_go_wrong_at_long_positions():
    """bf16 has no odd integers above 256 (Wang et al. 2024, arXiv 2411.13476)."""
    narrow = {start: rotary_error(NARROW, start) for start in (0, 4096)}
    assert narrow[4096] >= 5 * narrow[0]
    wide = {start: rotary_error(ROUNDED, start) for start in (0, 4096)}
    assert wide[4096] <= 2 * wide[0]
    assert narrow[4096] >= 5 * wide[4096]
