"""Tensors kept in narrow formats between computations: optimizer moments, keys and values.

Stored is not emulated: elements and factors are held in their formats' own dtypes where JAX has
them, and in the narrowest one that holds them where not. Dtypes below a byte are not used: arrays
of them come back from a checkpoint in a layout that compiled programs refuse. What is read back is,
bit for bit, what `fake_quantize` gives.

A failure stays visible. A factor carries the NaN of its group; elements without a factor are held
in a dtype that has a NaN, so `int8` takes two bytes where `int8@channel` takes one.

Knows jax, formats, quantizers and their arithmetic.
"""

from __future__ import annotations

import functools
from typing import Any, Final

import jax
import numpy as np

from lmjax.precision.exact import at_least_f32
from lmjax.precision.formats import Format, parse_format
from lmjax.precision.quantizer import Quantizer
from lmjax.precision.rounding import Overflow, quantize
from lmjax.precision.scaling import Quantized, dequantize, quantize_with_scale

Stored = jax.Array | Quantized
"""An array, or elements and their factors where the quantizer has any."""

_BYTE: Final = 8  # bits
_INTEGERS: Final = tuple(map(parse_format, ("int8", "int16")))
_FLOATS: Final = tuple(map(parse_format, ("e3m4", "e5m2", "f16", "bf16", "f32", "f64")))


def encode(
    x: jax.Array, quantizer: Quantizer, *, axis: int = -1, overflow: Overflow = "clamp"
) -> Stored:
    """A tensor as it is stored, to nearest.

    Args:
      x: float array of any shape.
      quantizer: format and groups.
      axis: the axis that groups run along.
      overflow: what becomes of elements beyond the format, see `quantize`; with factors, none are.

    Returns:
      Elements of the shape of `x`, and factors; the dtype of each is the `holder` of its format.
    """
    if quantizer.groups == "none":
        element = holder(quantizer.format, nan=True)
        return quantize(x, quantizer.format, overflow=overflow).astype(element)
    element = holder(quantizer.format)
    stored = quantize_with_scale(x, quantizer, axis=axis)
    zero_point = stored.zero_point
    return stored._replace(
        values=stored.values.astype(element),
        scale=stored.scale.astype(holder(quantizer.scale)),
        zero_point=None if zero_point is None else zero_point.astype(element),
    )


def decode(stored: Stored, quantizer: Quantizer, *, axis: int = -1) -> jax.Array:
    """What was stored along the same axis, widened to f32 (f64 stays f64)."""
    wide = jax.tree.map(lambda leaf: leaf.astype(at_least_f32(leaf.dtype)), stored)
    if not isinstance(wide, Quantized):
        return wide
    return dequantize(wide, quantizer, axis=axis, dtype=wide.values.dtype)


@functools.cache
def holder(number_format: Format, *, nan: bool = False) -> np.dtype[Any]:
    """The format's own dtype, or the narrowest one of whole bytes that has all its values.

    Args:
      number_format: the format to hold.
      nan: whether it must hold NaN too, which no integer dtype does.
    """
    suits = not (nan and number_format.is_integer)
    if suits and number_format.dtype is not None and number_format.bits >= _BYTE:
        return number_format.dtype
    whole = suits and number_format.is_integer and number_format.smallest_subnormal == 1
    for wider in _INTEGERS if whole else _FLOATS:
        fits = wider.bits >= number_format.bits if whole else wider.contains(number_format)
        if fits and wider.dtype is not None:
            return wider.dtype
    raise ValueError(f"no dtype of JAX holds {number_format}")
