"""Rounds numbers to a format, exactly, on every backend.

`quantize` leaves its result in the dtype it was given, the *carrier*, holding only values of the
format. It works on the integer bits of the carrier, not with floating-point arithmetic and not with
pairs of casts: XLA may elide a pair of casts (its "excess precision"), `lax.reduce_precision`
flushes subnormals, and arithmetic on CPU treats float32 subnormals as zero. Nothing rewrites
integers that way, so eager execution, jit, vmap and scan give the same bits, whether or not the
hardware has the format.

Overflow, infinity and NaN follow one rule wherever a policy assigns a format. `overflow` selects
which part applies:

1. A format with infinities (f16, e5m2, tf32, any custom eXmY) behaves as in hardware: a number that
   rounds to more than its largest value becomes infinity, and infinity and NaN are kept.
2. A format without infinities (e4m3, e2m1, intN) turns infinity into NaN and keeps NaN. If it has
   no pattern for NaN, the array that holds its values does. A finite number beyond its range

   - is clamped to its largest value where saturation is what the format means: parameters, compute
     and output formats, operands, keys and values (`clamp`);
   - becomes NaN where a clamp would hide a failure: accumulators, gradients reduced over devices,
     optimizer moments, and all cotangents while the loss scale is dynamic or predictive, so that
     the step is skipped and the scale lowered (`fail`).
3. With scale factors (`scaling.py`) the largest element of a group fits by construction, and an
   element that is not finite makes its group NaN. Only a delayed or coarsely rounded factor can
   leave elements beyond the range. They are clamped: the factor follows the loss scale, so lowering
   the scale would not help.

Knows jax, numpy, `formats` and `bits`.
"""

from __future__ import annotations

import functools
import math
from typing import Any, Final, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from lmjax.precision.asides import rounded_to
from lmjax.precision.bits import join, pattern, split, unsigned
from lmjax.precision.formats import Encoding, Format, as_format, parse_format

Rounding = Literal["nearest_even", "toward_zero", "stochastic"]
Overflow = Literal["saturate", "native", "clamp", "fail"]

_CARRIERS: Final = {f.dtype: f for f in map(parse_format, ("bf16", "f16", "f32", "f64"))}
_NOISE_BITS: Final = 32


def quantize(
    x: jax.Array,
    format: Format | str,
    rounding: Rounding = "nearest_even",
    key: jax.Array | None = None,
    overflow: Overflow = "saturate",
) -> jax.Array:
    """Rounds `x` to values of `format`, kept in the dtype of `x`.

    A format that holds every value of the carrier leaves `x` as it is, infinities included.
    Otherwise:

    - *Rounding.* `nearest_even` is IEEE 754 roundTiesToEven; in formats without mantissa bits,
      where neither neighbour is even, ties go away from zero (IEEE 754-2019, 4.3.1). `toward_zero`
      truncates. `stochastic` takes the upper neighbour with the probability that makes the expected
      result `x`, to within 2**-32 of the distance between the neighbours, in subnormals too; values
      of the format stay as they are.
    - *Overflow.* The boundary is that of the rounding; `toward_zero` overflows only at infinity. In
      a format with infinities, `native`, `clamp` and `fail` all give infinity. In one without,
      `clamp` gives the largest finite value for finite numbers and NaN for infinities, `fail` gives
      NaN for both, and `native` does what ml_dtypes does: NaN if the format has it, else the
      largest finite value. `saturate` clamps infinities too, in every format; of the tensors of a
      policy only elements with a factor are rounded that way, after theirs have become NaN.
      Clamping is to the largest finite value that the carrier holds as well (65280 for f16 in
      bf16). A result that `format` holds but the carrier does not (bf16's 65536 in f16) becomes
      infinity.
    - *NaN* stays NaN, even where the format has none: a quantizer must not hide a failure.
    - *Zero* loses its sign where the format has no negative zero.
    - *e8m0* has neither zero nor sign: positive values below its smallest become its smallest, zero
      does so under `saturate` and `clamp` and is NaN under `native` and `fail`, negative values are
      NaN. (ml_dtypes 0.6 and XLA round everything between 2**-127 and 2**-126 up; here it goes to
      the nearest.)

    The derivative with respect to `x` is the identity, as that of `astype` is.

    Args:
      x: float32, bfloat16, float16 or float64 array of any shape.
      format: a format, or the name of one.
      rounding: how to choose between the two neighbours.
      key: random key for stochastic rounding; each element draws 32 bits from it.
      overflow: what happens beyond the largest finite value.

    Returns:
      Array of the shape and dtype of `x`.

    Raises:
      TypeError: `x` is not of a carrier dtype.
      ValueError: unknown rounding, overflow or format; stochastic rounding without a key; e8m0 in
        float16, whose range is too small for it.
    """
    format = as_format(format)
    x = jnp.asarray(x)
    _check_arguments(x, format, rounding, key, overflow)
    if format.contains(_CARRIERS[x.dtype]):
        return x
    noise = None
    with rounded_to(format.name):
        if rounding == "stochastic" and key is not None:
            noise = jax.random.bits(key, x.shape, jnp.uint32)
        return _quantize(x, noise, format, rounding, overflow)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def emulate(x: jax.Array, format: Format, cotangents: Overflow) -> jax.Array:
    """Rounds `x` to nearest, as an array of `format` would hold it, and its cotangent likewise.

    JAX gives a cotangent the dtype of its primal. A format without a dtype to compute in gets the
    same here: the cotangent is rounded to it as well.

    Args:
      x: array of a carrier dtype.
      format: the format that the carrier stands in for.
      cotangents: what happens to a cotangent beyond it, see `quantize`.
    """
    return quantize(x, format, overflow="clamp")


