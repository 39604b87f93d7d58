"""Rounding into formats, bit for bit: against ml_dtypes, exact tables and Python's fractions."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from lmjax.precision.formats import Encoding, Format, parse_format
from lmjax.precision.rounding import _quantize, ldexp, quantize

ML_DTYPES = {
    "bf16": ml_dtypes.bfloat16,
    "f16": np.float16,
    "e4m3": ml_dtypes.float8_e4m3fn,
    "e4m3fnuz": ml_dtypes.float8_e4m3fnuz,
    "e5m2": ml_dtypes.float8_e5m2,
    "e5m2fnuz": ml_dtypes.float8_e5m2fnuz,
    "e3m4": ml_dtypes.float8_e3m4,
    "e8m0": ml_dtypes.float8_e8m0fnu,
    "e3m2": ml_dtypes.float6_e3m2fn,
    "e2m3": ml_dtypes.float6_e2m3fn,
    "e2m1": ml_dtypes.float4_e2m1fn,
}
USUAL = (*ML_DTYPES, "int2", "int4", "int8", "int16", "e2m0", "e5m0", "e8m1", "e2m2", "e6m9")
RARE = tuple(
    name
    for name in (
        *(f"e{x}m{y}" for x in range(2, 9) for y in range(16 - x)),
        *(f"int{bits}" for bits in range(2, 17)),
    )
    if parse_format(name).name == name and name not in USUAL
)


def float32_patterns(count: int, seed: int) -> np.ndarray:
    """Random bit patterns: all exponents are equally likely, subnormals and NaN included."""
    generator = np.random.default_rng(seed)
    return generator.integers(0, 2**32, count, dtype=np.uint32).view(np.float32)


@functools.cache
def common_inputs() -> np.ndarray:
    """All f16, all bf16, and a million random f32 patterns."""
    codes = np.arange(2**16, dtype=np.uint16)
    halves = codes.view(np.float16).astype(np.float32)
    brains = (codes.astype(np.uint32) << 16).view(np.float32)
    return np.concatenate([halves, brains, float32_patterns(1_000_000, seed=0)])


def grid(format: Format) -> np.ndarray:
    """Magnitudes of the format in ascending order, and the first one past the largest, float64."""
    table = format.values()[: format.largest_code + 1]
    if format.mantissa_bits == 0:
        return np.append(table, 2 * table[-1])
    return np.append(table, 2 * table[-1] - table[-2])


def boundary_inputs(format: Format) -> np.ndarray:
    """Every value, every midpoint, and the float32 neighbours of each, with both signs."""
    points = grid(format)
    points = np.concatenate([points, (points[1:] + points[:-1]) / 2])
    points = points[points <= np.finfo(np.float32).max].astype(np.float32)
    up, down = (np.nextafter(points, np.float32(end)) for end in (np.inf, -np.inf))
    special = np.array([0, np.inf, np.nan], np.float32)
    points = np.concatenate([points, up, down, special])
    return np.concatenate([points, -points])


def reference(x: np.ndarray, format: Format, rounding: str, overflow: str) -> np.ndarray:
    """Looks the neighbours up in the format's table; float64 in, float64 out."""
    with np.errstate(invalid="ignore"):
        magnitude = np.abs(x.astype(np.float64))
    points, last = grid(format), format.largest_code
    index = np.clip(np.searchsorted(points, magnitude, side="right") - 1, 0, last + 1)
    if rounding == "nearest_even":
        middle = (points[index] + points[np.minimum(index + 1, last + 1)]) / 2
        if format.encoding is Encoding.SCALE:
            tie_goes_up = np.ones(index.shape, bool)
        elif format.mantissa_bits == 0:
            tie_goes_up = index > 0
        else:
            tie_goes_up = index % 2 == 1
        index += (magnitude > middle) | ((magnitude == middle) & tie_goes_up)
    largest = np.where(format.is_integer & (x < 0), last + 1, last)
    result = points[np.minimum(index, largest)]
    if overflow == "native" and format.has_nan:
        over = np.isinf(magnitude) if rounding == "toward_zero" else index > last
        result[over] = np.inf if format.has_infinity else np.nan
    result = np.copysign(result, x)
    if format.encoding is Encoding.SCALE:
        result[x < 0] = np.nan
        result = np.abs(result)
        if overflow == "native":
            result[x == 0] = np.nan
    elif not format.has_negative_zero:
        result[result == 0] = 0
    return np.where(np.isnan(x), np.nan, result)


