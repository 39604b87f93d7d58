"""Products of quantized operands: every rounding where the policy puts it, and nowhere else.

The reference quantizes by hand, in numpy, from the definitions of the formats; it sums in f64.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from lmjax.precision import contraction, matmul
from lmjax.precision import sites as declared
from lmjax.precision.grammar import PRESETS, parse_policy
from lmjax.precision.keys import OPERANDS
from lmjax.precision.matmul import einsum
from lmjax.precision.policy import SitePolicy
from lmjax.precision.rounding import quantize
from lmjax.precision.settings import Storage

SIZES = {"b": 3, "t": 5, "s": 7, "k": 37, "n": 23, "d": 37, "v": 23, "h": 19, "g": 2}
SPECS = {
    "btk,kn->btn": "weights",
    "btd,vd->btv": "weights",
    "btkgh,bskh->bkgts": "activations",
    "bkgts,bskh->btkgh": "activations",
}
"""The products of the model, and what their second operand is; no size divides into blocks."""


def linear(text: str) -> SitePolicy:
    return parse_policy(text).resolve("blocks/0/mlp/up")


def distinct_presets() -> dict[str, SitePolicy]:
    """One preset for each way to multiply; how parameters are stored does not matter here."""
    f32 = parse_policy("f32").resolve("head").params
    found: dict[SitePolicy, str] = {}
    for name in ("f32", *PRESETS):
        found.setdefault(replace(linear(name), stored=Storage(f32), output=f32), name)
    return {name: site for site, name in found.items()}


SITES = distinct_presets()


def operands(spec: str, seed: int = 0) -> list[np.ndarray]:
    """Two f32 operands and a cotangent with magnitudes that differ from block to block."""
    inputs, _, output = spec.partition("->")
    generator = np.random.default_rng(seed)
    sizes = SIZES | ({"k": 2} if "g" in spec else {})
    shapes = [[sizes[index] for index in axes] for axes in (*inputs.split(","), output)]
    draw = lambda shape: generator.normal(size=shape) * 2.0 ** generator.integers(-4, 5, shape)
    return [draw(shape).astype(np.float32) for shape in shapes]


# What a scale is, and an element, for each of the quantizers that presets use.
ELEMENTS = {
    "e4m3": (ml_dtypes.float8_e4m3fn, 448.0),
    "e5m2": (ml_dtypes.float8_e5m2, 57344.0),
    "e2m1": (ml_dtypes.float4_e2m1fn, 6.0),
    "int8": (None, 127.0),
}


def element(x: np.ndarray, name: str) -> np.ndarray:
    """f32 rounded to an element format, saturating."""
    dtype, largest = ELEMENTS[name]
    if dtype is None:
        return np.clip(np.rint(x), -128, 127)
    return np.clip(x, -largest, largest).astype(dtype).astype(np.float32)


def blocks_of(x: np.ndarray, size: int) -> np.ndarray:
    """[..., n] to [..., blocks, size], filled up with zeros."""
    padding = [(0, 0)] * (x.ndim - 1) + [(0, -x.shape[-1] % size)]
    return np.pad(x, padding).reshape(*x.shape[:-1], -1, size)


BLOCKS = {"mxfp8": (32, "e4m3"), "mxfp8.rceil": (32, "e4m3"), "nvfp4": (16, "e2m1")}


def by_hand(x: np.ndarray, name: str, axes: tuple[int, ...]) -> np.ndarray:
    """What `name` makes of the operand of a sum over `axes`, as f64: no product is rounded."""
    x = np.asarray(x, np.float32)
    if name in BLOCKS:
        blocks = np.moveaxis(x, axes[-1], -1)
        return np.moveaxis(blocks_by_hand(blocks, name), -1, axes[-1])
    kind, _, grouping = name.partition("@")
    amax = np.abs(x).max(None if grouping == "tensor" else axes, keepdims=True)
    scale = amax * np.float32(1 / ELEMENTS[kind][1])
    return element(x * (np.float32(1.0) / scale), kind) * scale.astype(np.float64)


def blocks_by_hand(x: np.ndarray, name: str) -> np.ndarray:
    """A tensor quantized in blocks along its last axis, as f32."""
    one = np.float32(1.0)
    size, kind = BLOCKS[name]
    groups = blocks_of(x, size)
    amax = np.abs(groups).max(-1, keepdims=True)
    if name == "mxfp8":
        scale = np.exp2(np.floor(np.log2(amax)) - 8).astype(np.float32)
    elif name == "mxfp8.rceil":
        scale = np.exp2(np.ceil(np.log2(amax.astype(np.float64) / 448))).astype(np.float32)
    else:
        tensor = np.abs(x).max() * np.float32(1 / (6 * 448))
        scale = element(amax * np.float32(1 / 6) * (one / tensor), "e4m3") * tensor
    y = element(groups * (one / scale), kind) * scale
    return y.reshape(*x.shape[:-1], -1)[..., : x.shape[-1]]


def rounded(x: np.ndarray, dtype: Any) -> np.ndarray:
    return np.asarray(x).astype(np.float32).astype(dtype).astype(np.float64)


def reference_product(spec: str, site: SitePolicy, pair: Any, names: Any) -> np.ndarray:
    """Operands in c, quantized; in blocks along the last summed axis, and back in c; one rounding.

    A factor that all terms of a sum share multiplies the sum, so its operand is not rounded to c.
    """
    inputs, _, output = spec.partition("->")
    axes = inputs.split(",")
    summed = [index for index in axes[0] if index in axes[1] and index not in output]
    ready = []
    for x, own, name in zip(pair, axes, names, strict=True):
        x = rounded(x, site.compute.dtype)
        if name != site.compute.name:
            x = by_hand(x, name, tuple(own.index(index) for index in summed))
        ready.append(rounded(x, site.compute.dtype) if name in BLOCKS else x)
    return np.einsum(spec, *ready)


def declared_as(spec: str, site: SitePolicy) -> SitePolicy:
    """The same formats at a site that multiplies such operands."""
    of_two_activations = SPECS.get(spec, "weights") == "activations"
    return replace(site, site=declared.SITES["scores" if of_two_activations else "up"])


def reference(spec: str, site: SitePolicy, x: Any, w: Any, g: Any) -> list[np.ndarray]:
    inputs, _, y_axes = spec.partition("->")
    x_axes, w_axes = inputs.split(",")
    rows = site.rows()
    of_x, of_xb, of_g = rows["x"], rows["xb"], rows["g"].removesuffix(".sr")
    second = "w" if SPECS[spec] == "weights" else "x"
    of_w, of_wb = rows[second], rows[f"{second}b"]
    y = reference_product(spec, site, (x, w), (of_x, of_w))
    dx = reference_product(f"{y_axes},{w_axes}->{x_axes}", site, (g, w), (of_g, of_wb))
    dw = reference_product(f"{x_axes},{y_axes}->{w_axes}", site, (x, g), (of_xb, of_g))
    result = declared_as(spec, site).result.dtype
    return [rounded(y, result), *(rounded(d, site.compute.dtype) for d in (dx, dw))]


def product_and_gradients(
    spec: str, site: SitePolicy, x: Any, w: Any, g: Any, key: Any = None
) -> tuple[jax.Array, ...]:
    site = declared_as(spec, site)
    product = functools.partial(einsum, spec, site=site, key=key)
    y, pullback = jax.vjp(product, jnp.asarray(x), jnp.asarray(w))
    return (y, *pullback(jnp.asarray(g).astype(y.dtype)))


@pytest.fixture(scope="module")
def compiled(compile_fast: Callable[..., Any]) -> Callable[..., Any]:
    """`compiled(spec, site)`: the product and its gradients, compiled once."""
    return functools.cache(
        lambda spec, site: compile_fast(functools.partial(product_and_gradients, spec, site))
    )


QUANTIZED = ["fp8", "mxfp8", "nvfp4", "int8"]


def test_every_preset_multiplies_in_one_of_seven_ways():
    """The three without quantization are `test_matmul.py`'s."""
    assert list(SITES) == ["f32", "mixed_bf16", "mixed_f16", *QUANTIZED]