def _emulate_forward(x: jax.Array, format: Format, cotangents: Overflow) -> tuple[jax.Array, None]:
    return emulate(x, format, cotangents), None


def _emulate_backward(
    format: Format, cotangents: Overflow, _: None, g: jax.Array
) -> tuple[jax.Array]:
    return (quantize(g, format, overflow=cotangents),)


emulate.defvjp(_emulate_forward, _emulate_backward)


def _check_arguments(
    x: jax.Array, format: Format, rounding: str, key: jax.Array | None, overflow: str
) -> None:
    if x.dtype not in _CARRIERS:
        raise TypeError(f"quantize takes float32, bfloat16, float16 or float64, not {x.dtype}")
    if rounding not in get_args(Rounding):
        raise ValueError(f"unknown rounding {rounding!r}; use one of {get_args(Rounding)}")
    if overflow not in get_args(Overflow):
        raise ValueError(f"unknown overflow {overflow!r}; use one of {get_args(Overflow)}")
    if rounding == "stochastic" and key is None:
        raise ValueError("stochastic rounding needs a random key: pass key=jax.random.key(...)")
    if format.encoding is Encoding.SCALE and x.dtype == np.float16:
        raise ValueError(f"{format} goes far beyond the range of float16; hold it in float32")


@functools.partial(jax.custom_jvp, nondiff_argnums=(2, 3, 4))
@functools.partial(jax.jit, static_argnums=(2, 3, 4), inline=True)
def _quantize(
    x: jax.Array, noise: jax.Array | None, format: Format, rounding: Rounding, overflow: Overflow
) -> jax.Array:
    work, sign, magnitude = split(x)
    round_to_grid = _round if format.signed else _round_scale
    rounded = round_to_grid(magnitude, noise, format, work, rounding)
    infinity = pattern(np.inf, work)
    if _clamps(format, overflow):
        result = jnp.minimum(rounded, _limit(sign, format, _CARRIERS[x.dtype], work))
        if overflow == "clamp":
            result = jnp.where(magnitude == infinity, pattern(np.nan, work), result)
    else:
        result = _overflow(rounded, magnitude, sign, format, work, rounding)
    result = jnp.where(magnitude > infinity, magnitude, result)

    if not format.signed:
        outside = (sign > 0) & (magnitude > 0)
        if overflow in ("native", "fail"):
            outside |= magnitude == 0
        sign, result = jnp.zeros_like(sign), jnp.where(outside, pattern(np.nan, work), result)
    elif not format.has_negative_zero:
        sign = jnp.where(result == 0, jnp.zeros_like(sign), sign)
    return join(sign, result, x.dtype)


@_quantize.defjvp
def _straight_through(
    format: Format,
    rounding: Rounding,
    overflow: Overflow,
    primals: tuple[jax.Array, jax.Array | None],
    tangents: tuple[jax.Array, Any],
) -> tuple[jax.Array, jax.Array]:
    return _quantize(*primals, format, rounding, overflow), tangents[0]


def _round(
    magnitude: jax.Array, noise: jax.Array | None, format: Format, work: Format, rounding: Rounding
) -> jax.Array:
    """Rounds to the grid of `format` extended upwards without limit."""
    integer = unsigned(work)
    width = integer(work.mantissa_bits)
    exponent = jnp.maximum(magnitude >> width, integer(1))  # subnormals share the lowest exponent
    base = (exponent - integer(1)) << width
    significand = magnitude - base  # with its leading bit, which subnormals lack

    fixed_below = integer(format.smallest_exponent + work.bias)
    excess_bits = integer(work.mantissa_bits - format.mantissa_bits)
    count = excess_bits + jnp.maximum(exponent, fixed_below) - exponent
    kept = _drop_bits(significand, count, noise, work, rounding)

    # A carry out of the significand moves on into the exponent, where it belongs. When all bits
    # were dropped, what is left is zero or one quantum.
    quantum = pattern(format.smallest_subnormal, work)
    return jnp.where(count > width, kept * quantum, base + (kept << jnp.minimum(count, width)))