def definition(x: Fraction, format: Format) -> Fraction:
    """Nearest value to a positive `x` by the definition of the format, were there no largest."""
    exponent = math.floor(math.log2(x))
    exponent += (Fraction(2) ** (exponent + 1) <= x) - (Fraction(2) ** exponent > x)
    exponent = max(exponent, format.smallest_exponent)
    quantum = Fraction(2) ** (exponent - format.mantissa_bits)
    steps = round(x / quantum)  # half to even
    if format.encoding is Encoding.SCALE:
        steps = max(steps, 1)
    return steps * quantum


def assert_same_bits(actual: Any, expected: np.ndarray, inputs: np.ndarray) -> None:
    actual, expected = np.asarray(actual), expected.astype(actual.dtype)
    unsigned = np.dtype(f"u{actual.dtype.itemsize}")
    with np.errstate(invalid="ignore"):
        both_nan = np.isnan(actual.astype(np.float64)) & np.isnan(expected.astype(np.float64))
    wrong = (actual.view(unsigned) != expected.view(unsigned)) & ~both_nan
    shown = list(zip(inputs[wrong][:5], actual[wrong][:5], expected[wrong][:5], strict=True))
    assert not wrong.any(), f"{wrong.sum()} differ; input, actual, expected: {shown}"


def check_all(name: str) -> None:
    format = parse_format(name)
    x = np.concatenate([boundary_inputs(format), common_inputs()])
    with np.errstate(over="ignore", invalid="ignore"):
        for rounding, overflow in (
            ("nearest_even", "native"),
            ("nearest_even", "saturate"),
            ("toward_zero", "native"),
        ):
            actual = quantize(jnp.asarray(x), format, rounding, overflow=overflow)  # type: ignore[arg-type]
            expected = reference(x, format, rounding, overflow)
            assert_same_bits(actual, expected, x)


@pytest.mark.parametrize("name", USUAL)
def test_every_value_midpoint_and_neighbour(name: str) -> None:
    check_all(name)


@pytest.mark.long
@pytest.mark.parametrize("name", RARE)
def test_every_value_midpoint_and_neighbour_of_rare_formats(name: str) -> None:
    check_all(name)


@pytest.mark.parametrize("name", ML_DTYPES)
def test_same_bits_as_ml_dtypes(name: str) -> None:
    format, dtype = parse_format(name), ML_DTYPES[name]
    x = np.concatenate([boundary_inputs(format), common_inputs()])
    if not format.has_nan:  # ml_dtypes turns NaN into -0 or 0 there
        x = x[~np.isnan(x)]
    if name == "e8m0":  # rounded up by ml_dtypes wherever they lie between the two smallest values
        x = x[~((x > 2.0**-127) & (x < 1.5 * 2.0**-127))]
    with np.errstate(over="ignore", invalid="ignore"):
        expected = x.astype(dtype).astype(np.float32)
    assert_same_bits(quantize(jnp.asarray(x), name, overflow="native"), expected, x)


@pytest.mark.parametrize("name", [*USUAL, "tf32", "e7m20", "e8m22", "e2m23"])
def test_reference_agrees_with_fractions(name: str) -> None:
    format = parse_format(name)
    x = np.abs(float32_patterns(3000, seed=1))
    near = np.random.default_rng(2).lognormal(0, 4, 1000).astype(np.float32)
    near = near[near < format.largest_finite]
    x = np.concatenate([x[np.isfinite(x) & (x > 0)], near])
    exact = [definition(Fraction(float(value)), format) for value in x]
    expected = np.array([float(min(value, Fraction(format.largest_finite))) for value in exact])
    assert_same_bits(quantize(jnp.asarray(x), format), expected, x)
    if format.bits <= 16:
        np.testing.assert_array_equal(reference(x, format, "nearest_even", "saturate"), expected)


def under_scan(function: Callable[[jax.Array], jax.Array]) -> Callable[[jax.Array], jax.Array]:
    return lambda x: jax.lax.scan(lambda carry, row: (carry, function(row)), 0, x)[1]


@pytest.mark.parametrize("name", [*ML_DTYPES, "int8", "e2m0", "e8m1"])
def test_same_bits_in_every_context(name: str) -> None:
    format = parse_format(name)
    x = np.resize(boundary_inputs(format), (8, 512))

    # Arithmetic before and after gives the compiler something to fuse with, and a cast to elide.
    def function(row: jax.Array) -> jax.Array:
        return -quantize(-row, format, overflow="native")

    expected = np.asarray(function(jnp.asarray(x)))
    for transform in (jax.jit, jax.vmap, under_scan, lambda f: jax.jit(under_scan(jax.vmap(f)))):
        rows = x[None] if transform is not jax.jit and transform is not jax.vmap else x
        actual = transform(function)(jnp.asarray(rows))
        assert_same_bits(np.asarray(actual).reshape(x.shape), expected, x)


