"""Weights as they are stored read back as what they were rounded to, and models read them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmjax.model import (
    apply,
    decoding_params,
    dense_weights,
    initial_params,
    resolve_sites,
    stored_weights,
)
from lmjax.precision import paths
from lmjax.precision.grammar import parse_policy
from lmjax.precision.packed import Packed, Pieces, pack
from lmjax.precision.policy import PolicyError
from lmjax.precision.quantizer import parse_quantizer
from lmjax.precision.scaling import fake_quantize
from lmjax.train import Config, InputError, abstract_state

FORMATS = {
    "int8@channel": 8,
    "int4@block8.affine": 4,
    "int3@tensor": 3,
    "e4m3@channel": 8,
    "mxfp6": 6,
    "nvfp4": 4,
}
POLICIES = [
    "mixed_bf16,w=int4@block8.affine,x=int8@channel; blocks/1/mlp/up: w=bf16",
    pytest.param("mixed_bf16,w=nvfp4; head: w=int8@channel", marks=pytest.mark.long),
]


@pytest.mark.parametrize(
    ("name", "bits", "axis"),
    [(name, bits, 0) for name, bits in FORMATS.items()] + [("int4@block8.affine", 4, 1)],
)
def test_what_is_stored_reads_back_to_the_bit_and_takes_its_bits(
    name: str, bits: int, axis: int
) -> None:
    quantizer = parse_quantizer(name)
    x = jnp.asarray(np.random.default_rng(0).normal(size=(40, 24)), jnp.float32)
    stored = pack(x, quantizer, axis=axis)
    assert stored.codes.nbytes == x.size * bits // 8
    assert stored.shape == x.shape
    expected = np.asarray(fake_quantize(x, quantizer, axis=axis))
    assert np.asarray(stored.dense()).tobytes() == expected.tobytes()


def test_lengths_that_fill_no_byte_are_cut_again() -> None:
    x = jnp.arange(-3.0, 4.0, dtype=jnp.float32)[:, None]
    stored = pack(x, parse_quantizer("int4@tensor"), axis=0)
    assert stored.codes.shape == (4, 1)
    assert stored.dense().shape == (7, 1)


def stored(policy: str) -> str:
    """The policy with every quantized weight stored."""
    return (
        policy.replace("w=int8@channel", "w=int8@channel.stored")
        .replace("w=int4@block8.affine", "w=int4@block8.affine.stored")
        .replace("w=nvfp4", "w=nvfp4.stored")
    )


@pytest.mark.parametrize("policy", POLICIES)
def test_a_model_computes_with_stored_weights_what_it_does_with_fake_quantized_ones(
    policy: str,
    tiny: Callable[..., Config],
    draw_params: Callable[..., Any],
    compile_fast: Callable[..., Any],
) -> None:
    config = tiny(policy, "llama" if "head" in policy else "gpt2")
    params = draw_params(config, std=0.3)
    tokens = np.random.default_rng(1).integers(0, 64, (2, 16)).astype(np.int32)
    model = config.model

    def logits(text: str, params: Any) -> np.ndarray:
        sites = resolve_sites(model, parse_policy(text))
        run = compile_fast(lambda p: apply(p, tokens, config=model, sites=sites))
        return np.asarray(run(params))

    sites = resolve_sites(model, parse_policy(stored(policy)))
    packed = stored_weights(params, model, sites)
    assert isinstance(packed["blocks"]["mlp"]["down"]["kernel"], Packed)
    dense = dense_weights(packed)
    assert jax.tree.map(jnp.shape, dense) == jax.tree.map(jnp.shape, params)
    assert isinstance(packed["blocks"]["mlp"]["up"]["kernel"], Pieces if "up" in policy else Packed)
    np.testing.assert_array_equal(logits(stored(policy), packed), logits(policy, params))


def test_decoding_reads_weights_as_they_are_stored(tiny: Callable[..., Config]) -> None:
    config = tiny("mixed_bf16").model
    sites = resolve_sites(config, parse_policy("mixed_bf16,w=int4@block8.stored"))
    shapes = jax.eval_shape(
        lambda key: decoding_params(initial_params(key, config, sites), config=config, sites=sites),
        jax.random.key(0),
    )
    up = shapes["blocks"][1]["mlp"]["up"]["kernel"]
    assert (up.codes.shape, up.codes.dtype) == ((8, 64), np.uint8)


def test_nothing_is_trained_that_is_stored_as_elements(tiny: Callable[..., Config]) -> None:
    with pytest.raises(InputError, match=r"Train with w=int8@channel and quantize"):
        abstract_state(tiny("f32,w=int8@channel.stored"), None)


@pytest.mark.parametrize(
    ("policy", "said"),
    [
        ("f32,w=int8.stored", "has factors"),
        ("f32,w=int8@channel.sr.stored", "leave that out"),
        ("f32,x=int8@channel.static", "one for the tensor"),
    ],
)
def test_what_cannot_be_stored_is_refused(policy: str, said: str) -> None:
    with pytest.raises(PolicyError, match=said):
        parse_policy(policy)


def test_a_static_factor_needs_stored_weights(tiny: Callable[..., Config]) -> None:
    policy = parse_policy("f32,x=int8@tensor.static")
    with pytest.raises(PolicyError, match=r"query has x=int8@tensor\.static: a static"):
        resolve_sites(tiny().model, policy)


def test_policies_of_stored_weights_are_written_as_they_are_read() -> None:
    text = "p=f32,c=f32,o=f32,w=int4@block32.stored,x=int8@tensor.static"
    assert str(parse_policy(text)) == text
    assert paths.matches("**/up", "blocks/0/mlp/up")
