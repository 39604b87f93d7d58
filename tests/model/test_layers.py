"""Parts of a block, each at the point where narrow formats go wrong."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from lmjax.model import ModelConfig, log_probabilities, token_losses
from lmjax.model.attention import Attention, rotary_angles, rotate
from lmjax.model.layers import Embedding, Norm, dropout
from lmjax.model.sites import QUIET, within
from lmjax.precision import parse_policy

ROPE = ModelConfig(width=16, heads=2, positions="rope")


def site(text: str, path: str):
    return parse_policy(text).resolve(path)


def attention_sites(text: str) -> dict:
    names = ("norm", "query", "key", "value", "scores", "softmax", "combine", "out")
    return {name: site(text, f"blocks/0/attention/{name}") for name in names}


def test_rotary_scores_depend_on_distance_alone():
    angles = rotary_angles(ROPE, jnp.arange(32), site("f32", "blocks/0/attention/rope"))
    generator = np.random.default_rng(0)
    q, k = (jnp.asarray(generator.normal(size=8), jnp.float32) for _ in range(2))
    everywhere = lambda x: jnp.broadcast_to(x, (1, 32, 1, 8))
    turned = [rotate(everywhere(x), angles, site("f32", "rope"))[0, :, 0] for x in (q, k)]
    scores = np.asarray(turned[0] @ turned[1].T)
    for distance in (0, 1, 7):
        diagonal = np.diag(scores, -distance)
        np.testing.assert_allclose(diagonal, diagonal[0], atol=2e-5)
    assert np.ptp(scores[:, 0]) > 1.0
    assert scores[0, 0] == pytest.approx(float(q @ k), rel=1e-5)


def test_rotary_angles_are_f32_in_a_bf16_model():
    length, half = 4096, 4
    exact = np.outer(np.arange(length), 10000.0 ** (-np.arange(half) / half))
    error = lambda text: np.abs(
        np.asarray(
            rotary_angles(ROPE, jnp.arange(length), site(text, "blocks/0/attention/rope"))[0],
            np.float64,
        )
        - np.cos(exact)
    ).max()
    assert error("mixed_bf16") < 1e-3
    assert error("mixed_bf16; **/rope: c=bf16") > 1.0, "and a rule may narrow them"


def test_masked_positions_stay_finite_with_scores_at_the_end_of_f16():
    config = ModelConfig(width=16, heads=1, max_positions=6)
    attention = Attention(jax.random.key(0), config)
    q = jnp.full((1, 6, 1, 1, 16), 122.0, jnp.float16)  # scores of 59,536; f16 ends at 65,504
    for sign in (1.0, -1.0):
        sites = attention_sites("f16; **/softmax: c=f16")
        weights = attention.weights(q, sign * q[:, :, 0], sites, QUIET)
        assert weights.dtype == jnp.float16
        expected = np.tri(6) / np.arange(1, 7)[:, None]
        np.testing.assert_allclose(weights[0, 0, 0], expected, atol=1e-3)


def test_scores_that_overflow_give_nan_and_not_a_look_into_the_future():
    config = ModelConfig(width=16, heads=1, max_positions=6)
    attention = Attention(jax.random.key(0), config)
    q = jnp.full((1, 6, 1, 1, 16), 200.0, jnp.float16)
    sites = attention_sites("f16; **/scores: c=f16")
    weights = attention.weights(q, -q[:, :, 0], sites, QUIET)  # every real score is -inf
    assert np.isnan(weights[0, 0, 0]).all(axis=-1).any(), "so that the step is skipped"
    later = np.triu(np.ones((6, 6), bool), k=1)
    assert not np.any(np.asarray(weights[0, 0, 0])[later] > 0)
    sums = attention.weights(q, -q[:, :, 0], attention_sites("f16"), QUIET)
    assert np.isfinite(sums).all(), "sums of f32 have room for them"


@pytest.mark.parametrize("kind", ["layer", "rms"])
def test_norms_of_f16_activations_do_not_overflow(kind: str):
    config = ModelConfig(width=16, norm=kind)
    norm = Norm(16, config)
    x = jnp.asarray(np.random.default_rng(0).normal(size=(1, 1, 16)) * 1000, jnp.float16)
    narrow = norm(x, site("f16", "norm"))
    assert narrow.dtype == jnp.float32
    assert float(jnp.sqrt(jnp.mean(jnp.square(narrow)))) == pytest.approx(1.0, rel=1e-2)
    overflowed = norm(x, site("f16; norm: c=f16", "norm"))  # squares of 1000 are infinite in f16
    assert overflowed.dtype == jnp.float16
    assert not np.any(np.asarray(overflowed, np.float32) > 0.1)


def normalised(x: np.ndarray, g: np.ndarray, kind: str, epsilon: float) -> tuple[np.ndarray, ...]:
    """A norm of rows in f64, and the cotangent of `x` for the cotangent `g`."""
    x, g = np.asarray(x, np.float64), np.asarray(g, np.float64)
    centre = (lambda v: v - v.mean(-1, keepdims=True)) if kind == "layer" else (lambda v: v)
    x = centre(x)
    root = np.sqrt(np.mean(x**2, -1, keepdims=True) + epsilon)
    y = x / root
    return y, centre(g - y * np.mean(g * y, -1, keepdims=True)) / root


@pytest.mark.parametrize("kind", ["layer", "rms"])
@pytest.mark.parametrize("epsilon", [1e-37, 1e-30, 1e-5])
@pytest.mark.parametrize("magnitude", [1e-25, 1e-18, 1.0, 1e20, 1e33])
def test_norms_are_right_where_squares_overflow_or_vanish(kind, epsilon, magnitude):
    generator = np.random.default_rng(0)
    x = (generator.normal(size=(1, 3, 16)) * magnitude).astype(np.float32)
    g = generator.normal(size=x.shape).astype(np.float32)
    norm = Norm(16, ModelConfig(width=16, norm=kind, norm_epsilon=epsilon))
    y, pullback = jax.vjp(lambda x: norm(x, site("f32", "norm")), jnp.asarray(x))
    expected_y, expected_dx = normalised(x, g, kind, epsilon)
    np.testing.assert_allclose(y, expected_y, atol=2e-6 * np.abs(expected_y).max())
    (dx,) = pullback(jnp.asarray(g))
    np.testing.assert_allclose(dx, expected_dx, atol=1e-5 * np.abs(expected_dx).max())


def test_rows_of_a_norm_are_scaled_each_by_itself():
    x = np.random.default_rng(0).normal(size=(1, 3, 16)) * [[[1e25], [1.0], [3e38 / 8]]]
    norm = Norm(16, ModelConfig(width=16, norm="layer"))
    y = norm(jnp.asarray(x, jnp.float32), site("f32", "norm"))
    np.testing.assert_allclose(y, normalised(x, x, "layer", 1e-5)[0], atol=1e-5)
    alone = norm(jnp.asarray(x[:, 1:2], jnp.float32), site("f32", "norm"))
    np.testing.assert_array_equal(y[:, 1:2], alone)


@pytest.mark.parametrize("policy", ["f32", "mixed_bf16", "f32; norm: c=bf16"])
def test_the_norm_of_a_constant_row_is_zero_however_large(policy: str):
    for kind, expected in (("layer", 0.0), ("rms", 1.0)):
        norm = Norm(16, ModelConfig(width=16, norm=kind))
        rows = jnp.asarray([[[0.0] * 16, [2.0] * 16, [2.0**100] * 16]], jnp.float32)
        y = np.asarray(norm(rows, site(policy, "norm")), np.float32)
        np.testing.assert_allclose(y[0, :, 0], [0.0, expected, expected], rtol=1e-5)


@pytest.mark.parametrize("policy", ["mixed_bf16", "mixed_bf16; norm: c=bf16"])
def test_norms_of_large_bf16_activations_are_right(policy: str):
    x = jnp.asarray(np.random.default_rng(0).normal(size=(1, 3, 64)) * 1e25, jnp.bfloat16)
    y = Norm(64, ModelConfig(width=64, norm="rms"))(x, site(policy, "norm"))
    wanted = normalised(np.asarray(x, np.float64), np.zeros(x.shape), "rms", 0.0)[0]
    np.testing.assert_allclose(np.asarray(y, np.float32), wanted, atol=0.05)


@pytest.mark.parametrize("leading", [(1, 6), (6, 1), (1, 1, 6), (1, 1)])
def test_norms_sum_without_leading_axes_of_length_1(leading, equations):
    x = jnp.asarray(np.random.default_rng(0).normal(size=(*leading, 16)), jnp.float32)
    norm = Norm(16, ModelConfig(width=16))
    run = lambda x: jax.vjp(lambda x: norm(x, site("f32", "norm")), x)[1](x)[0]
    assert run(x).shape == x.shape
    sums = equations(jax.make_jaxpr(run)(x), "reduce_sum")
    assert sums
    assert all(1 not in each.invars[0].aval.shape[:-1] for each in sums)


def test_layer_norm_removes_the_mean_and_rms_norm_does_not():
    x = jnp.asarray(np.random.default_rng(0).normal(5.0, 1.0, (1, 1, 16)), jnp.float32)
    mean = lambda kind: float(
        jnp.mean(Norm(16, ModelConfig(width=16, norm=kind))(x, site("f32", "norm")))
    )
    assert mean("layer") == pytest.approx(0.0, abs=1e-5)
    assert mean("rms") > 0.9


def test_dropout_is_the_identity_without_key_or_rate():
    x = jnp.ones((3, 3), jnp.float32)
    assert dropout(x, 0.5, None) is x
    assert dropout(x, 0.0, jax.random.key(0)) is x


@pytest.mark.parametrize("rate", [0.1, 0.5])
def test_dropout_zeroes_at_its_rate_and_keeps_the_mean(rate: float):
    x = jnp.ones((100, 100), jnp.bfloat16)
    dropped = np.asarray(dropout(x, rate, jax.random.key(0)), np.float32)
    assert np.mean(dropped == 0) == pytest.approx(rate, abs=0.02)
    kept = np.unique(dropped[dropped != 0])
    assert kept == pytest.approx(1 / (1 - rate), rel=2**-8)
    assert dropout(x, rate, jax.random.key(0)).dtype == jnp.bfloat16


def test_gradients_of_a_frequent_token_are_summed_in_the_stored_format():
    # In bf16 a sum of ones stops at 256.
    embed = Embedding(jax.random.key(0), 4, 1, axes=("vocab", "embed"), std=0.02)
    graphdef, params = nnx.split(embed)
    indices = jnp.zeros(1000, jnp.int32)
    look_up = lambda p: nnx.merge(graphdef, p)(indices, site("mixed_bf16", "embed"))
    rows, pullback = jax.vjp(look_up, params)
    assert rows.dtype == jnp.bfloat16
    (gradient,) = jax.tree.leaves(pullback(jnp.ones((1000, 1), jnp.bfloat16)))
    assert float(gradient[0, 0]) == 1000.0


def test_token_losses_equal_their_definition():
    generator = np.random.default_rng(0)
    logits = generator.normal(size=(2, 3, 7)) * 5
    targets = generator.integers(0, 7, (2, 3), np.int32)
    losses = token_losses(jnp.asarray(logits, jnp.float32), targets, site("f32", "loss"))
    log_z = np.log(np.exp(logits).sum(-1))
    expected = log_z - np.take_along_axis(logits, targets[..., None], -1)[..., 0]
    np.testing.assert_allclose(losses.cross_entropy, expected, rtol=1e-5)
    np.testing.assert_allclose(losses.z, log_z**2, rtol=1e-5)
    scored = log_probabilities(jnp.asarray(logits, jnp.float32), targets, site("f32", "loss"))
    np.testing.assert_array_equal(scored, -losses.cross_entropy)


def test_the_loss_survives_logits_far_beyond_exp():
    logits = jnp.asarray([[[60000.0, 0.0, -60000.0]]], jnp.float16)
    losses = token_losses(logits, jnp.asarray([[2]], jnp.int32), site("pure_f16", "loss"))
    assert float(losses.cross_entropy[0, 0]) == float(logits[0, 0, 0]) - float(logits[0, 0, 2])


def test_within_keeps_the_rest_of_the_path():
    sites = {"blocks/1/mlp/up": site("f32", "up"), "blocks/10/mlp/up": site("bf16", "up")}
    assert list(within(sites, "blocks/1")) == ["mlp/up"]
    assert within(sites, "blocks/1")["mlp/up"].compute.name == "f32"
