"""The whole forward pass against one written down in numpy f64, and what must hold of any model."""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmjax.model import ModelConfig, apply, gpt2, llama_1b, parameter_count
from lmjax.runs.resolved import phase_of

TOKENS = np.random.default_rng(1).permutation(64)[:24].reshape(2, 12).astype(np.int32)


def normalised(x: np.ndarray, p: dict, kind: str, epsilon: float) -> np.ndarray:
    if kind == "layer":
        x = x - x.mean(-1, keepdims=True)
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + epsilon) * p["scale"] + p.get("bias", 0.0)


def dense(x: np.ndarray, p: dict) -> np.ndarray:
    return x @ p["kernel"] + p.get("bias", 0.0)


def turned(x: np.ndarray, base: float) -> np.ndarray:
    """Rotary embedding of `[B, heads, T, H]`, each pair as a complex number."""
    length, size = x.shape[-2:]
    angle = np.outer(np.arange(length), base ** (-np.arange(0, size, 2) / size))
    pairs = (x[..., : size // 2] + 1j * x[..., size // 2 :]) * np.exp(1j * angle)
    return np.concatenate([pairs.real, pairs.imag], axis=-1)


def attention(x: np.ndarray, p: dict, c: ModelConfig) -> np.ndarray:
    batch, length, _ = x.shape
    split = lambda y, heads: y.reshape(batch, length, heads, -1).transpose(0, 2, 1, 3)
    q = split(dense(x, p["query"]), c.heads)
    k, v = (split(dense(x, p[name]), c.kv_head_count) for name in ("key", "value"))
    if c.qk_norm:
        q = normalised(q, p["query_norm"], "rms", c.norm_epsilon)
        k = normalised(k, p["key_norm"], "rms", c.norm_epsilon)
    if c.positions == "rope":
        q, k = turned(q, c.rope_base), turned(k, c.rope_base)
    k, v = (np.repeat(y, c.heads // c.kv_head_count, axis=1) for y in (k, v))
    scores = q @ k.swapaxes(-1, -2) / math.sqrt(c.head_size)
    scores = np.where(np.tri(length, dtype=bool), scores, -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    y = weights / weights.sum(-1, keepdims=True) @ v
    return dense(y.transpose(0, 2, 1, 3).reshape(batch, length, -1), p["out"])


def mlp(x: np.ndarray, p: dict, c: ModelConfig) -> np.ndarray:
    up = dense(x, p["up"])
    if c.activation == "swiglu":
        gate = dense(x, p["gate"])
        return dense(gate / (1 + np.exp(-gate)) * up, p["down"])
    gelu = 0.5 * up * (1 + np.tanh(math.sqrt(2 / math.pi) * (up + 0.044715 * up**3)))
    return dense(gelu, p["down"])


def reference(params: Any, tokens: np.ndarray, c: ModelConfig) -> np.ndarray:
    """Logits `[B, T, V]` in f64 (Radford et al. 2019; Touvron et al. 2023)."""
    p = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)
    norm = functools.partial(normalised, kind=c.norm, epsilon=c.norm_epsilon)
    x = p["embed"]["table"][tokens]
    if c.positions == "learned":
        x = x + p["positions"]["table"][: tokens.shape[1]]
    for index in range(c.layers):
        block = jax.tree.map(lambda leaf, i=index: leaf[i], p["blocks"])
        x = x + attention(norm(x, block["attention"]["norm"]), block["attention"], c)
        x = x + mlp(norm(x, block["mlp"]["norm"]), block["mlp"], c)
    x = norm(x, p["norm"])
    return x @ (p["embed"]["table"].T if c.tied else p["head"]["kernel"])


def forward(config: Any) -> Any:
    return functools.partial(apply, config=config.model, sites=phase_of(config).sites)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_logits_equal_the_reference(family: str, tiny, draw_params, compile_fast):
    config = tiny(family=family)
    params = draw_params(config, std=0.3)
    logits = compile_fast(forward(config))(params, TOKENS)
    assert logits.shape == (2, 12, 64)
    expected = reference(params, TOKENS, config.model)
    np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-4)
    assert np.std(expected) > 0.5, "the comparison would mean little with logits near 0"


@pytest.mark.parametrize("policy", ["mixed_bf16", "pure_f16"])
def test_narrow_logits_are_the_reference_to_their_precision(
    policy: str, tiny, draw_params, compile_fast
):
    config = tiny(policy, "llama")
    params = draw_params(config, std=0.3)
    logits = np.asarray(compile_fast(forward(config))(params, TOKENS), np.float64)
    error = np.abs(logits - reference(params, TOKENS, config.model))
    spread = np.std(logits)
    limit = {"mixed_bf16": 2.0**-4, "pure_f16": 2.0**-7}[policy]
    assert error.max() < limit * spread * 2
    assert error.max() > 2.0**-14 * spread, "something computed in more than it should"


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_no_logit_depends_on_a_later_token(family: str, tiny, draw_params, compile_fast):
    config = tiny(family=family, model={"tied": False})
    params = draw_params(config, std=0.3)
    tokens = TOKENS[:1]  # all different, so that each row of the table is one position
    mixed = np.random.default_rng(0).normal(size=64).astype(np.float32)

    def of_table(table: jax.Array) -> jax.Array:
        return forward(config)(params | {"embed": {"table": table}}, tokens)[0] @ mixed

    jacobian = compile_fast(jax.jacrev(of_table))(params["embed"]["table"])
    influence = np.abs(np.asarray(jacobian)[:, tokens[0]]).sum(-1)
    later = np.triu(np.ones_like(influence, dtype=bool), k=1)
    assert not influence[later].any()
    assert influence[~later].all(), "every earlier token is seen"


@pytest.mark.parametrize(
    ("config", "published"),
    [
        (gpt2(), 124_439_808),
        (gpt2(width=1024, layers=24, heads=16), 354_823_168),
        (llama_1b(), 1_235_814_400),
        (
            llama_1b(
                vocab_size=32000, layers=22, kv_heads=4, mlp_width=5632, tied=False,
                max_positions=2048,
            ),
            1_100_048_384,
        ),
    ],
    ids=["gpt2", "gpt2-medium", "llama-3.2-1b", "tinyllama-1.1b"],
)  # fmt: skip
def test_parameter_counts_are_the_published_ones(config: ModelConfig, published: int):
    assert parameter_count(config) == published


def test_more_tokens_than_learned_positions_are_refused(tiny, draw_params):
    config = tiny()
    with pytest.raises(ValueError, match="17 tokens, but the model has 16 positions"):
        forward(config)(draw_params(config), jnp.zeros((1, 17), jnp.int32))


def test_rotary_models_extend_beyond_their_training_context(tiny, draw_params):
    config = tiny(family="llama")
    shape = jax.eval_shape(forward(config), draw_params(config), jnp.zeros((1, 40), jnp.int32))
    assert shape.shape == (1, 40, 64)


def test_grouped_heads_equal_full_attention_with_repeated_keys(tiny, draw_params, compile_fast):
    grouped = tiny(family="llama")
    full = tiny(family="llama", model={"kv_heads": 4})
    params = draw_params(grouped, std=0.3)

    def repeated(kernel: jax.Array) -> jax.Array:
        layers, width, _ = kernel.shape
        heads = kernel.reshape(layers, width, 2, 1, grouped.model.head_size)
        return jnp.repeat(heads, 2, axis=3).reshape(layers, width, -1)

    inner = params["blocks"]["attention"]
    wide = {name: {"kernel": repeated(inner[name]["kernel"])} for name in ("key", "value")}
    widened = params | {"blocks": params["blocks"] | {"attention": inner | wide}}
    np.testing.assert_allclose(
        compile_fast(forward(grouped))(params, TOKENS),
        compile_fast(forward(full))(widened, TOKENS),
        rtol=1e-5,
        atol=1e-5,
    )
