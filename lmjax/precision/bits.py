"""Floating-point numbers as integers: sign and magnitude bit patterns.

The pattern of a float without its sign is an integer that increases with the number, with infinity
above all finite numbers and NaN above infinity. Comparisons, maxima and rounding can therefore run
on integers, where no compiler flushes subnormals or keeps excess precision.

The *work format* is the format whose bits are computed on: float64 for float64 arrays, float32 for
float32 and everything narrower, which it holds exactly.

Knows jax, numpy and `formats`.
"""

from __future__ import annotations

from typing import Any, Final

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from lmjax.precision.formats import Format, parse_format

F32: Final = parse_format("f32")
F64: Final = parse_format("f64")


def split(x: jax.Array) -> tuple[Format, jax.Array, jax.Array]:
    """Splits a float array into sign and magnitude bits, exactly.

    Args:
      x: float32, bfloat16, float16 or float64 array.

    Returns:
      The work format, and the sign bit (in place) and the magnitude as unsigned integers of its
      width.
    """
    work = F64 if x.dtype == np.float64 else F32
    if x.dtype == jnp.bfloat16:  # not by a cast, which is free to flush subnormals
        bits = lax.bitcast_convert_type(x, jnp.uint16).astype(jnp.uint32) << np.uint32(16)
    else:
        bits = lax.bitcast_convert_type(x.astype(work.dtype), unsigned(work))
    sign = bits & unsigned(work)(1 << (work.bits - 1))
    return work, sign, bits ^ sign


def join(sign: jax.Array, magnitude: jax.Array, dtype: Any) -> jax.Array:
    """Returns the array of `dtype` with these bits; inverts `split` for values of `dtype`."""
    bits = sign | magnitude
    if dtype == jnp.bfloat16:
        return lax.bitcast_convert_type((bits >> np.uint32(16)).astype(jnp.uint16), jnp.bfloat16)
    work_dtype = jnp.float64 if bits.dtype == np.uint64 else jnp.float32
    return lax.bitcast_convert_type(bits, work_dtype).astype(dtype)


def widen(x: jax.Array) -> jax.Array:
    """`x` in its work format, float32 or float64; no value changes, subnormals included."""
    work, sign, magnitude = split(x)
    return join(sign, magnitude, work.dtype)


def unsigned(work: Format) -> type[np.unsignedinteger[Any]]:
    """The integer type as wide as the work format."""
    return np.uint64 if work.bits == 64 else np.uint32


def pattern(value: float, work: Format) -> np.unsignedinteger[Any]:
    """The bits of a number in the work format."""
    return unsigned(work)(np.array(value, dtype=work.dtype).view(unsigned(work)))


def largest_magnitude(x: jax.Array, axis: int | tuple[int, ...] | None = None) -> jax.Array:
    """`max(abs(x))`, subnormals included; NaN if there is a NaN.

    Args:
      x: float array of any shape.
      axis: the axis or axes to reduce; all of them by default.

    Returns:
      Array without those axes, float64 for float64 and float32 for everything else.
    """
    work, _, magnitude = split(x)
    largest = jnp.max(magnitude, axis=axis, initial=unsigned(work)(0))
    return join(jnp.zeros_like(largest), largest, work.dtype)


def floor_log2(x: jax.Array) -> jax.Array:
    """`floor(log2(abs(x)))` of normal numbers, int32; one below the lowest exponent for all others.

    This is correct for 2**-127, the smallest e8m0, although it is subnormal in float32.
    """
    work, _, magnitude = split(x)
    exponent = magnitude >> unsigned(work)(work.mantissa_bits)
    return exponent.astype(jnp.int32) - np.int32(work.bias)