@pytest.mark.parametrize("name", [*USUAL, "tf32", "e8m22"])
@pytest.mark.parametrize("carrier", ["bf16", "f16"])
def test_narrow_carriers_hold_what_float32_would(name: str, carrier: str) -> None:
    format, narrow = parse_format(name), parse_format(carrier)
    if carrier == "f16" and name == "e8m0":
        pytest.skip("refused; see test_refusals")
    x = np.arange(2**16, dtype=np.uint16).view(ML_DTYPES[carrier])
    actual = quantize(jnp.asarray(x), format, overflow="native")
    wide = np.asarray(quantize(jnp.asarray(x.astype(np.float32)), format, overflow="native"))
    if not format.has_infinity and not format.has_nan:  # clamps: to a value that both hold
        held = np.minimum(np.abs(wide), max_held(format, narrow))
        wide = np.where(wide == format.smallest_finite, wide, np.copysign(held, wide))
    with np.errstate(over="ignore", invalid="ignore"):
        assert_same_bits(actual, wide.astype(narrow.dtype), x)

    with np.errstate(invalid="ignore"):
        saturated = np.asarray(quantize(jnp.asarray(x), format)).astype(np.float64)
        finite = np.isfinite(x.astype(np.float64))
    if not format.contains(narrow):
        assert np.nanmax(saturated) == max_held(format, narrow)
        assert not np.isinf(saturated).any()
    assert_same_bits(
        quantize(jnp.asarray(saturated[finite], jnp.float32), format),
        saturated[finite],
        x[finite],
    )


def max_held(format: Format, carrier: Format) -> float:
    table = carrier.values()
    table = table[np.isfinite(table) & (table <= format.largest_finite)]
    both = table[np.isfinite(table)].astype(np.float32)
    rounded = np.asarray(quantize(jnp.asarray(both), format, "toward_zero"))
    return float(both[rounded == both].max())


def test_float64_is_rounded_once() -> None:
    with jax.enable_x64(True):
        just_above_tie = np.array([1 + 2.0**-4 + 2.0**-40, -(1 + 2.0**-4 + 2.0**-40), 2.0**-1060])
        actual = quantize(jnp.asarray(just_above_tie), "e4m3")
        assert actual.dtype == jnp.float64
        np.testing.assert_array_equal(np.asarray(actual), [1.125, -1.125, 0.0])
        with np.errstate(over="ignore", invalid="ignore"):
            x = float32_patterns(10_000, seed=3).astype(np.float64) * (1 + 2.0**-45)
            expected = x.astype(np.float32).astype(np.float64)
        assert_same_bits(quantize(jnp.asarray(x), "f32", overflow="native"), expected, x)


@pytest.mark.parametrize("name", [n for n in ML_DTYPES if parse_format(n).dtype is not None])
def test_native_dtype_holds_the_same_bits(name: str) -> None:
    format = parse_format(name)
    x = common_inputs()[:: 97 if format.bits > 8 else 11]
    x = x[~np.isnan(x)] if not format.has_nan else x
    emulated = quantize(jnp.asarray(x), format, overflow="native")
    native = emulated.astype(format.dtype)
    assert_same_bits(emulated, np.asarray(native).astype(np.float32), x)


def test_native_integers() -> None:
    x = jnp.asarray([-200.0, -128.5, -1.5, -0.0, 2.5, 3.5, 127.4, 1e9], jnp.float32)
    actual = quantize(x, "int8").astype(jnp.int8)
    np.testing.assert_array_equal(np.asarray(actual), [-128, -128, -2, 0, 2, 4, 127, 127])


# One point in each kind of place: normal, subnormal, below the smallest, above the largest.
STOCHASTIC = [
    ("bf16", 1.001),
    ("e4m3", -3.3),
    ("e4m3", 0.0123),
    ("e4m3", 0.0001),
    ("e4m3", 440.0),
    ("e2m1", 0.3),
    ("e2m1", -5.1),
    ("int8", 17.2),
    ("int8", -0.03),
    ("e5m2fnuz", 1e-6),
    ("f16", 3.3e-8),
    ("e5m0", 2.3),
    ("e8m0", 5.5),
    ("e8m0", 1.3 * 2.0**-127),
    ("e8m1", 1.1 * 2.0**-127),
]


@pytest.mark.parametrize(("name", "x"), STOCHASTIC)
def test_stochastic_rounding_is_unbiased(name: str, x: float) -> None:
    count, format = 200_000, parse_format(name)
    draws = quantize(
        jnp.full((count,), x, jnp.float32), format, "stochastic", key=jax.random.key(7)
    )
    drawn = np.asarray(draws).astype(np.float64)
    points = grid(format)
    upper = np.searchsorted(points, abs(x))
    neighbours = np.copysign(points[upper - 1 : upper + 1], x)
    assert set(np.unique(drawn)) == set(neighbours + 0.0)
    gap = abs(neighbours[1] - neighbours[0])
    share = (abs(float(np.float32(x))) - points[upper - 1]) / gap
    standard_error = gap * math.sqrt(share * (1 - share) / count)
    assert abs(drawn.mean() - float(np.float32(x))) < 4 * standard_error