OTHER_BACKWARDS = {
    "btk,kn->btn": "mixed_bf16,w=int8@channel,wb=mxfp8,x=mxfp8,xb=nvfp4,g=e5m2@tensor",
    "bkgts,bskh->btkgh": "mixed_bf16,x=mxfp8,xb=int8@channel,g=mxfp8",
}
"""Policies whose backward products have other operands."""


@pytest.mark.parametrize(
    ("spec", "site"),
    [(spec, SITES[name]) for name in QUANTIZED for spec in SPECS]
    + [(spec, linear(text)) for spec, text in OTHER_BACKWARDS.items()],
    ids=[f"{spec}-{name}" for name in QUANTIZED for spec in SPECS]
    + [f"{spec}-other backwards" for spec in OTHER_BACKWARDS],
)
def test_product_and_both_gradients_equal_quantization_by_hand(
    spec: str, site: SitePolicy, compiled
):
    x, w, g = operands(spec)
    ours = compiled(spec, site)(x, w, g)
    expected = reference(spec, site, x, w, g)
    spacing = float(jnp.finfo(site.compute.dtype).eps)
    for actual, wanted in zip(ours, expected, strict=True):
        rounded = actual.dtype.itemsize < 4
        actual = np.asarray(actual, np.float64)
        size = np.abs(wanted).max()
        # f32 sums in another order than f64; narrow results may then be neighbours. Operands that
        # are rounded to c once more than they should be make four results in ten differ.
        np.testing.assert_allclose(actual, wanted, rtol=spacing, atol=1e-5 * size)
        if rounded:
            assert np.mean(actual == wanted) > 0.98
        else:
            assert np.mean(np.isclose(actual, wanted, rtol=1e-6, atol=1e-6 * size)) > 0.98


