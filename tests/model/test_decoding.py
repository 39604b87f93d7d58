"""Decoding with a cache against `apply` on the whole sequence, and what the cache holds."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmjax.model import apply, attention, decoding_params, extend, initial_cache
from lmjax.model.attention_form import WHOLE, Form
from lmjax.model.cache import LayerCache
from lmjax.precision import parse_policy
from lmjax.precision.paths import flatten
from lmjax.precision.quantizer import parse_quantizer
from lmjax.precision.scaling import fake_quantize
from lmjax.runs.resolved import phase_of

LENGTH = 12
TOKENS = np.random.default_rng(1).integers(0, 64, (2, LENGTH), np.int32)
PIECES = (4, 4, 1, 1, 1, 1)


@pytest.fixture(scope="module")
def whole(draw_params, compile_fast) -> Any:
    """`whole(config)`: the logits of `apply`, float64 [2, LENGTH, V], kept for the next test."""

    @functools.cache
    def run(config: Any) -> np.ndarray:
        forward = compile_fast(
            functools.partial(apply, config=config.model, sites=phase_of(config).sites)
        )
        return np.asarray(forward(draw_params(config, std=0.3), TOKENS), np.float64)

    return run


@pytest.fixture(scope="module")
def pieces(draw_params, compile_fast) -> Any:
    """`pieces(config)`: the same of `extend`, some tokens at a time and then one by one."""

    def run(config: Any) -> np.ndarray:
        given = {"config": config.model, "sites": phase_of(config).sites}
        read = compile_fast(functools.partial(extend, **given))
        cache = compile_fast(lambda: initial_cache(config.model, phase_of(config).sites, 2, 16))()
        kinds = jax.tree.map(lambda x: (x.shape, x.dtype), cache)
        params, logits, start = decoding_params(draw_params(config, std=0.3), **given), [], 0
        for length in PIECES:
            part, cache = read(params, TOKENS[:, start : start + length], cache, np.int32(start))
            assert jax.tree.map(lambda x: (x.shape, x.dtype), cache) == kinds
            logits.append(np.asarray(part, np.float64))
            start += length
        return np.concatenate(logits, axis=1)

    return run


@pytest.mark.parametrize(
    ("policy", "family", "parametrisation", "epsilon"),
    [
        ("f32", "gpt2", "unit", 2.0**-23),
        ("f32", "llama", "standard", 2.0**-23),
        ("mixed_bf16; blocks/1: c=f32; head: c=f32", "llama", "standard", 2.0**-7),
    ],
)
def test_logits_are_those_of_the_whole_sequence(
    policy, family, parametrisation, epsilon, tiny, whole, pieces
):
    """To a few units of the format: sums run over other shapes, so in another order."""
    config = tiny(policy, family, model={"parametrisation": parametrisation})
    expected = whole(config)
    assert np.std(expected) > 0.25
    assert np.abs(pieces(config) - expected).max() <= 8 * epsilon * np.abs(expected).max()


@pytest.mark.parametrize(
    ("family", "keys", "values"),
    [
        pytest.param("gpt2", "e4m3@channel", "int8@block4", marks=pytest.mark.long),
        ("llama", "mxfp8", "int4@channel.affine"),
    ],
)
def test_logits_are_those_of_rounded_keys_and_values(
    family, keys, values, tiny, whole, pieces, monkeypatch
):
    """Against `apply` with keys and values rounded by hand, just before they are multiplied."""
    plain = tiny("f32", family)
    unrounded = whole(plain)
    quantizers = {"bskh->bkgts": parse_quantizer(keys), "bskh->btkgh": parse_quantizer(values)}
    product = attention.einsum

    def rounding(spec: str, x: jax.Array, w: jax.Array, *rest: Any, **options: Any) -> jax.Array:
        quantizer = quantizers.get(spec.partition(",")[2])
        w = w if quantizer is None else fake_quantize(w, quantizer)
        return product(spec, x, w, *rest, **options)

    with monkeypatch.context() as patched:
        patched.setattr(attention, "einsum", rounding)
        patched.setattr(attention, "form_of", lambda *_: Form(WHOLE))
        expected = whole.__wrapped__(plain)
    assert np.abs(expected - unrounded).max() > 1e-2
    found = pieces(tiny(f"f32; **/scores: kv={keys}; **/combine: kv={values}", family))
    np.testing.assert_allclose(found, expected, rtol=0, atol=8 * 2.0**-23 * np.abs(expected).max())


@pytest.mark.parametrize(
    ("keys", "values", "compute"),
    [("e4m3", "int8@channel", "f32"), ("mxfp8", "e4m3@block3", "bf16")],
)
def test_an_entry_is_what_the_quantizer_makes_of_it_wherever_it_stands(
    keys, values, compute, compile_fast
):
    """In every position, of whatever magnitude the others are, written together or alone."""
    site = parse_policy(f"p=f32,c={compute},kv={keys}").resolve("blocks/0/attention/scores")
    sites = {"scores": site, "combine": dataclasses.replace(site, cache=parse_quantizer(values))}
    drawn = (
        np.random.default_rng(0).normal(size=(2, 2, 7, 3, 8)) * 4.0 ** np.arange(7)[:, None, None]
    )
    k, v = site.to_compute(jnp.asarray(drawn.astype(np.float32)))

    def fill(k: jax.Array, v: jax.Array) -> Any:
        cache = LayerCache.empty((2, 9, 3, 8), sites)
        for first, last in ((0, 5), (5, 6), (6, 7)):
            cache = cache.extended(k[:, first:last], v[:, first:last], first, sites)
        read = cache.read(sites)
        exact = [fake_quantize(x, sites[name].cache) for name, x in zip(sites, (k, v), strict=True)]
        return read, exact

    for read, exact in zip(*compile_fast(fill)(k, v), strict=True):
        assert read.dtype == k.dtype
        read, exact = np.asarray(read, np.float32), np.asarray(exact, np.float32)
        np.testing.assert_array_equal(read[:, :7], exact)
        assert not read[:, 7:].any(), "what was not read yet is zero"


@pytest.mark.parametrize("policy", ["c=f32", "c=bf16", "c=bf16,kv=int8@channel", "c=f16,kv=e4m3"])
@pytest.mark.parametrize("positions", [1, 2])
def test_rows_are_written_where_each_of_them_stands(policy, positions, compile_fast):
    """As a cache of its own does; what would not fit ends with the last position."""
    site = parse_policy(policy).resolve("blocks/0/attention/scores")
    sites = {"scores": site, "combine": site}
    draw = np.random.default_rng(0).normal
    before, k, v = (
        jnp.asarray(draw(size=(4, t, 3, 8)), jnp.float32) for t in (6, positions, positions)
    )
    before, k, v = (site.to_compute(x) for x in (before, k, v))
    starts = jnp.int32([0, 5, 3, 9])

    def written(before: jax.Array, k: jax.Array, v: jax.Array, start: Any) -> Any:
        return LayerCache.of(before, before, sites).extended(k, v, start, sites).read(sites)

    alone = lambda before, k, v, start: written(before[None], k[None], v[None], start)
    together = compile_fast(written)(before, k, v, starts)
    each = compile_fast(jax.vmap(alone))(before, k, v, starts)
    for found, expected in zip(together, each, strict=True):
        np.testing.assert_array_equal(found, expected[:, 0])


def shapes(config: Any, batch: int, length: int) -> Any:
    return jax.eval_shape(
        lambda: initial_cache(config.model, phase_of(config).sites, batch, length)
    )


def test_without_kv_the_cache_is_in_the_compute_format_of_each_product(tiny):
    config = tiny("mixed_bf16; **/combine: c=f16; blocks/1: c=f32", "llama")
    first, second = shapes(config, 3, 10)
    assert (first.keys.dtype, first.values.dtype) == (jnp.bfloat16, jnp.float16)
    assert (second.keys.dtype, second.values.dtype) == (jnp.float32, jnp.float32)
    assert first.keys.shape == (3, 2, 10, 4), "grouped heads are kept once"
    assert first.values.shape == (3, 2, 4, 10)


def test_keys_and_values_of_each_layer_follow_their_own_rules(tiny):
    config = tiny("f32,kv=bf16; **/scores: kv=e4m3@channel; blocks/1/**: kv=mxfp4", "llama")
    first, second = shapes(config, 1, 10)
    assert (first.keys.values.dtype, first.values.dtype) == (jnp.float8_e4m3fn, jnp.bfloat16)
    assert first.keys.scale.shape == (1, 2, 10, 1)
    assert second.values.values.dtype == jnp.float8_e3m4
    assert (second.values.scale.dtype, second.values.scale.shape) == (
        jnp.float8_e8m0fnu,
        (1, 2, 1, 10),
    )


@pytest.mark.parametrize(
    ("kv", "per_head"),
    [
        ("c", 2 * 32),
        ("e4m3", 32),
        ("int8@channel", 32 + 4),
        ("mxfp8", 32 + 1),
        ("e5m7@channel", 64 + 4),
    ],
)
def test_the_cache_takes_the_bytes_that_its_format_promises(kv, per_head, tiny):
    """Of each key and value of 32 elements, factors included, in a model that computes in bf16."""
    policy = "mixed_bf16" + ("" if kv == "c" else f",kv={kv}")
    config = tiny(policy, "llama", model={"width": 128})
    size = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(shapes(config, 1, 10)))
    assert size == 2 * config.model.layers * config.model.kv_heads * 10 * per_head


def test_what_lies_beyond_the_position_is_not_looked_at(tiny, draw_params, compile_fast):
    config = tiny(family="llama", model={"layers": 1})
    given = {"config": config.model, "sites": phase_of(config).sites}
    prepared = decoding_params(draw_params(config, std=0.3), **given)
    read = compile_fast(functools.partial(extend, **given))
    empty = initial_cache(config.model, phase_of(config).sites, 2, 16)

    def filled(first: int) -> Any:
        return [
            LayerCache(keys.at[:, :, first:].set(7.0), values.at[:, :, :, first:].set(7.0))
            for keys, values in empty
        ]

    logits = lambda cache: read(prepared, TOKENS[:, :3], tuple(cache), np.int32(5))[0]
    np.testing.assert_array_equal(logits(empty), logits(filled(5)))
    assert np.abs(logits(empty) - logits(filled(4))).max() > 0.1


@pytest.mark.parametrize(
    ("policy", "tied", "expected"),
    [
        ("mixed_bf16", True, {"embed/table": "bfloat16", "norm/scale": "float32"}),
        ("mixed_bf16; head: c=f32", True, {"embed/table": "float32"}),
        ("mixed_bf16; head: c=f32", False, {"embed/table": "bfloat16", "head/kernel": "float32"}),
        ("p=bf16,c=f32", True, {"embed/table": "bfloat16", "norm/scale": "bfloat16"}),
    ],
)
def test_parameters_are_cast_once_where_that_makes_them_smaller(
    policy, tied, expected, tiny, draw_params
):
    config = tiny(policy, model={"tied": tied})
    prepared = decoding_params(
        draw_params(config), config=config.model, sites=phase_of(config).sites
    )
    found = {path: leaf.dtype.name for path, leaf in flatten(prepared).items()}
    assert {path: found[path] for path in expected} == expected
    kernel = phase_of(config).sites["blocks/0/mlp/up"]
    narrow = "bfloat16" in (kernel.compute.name, *found.values())
    assert found["blocks/1/mlp/up/kernel"] == ("bfloat16" if narrow else "float32")


def test_more_positions_than_the_model_has_are_refused(tiny):
    config = tiny()
    with pytest.raises(ValueError, match="17 tokens, but the model has 16 positions"):
        initial_cache(config.model, phase_of(config).sites, 1, 17)
    assert shapes(tiny(family="llama"), 1, 17)[0].keys.shape[2] == 17