def test_stochastic_rounding_uses_every_discarded_bit() -> None:
    # 2**-18 of the way up: 16 random bits could not tell this from zero.
    x = jnp.full((2**23,), 1.0 + 2.0**-18 * 0.125, jnp.float32)
    ups = int(jnp.sum(quantize(x, "e4m3", "stochastic", key=jax.random.key(0)) > 1.0))
    assert abs(ups - 32) < 4 * math.sqrt(32)


@pytest.mark.parametrize("name", USUAL)
def test_stochastic_rounding_keeps_values_of_the_format(name: str) -> None:
    format = parse_format(name)
    values = format.values()
    values = np.resize(values[np.isfinite(values)].astype(np.float32), (2**16,))
    actual = quantize(jnp.asarray(values), format, "stochastic", key=jax.random.key(0))
    assert_same_bits(actual, values, values)


def test_extreme_noise() -> None:
    x = jnp.asarray([1.0, 1.0 + 2.0**-23, 1.125 - 2.0**-23, 2.0**-40, 448.0], jnp.float32)
    rounded = {
        noise: _quantize(
            x, jnp.full(x.shape, noise, jnp.uint32), parse_format("e4m3"), "stochastic", "native"
        ).tolist()
        for noise in (0, 2**32 - 1)
    }
    assert rounded[0] == [1.0, 1.125, 1.125, 2.0**-9, 448.0]
    assert rounded[2**32 - 1] == [1.0, 1.0, 1.0, 0.0, 448.0]


def test_key_decides_stochastic_rounding() -> None:
    x = jnp.linspace(0.0, 1.0, 256, dtype=jnp.float32)
    first, again = (quantize(x, "e4m3", "stochastic", key=jax.random.key(1)) for _ in range(2))
    other = quantize(x, "e4m3", "stochastic", key=jax.random.key(2))
    assert_same_bits(first, np.asarray(again), np.asarray(x))
    assert np.any(np.asarray(first) != np.asarray(other))


@pytest.mark.parametrize("rounding", ["nearest_even", "toward_zero", "stochastic"])
def test_derivative_is_the_identity(rounding: Any) -> None:
    x = jnp.asarray([0.3, -700.0, 1e-9], jnp.float32)
    key = jax.random.key(0)
    weights = jnp.asarray([1.0, 2.0, 3.0], jnp.float32)
    gradient = jax.grad(lambda x: jnp.sum(weights * quantize(x, "e4m3", rounding, key)))(x)
    np.testing.assert_array_equal(np.asarray(gradient), np.asarray(weights))


def test_a_format_that_holds_the_carrier_costs_nothing() -> None:
    x = jnp.asarray([1.0, np.inf], jnp.float32)
    assert quantize(x, "f32") is x
    assert jax.make_jaxpr(lambda x: quantize(x, "f64"))(x).eqns == []
    assert quantize(x.astype(jnp.bfloat16), "tf32").tolist() == [1.0, np.inf]
    assert quantize(x, "f16").tolist() == [1.0, 65504.0]


def test_refusals() -> None:
    x = jnp.ones((2,), jnp.float32)
    with pytest.raises(ValueError, match="needs a random key"):
        quantize(x, "e4m3", "stochastic")
    with pytest.raises(ValueError, match="unknown rounding 'up'"):
        quantize(x, "e4m3", "up")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="unknown overflow 'wrap'"):
        quantize(x, "e4m3", overflow="wrap")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="not int32"):
        quantize(jnp.ones((2,), jnp.int32), "e4m3")
    with pytest.raises(ValueError, match="hold it in float32"):
        quantize(x.astype(jnp.float16), "e8m0")


def test_ldexp_is_exact_through_subnormals() -> None:
    x = float32_patterns(2000, seed=5)
    exponents = np.random.default_rng(6).integers(-300, 300, x.size, dtype=np.int32)
    with np.errstate(over="ignore", under="ignore", invalid="ignore"):
        expected = np.ldexp(x.astype(np.float64), exponents).astype(np.float32)
    subnormal = (expected != 0) & (np.abs(expected) < np.finfo(np.float32).smallest_normal)
    assert subnormal.sum() > 20
    assert_same_bits(ldexp(jnp.asarray(x), jnp.asarray(exponents)), expected, x)