@pytest.mark.parametrize("key", OPERANDS)
@pytest.mark.parametrize("spec", SPECS)
def test_each_operand_setting_reaches_the_products_it_names_and_no_others(
    spec: str, key: str, compiled
):
    """The products are x w, g w and x g; a second operand of activations follows x."""
    x, w, g = operands(spec)
    plain = compiled(spec, linear("f32"))(x, w, g)
    changed = compiled(spec, linear(f"f32,{key}=e3m2"))(x, w, g)
    weights = SPECS[spec] == "weights"
    expected = {
        "w": (weights, weights, False),
        "x": (True, not weights, True),
        "g": (False, True, True),
        "wb": (False, weights, False),
        "xb": (False, not weights, True),
    }[key]
    differs = tuple(bool(np.any(a != b)) for a, b in zip(plain, changed, strict=True))
    assert differs == expected


@pytest.mark.parametrize("kind", ["e5m7", "e4m3", "e3m2", "tf32", "e8m3"])
@pytest.mark.parametrize("spec", ["btk,kn->btn", "btkgh,bskh->bkgts"])
def test_results_of_an_emulated_compute_format_are_values_of_it(spec: str, kind: str, compiled):
    x, w, g = operands(spec)
    results = compiled(spec, linear(f"p=f32,c={kind}"))(x, w, g)
    for result in results:
        assert result.dtype == jnp.float32
        np.testing.assert_array_equal(result, quantize(result, kind))
    narrow = [np.asarray(quantize(jnp.asarray(a), kind), np.float64) for a in (x, w)]
    expected = quantize(jnp.asarray(np.einsum(spec, *narrow), jnp.float32), kind)
    assert np.mean(np.asarray(results[0]) == np.asarray(expected)) > 0.98


def test_tf32_rounds_f32_operands_of_all_three_products(compiled):
    spec = "btk,kn->btn"
    x, w, g = operands(spec)
    narrow = [np.asarray(quantize(jnp.asarray(a), "tf32")) for a in (x, w, g)]
    ours = compiled(spec, linear("f32,m=tf32"))(x, w, g)
    expected = compiled(spec, linear("f32"))(*narrow)
    unrounded = compiled(spec, linear("f32"))(x, w, g)
    for actual, wanted, other in zip(ours, expected, unrounded, strict=True):
        np.testing.assert_array_equal(actual, wanted)
        assert np.any(actual != other)
    of_bf16 = [compiled(spec, linear(f"bf16{m}"))(x, w, g)[0] for m in ("", ",m=tf32")]
    np.testing.assert_array_equal(*of_bf16, "bf16 operands already fit")


# --- stochastic rounding of operands


@pytest.mark.parametrize("key", ["w", "x", "g"])
def test_a_key_makes_operands_random_and_no_key_rounds_to_nearest(key: str, compiled):
    spec = "btk,kn->btn"
    x, w, g = operands(spec)
    run = compiled(spec, linear(f"f32,{key}=e3m2.sr"))
    nearest = compiled(spec, linear(f"f32,{key}=e3m2"))
    one, again, two = (run(x, w, g, jax.random.key(seed)) for seed in (1, 1, 2))
    affected = 1 if key == "g" else 0
    np.testing.assert_array_equal(one[affected], again[affected])
    assert np.mean(np.asarray(one[affected]) != np.asarray(two[affected])) > 0.9
    expected = nearest(x, w, g)
    for actual, wanted in zip(run(x, w, g), expected, strict=True):
        np.testing.assert_array_equal(actual, wanted)
    for actual, wanted in zip(nearest(x, w, g, jax.random.key(1)), expected, strict=True):
        np.testing.assert_array_equal(actual, wanted)