def _round_scale(
    magnitude: jax.Array, noise: jax.Array | None, format: Format, work: Format, rounding: Rounding
) -> jax.Array:
    """Rounds to a power of two.

    The smallest is subnormal in float32, where the leading bit is not implicit; so this rounds
    twice the number, which is normal.
    """
    integer = unsigned(work)
    one_exponent = integer(1 << work.mantissa_bits)
    magnitude = jnp.maximum(magnitude, pattern(format.smallest_normal, work))
    subnormal = magnitude < one_exponent
    doubled = jnp.where(subnormal, magnitude << integer(1), magnitude + one_exponent)
    rounded = _round(doubled, noise, format, work, rounding)
    return jnp.where(rounded > one_exponent, rounded - one_exponent, rounded >> integer(1))


def _drop_bits(
    significand: jax.Array,
    count: jax.Array,
    noise: jax.Array | None,
    work: Format,
    rounding: Rounding,
) -> jax.Array:
    """`significand / 2**count`, rounded to an integer."""
    integer = unsigned(work)
    all_and_half = integer(work.mantissa_bits + 2)  # dropping more than this gives the same
    shift = jnp.minimum(count, all_and_half)
    kept = significand >> shift
    tail = significand - (kept << shift)
    if rounding == "toward_zero":
        return kept
    if noise is not None:
        up = noise.astype(integer) < _fraction(tail, count, work)
    else:
        twice, unit = tail << integer(1), integer(1) << shift
        up = (twice > unit) | ((twice == unit) & (kept & integer(1) > 0))
    return kept + up.astype(integer)


def _fraction(tail: jax.Array, count: jax.Array, work: Format) -> jax.Array:
    """`tail / 2**count` as a fixed-point number of `_NOISE_BITS` bits, truncated."""
    integer = unsigned(work)
    bits = integer(_NOISE_BITS)
    left = bits - jnp.clip(count, integer(1), bits)
    right = jnp.clip(count, bits, bits + integer(work.mantissa_bits + 1)) - bits
    return (tail << left) >> right


def _limit(sign: jax.Array, format: Format, carrier: Format, work: Format) -> jax.Array:
    """Magnitude of the largest value of that sign that both `format` and `carrier` hold."""
    bits = min(format.mantissa_bits, carrier.mantissa_bits) + 1
    fraction, exponent = math.frexp(min(format.largest_finite, carrier.largest_finite))
    positive = math.ldexp(math.floor(math.ldexp(fraction, bits)), exponent - bits)
    negative = -format.smallest_finite if format.is_integer else positive
    return jnp.where(sign > 0, pattern(negative, work), pattern(positive, work))


def _clamps(format: Format, overflow: Overflow) -> bool:
    """Whether finite numbers beyond the format become its largest value."""
    match overflow:
        case "saturate":
            return True
        case "clamp":
            return not format.has_infinity
        case "native":
            return not format.has_nan
        case "fail":
            return False


def _overflow(
    rounded: jax.Array,
    magnitude: jax.Array,
    sign: jax.Array,
    format: Format,
    work: Format,
    rounding: Rounding,
) -> jax.Array:
    """Puts infinity, or NaN where there is none, where the format ends."""
    largest: Any = pattern(format.largest_finite, work)
    if format.is_integer:
        largest = jnp.where(sign > 0, pattern(-format.smallest_finite, work), largest)
    over = rounded > largest
    if rounding == "toward_zero":
        over = magnitude == pattern(np.inf, work)
        rounded = jnp.minimum(rounded, largest)
    special = pattern(np.inf if format.has_infinity else np.nan, work)
    return jnp.where(over, special, rounded)


@functools.partial(jax.jit, inline=True)
def ldexp(x: jax.Array, exponent: jax.Array) -> jax.Array:
    """`x * 2**exponent`, rounded to nearest even, with subnormals that arithmetic might flush.

    Args:
      x: float32 or float64 array.
      exponent: int32 array that broadcasts against `x`.

    Returns:
      Array of the dtype of `x`; infinity beyond its range.
    """
    work, sign, magnitude = split(x)
    integer = unsigned(work)
    width = integer(work.mantissa_bits)
    hidden = integer(1 << work.mantissa_bits)
    infinity = pattern(np.inf, work)

    # A subnormal is its mantissa, as an integer, times the smallest subnormal.
    subnormal = magnitude < hidden
    as_float = lax.bitcast_convert_type(magnitude.astype(x.dtype), integer)
    normal = jnp.where(subnormal, as_float, magnitude)
    lowered = jnp.where(subnormal, np.int32(work.bias + work.mantissa_bits - 1), np.int32(0))

    field = (normal >> width).astype(jnp.int32) - lowered + exponent
    top = np.int32(infinity >> width)
    base = (jnp.clip(field, np.int32(1), top) - np.int32(1)).astype(integer) << width
    count = jnp.maximum(np.int32(1) - field, np.int32(0)).astype(integer)
    significand = (normal & (hidden - integer(1))) | hidden
    scaled = base + _drop_bits(significand, count, None, work, "nearest_even")

    scaled = jnp.minimum(scaled, infinity)
    fixed = (magnitude == 0) | (magnitude >= infinity)
    return join(sign, jnp.where(fixed, magnitude, scaled), x.dtype)