def test_products_of_stochastic_operands_are_right_on_average(compile_fast):
    """Both operands have the same shape: with the same noise, squares would be too large."""
    spec, count = "bk,bk->", 4096
    generator = np.random.default_rng(0)
    x, w = generator.uniform(0.3, 1.0, (2, 2, 8)).astype(np.float32)
    g = np.float32(0.7)
    site = linear("f32,w=e2m1.sr,x=e2m1.sr,g=e2m1.sr")
    keys = jax.random.split(jax.random.key(0), count)
    run = compile_fast(jax.vmap(lambda key: product_and_gradients(spec, site, x, w, g, key)))
    for samples, expected in zip(run(keys), (np.sum(x * w), g * w, g * x), strict=True):
        samples = np.asarray(samples, np.float64)
        error = samples.std(0) / math.sqrt(count)
        assert np.all(error > 0)
        assert np.all(np.abs(samples.mean(0) - expected) < 4 * error)


# --- accumulators


def to_significand(x: float, bits: int) -> float:
    """To nearest even with `bits` significant bits, far from overflow and underflow."""
    fraction, exponent = math.frexp(x)
    return math.ldexp(round(math.ldexp(fraction, bits)), exponent - bits)


def chunked_by_hand(x: np.ndarray, w: np.ndarray, chunk: int, bits: int) -> np.ndarray:
    """[m, k] times [k, n], one scalar at a time."""
    result = np.zeros((x.shape[0], w.shape[1]))
    for row, column in np.ndindex(*result.shape):
        terms, total = x[row] * w[:, column], 0.0
        for start in range(0, len(terms), chunk):
            part = to_significand(math.fsum(terms[start : start + chunk]), bits)
            total = to_significand(total + part, bits)
        result[row, column] = total
    return result


@pytest.mark.parametrize(
    ("accumulator", "chunk", "bits"),
    [("bf16@block8", 8, 8), ("f16@block1", 1, 11), ("e8m13@block128", 128, 14)],
)
def test_a_chunked_accumulator_equals_a_loop_over_scalars(accumulator, chunk, bits, compiled):
    """Small integers: a chunk's sum in f32 is exact, so only the accumulator can round."""
    spec, size = "btk,kn->btn", 300
    generator = np.random.default_rng(0)
    draw = lambda *shape: generator.integers(1, 8, shape).astype(np.float32)
    x, w, g = draw(2, 3, size), draw(size, 4), draw(2, 3, 4)
    w[::3] *= 3
    ours = compiled(spec, linear(f"f32,a={accumulator}"))(x, w, g)
    flat_x, flat_g = x.reshape(6, size), g.reshape(6, 4)
    expected = (
        chunked_by_hand(flat_x, w, chunk, bits).reshape(2, 3, 4),
        chunked_by_hand(flat_g, w.T, chunk, bits).reshape(x.shape),
        chunked_by_hand(flat_x.T, flat_g, chunk, bits),
    )
    for actual, wanted in zip(ours, expected, strict=True):
        np.testing.assert_array_equal(actual, wanted)
    if bits < 14:
        assert np.any(expected[0] != flat_x.dot(w).reshape(2, 3, 4)), "nothing was rounded"


@pytest.mark.parametrize("spec", SPECS)
def test_a_chunked_f32_accumulator_is_a_sum_for_every_product_of_the_model(spec: str, compiled):
    x, w, g = operands(spec)
    plain = compiled(spec, linear("f32"))(x, w, g)
    for chunk in (4, 10**9):
        chunked = compiled(spec, linear(f"f32,a=f32@block{chunk}"))(x, w, g)
        for actual, expected in zip(chunked, plain, strict=True):
            np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-3)


def test_an_accumulator_without_chunks_rounds_the_whole_sum_once():
    ones = jnp.ones((1, 1, 257), jnp.float32)
    column = jnp.ones((257, 1), jnp.float32)
    total = lambda text: float(einsum("btk,kn->btn", ones, column, linear(text))[0, 0, 0])
    assert total("f32") == 257.0
    assert total("f32,a=bf16") == 256.0
    assert total("f32,a=e8m3@block2") == 32.0, "32 + 2 is 32 with four significant bits"
    assert total("f32,a=bf16@block1") == 256.0


def test_an_accumulator_overflows_as_its_format_does():
    x = jnp.full((1, 1, 4), 30000.0, jnp.float32)
    ones = jnp.ones((4, 1), jnp.float32)
    for accumulator in ("f16", "f16@block1"):
        assert einsum("btk,kn->btn", x, ones, linear(f"f32,a={accumulator}"))[0, 0, 0] == np.inf


# --- under the transformations of JAX


def assert_close(results: Any, expected: Any) -> None:
    """Equal but for a few neighbours: f32 sums may be taken in another order."""
    for actual, wanted in zip(results, expected, strict=True):
        actual, wanted = np.asarray(actual, np.float32), np.asarray(wanted, np.float32)
        np.testing.assert_allclose(actual, wanted, rtol=2**-6, atol=1e-3)
        assert np.mean(actual == wanted) > 0.99


@pytest.mark.parametrize("name", ["nvfp4", "p=f32,c=e5m7,a=bf16@block8,x=int8@channel"])
def test_jit_vmap_and_scan_agree(name: str, compiled, compile_fast):
    spec, site = "btk,kn->btn", linear(name)
    draws = [operands(spec, seed) for seed in range(3)]
    stacked = [jnp.stack(column) for column in zip(*draws, strict=True)]
    one = functools.partial(product_and_gradients, spec, site)
    looped = [compiled(spec, site)(*draw) for draw in draws]
    expected = [np.stack(column) for column in zip(*looped, strict=True)]
    with jax.numpy_dtype_promotion("strict"):
        mapped = compile_fast(jax.vmap(one))(*stacked)
        scan = lambda *xs: jax.lax.scan(lambda _, x: (None, one(*x)), None, xs)[1]
        scanned = compile_fast(scan)(*stacked)
    assert_close(mapped, expected)
    assert_close(scanned, expected)


def test_eager_and_jit_agree(compiled):
    spec, site = "btk,kn->btn", linear("fp8")
    drawn = operands(spec)
    with jax.numpy_dtype_promotion("strict"):
        eager = product_and_gradients(spec, site, *drawn)
    assert_close(eager, compiled(spec, site)(*drawn))


def leaves(equations: Any, jaxpr: Any) -> list[tuple[str, list[str], list[str]]]:
    """What a program does: each primitive with the dtypes it takes and gives."""
    wrappers = ("jit", "pjit", "custom_vjp_call", "custom_jvp_call")
    types = lambda variables: [str(v.aval) for v in variables]
    return [
        (e.primitive.name, types(e.invars), types(e.outvars))
        for e in equations(jaxpr)
        if e.primitive.name not in wrappers
    ]


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("name", ["f32", "bf16", "f16"])
def test_asking_for_nothing_costs_nothing(spec: str, name: str, equations, monkeypatch):
    """A plain policy traces to three dots and their casts, and to no other operation."""
    # Where a single CPU reshapes around a dot is `test_contraction`'s business, and when it casts
    # weights is `test_matmul`'s.
    monkeypatch.setattr(contraction, "_on_one_cpu", jnp.einsum)
    monkeypatch.setattr(matmul, "is_one_cpu", lambda: False)
    inputs, _, y_axes = spec.partition("->")
    x_axes, w_axes = inputs.split(",")
    dtype = linear(name).compute.dtype
    precision = jax.lax.Precision("highest" if name == "f32" else "default")

    def dot(spec: str, x: jax.Array, w: jax.Array) -> jax.Array:
        y = jnp.einsum(spec, x, w, precision=precision, preferred_element_type=jnp.float32)
        return y.astype(dtype)

    def direct(x: jax.Array, w: jax.Array, g: jax.Array) -> Any:
        x, w = x.astype(dtype), w.astype(dtype)
        y, g = dot(spec, x, w), g.astype(dtype)
        dx = dot(f"{y_axes},{w_axes}->{x_axes}", g, w)
        dw = dot(f"{x_axes},{y_axes}->{w_axes}", x, g)
        return y, dx.astype(jnp.float32), dw.astype(jnp.float32)

    drawn = [jnp.asarray(a) for a in operands(spec)]
    ours = jax.make_jaxpr(functools.partial(product_and_gradients, spec, linear(name)))(*drawn)
    theirs = jax.make_jaxpr(direct)(*drawn)
    assert sorted(leaves(equations, ours)) == sorted(leaves(equations, theirs))
