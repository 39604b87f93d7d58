"""Scales tensors into narrow formats, with one factor for each group of numbers.

Three rules hold for every `Quantizer`.

*A failure stays visible.* NaN or infinity in a group makes its factor NaN, and with it the group.

*Powers of two are exact.* Multiplying by an e8m0 factor is done on the exponent, subnormal factors
and subnormal results included.

*Other factors are applied by multiplying with the reciprocal*, `x * (1 / scale)`, each rounded to
float32. XLA rewrites some divisions by broadcast values that way and not others, so a division
would round differently from one program to the next. For the same reason a factor is
`amax * (1 / largest)`.

Knows jax, numpy, `formats`, `bits`, `rounding`, `quantizer` and `grouping`.
"""

from __future__ import annotations

import functools
from typing import Any, Final, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lmjax.precision.asides import aside, rounded_to
from lmjax.precision.bits import floor_log2, largest_magnitude, widen
from lmjax.precision.formats import Format, integer
from lmjax.precision.grouping import Axis, Bounds, Grouping
from lmjax.precision.quantizer import E4M3, E8M0, Quantizer
from lmjax.precision.rounding import Rounding, ldexp, quantize

# Factors stay where neither they nor their reciprocals are subnormal, which XLA on CPU takes for 0.
SMALLEST_FACTOR: Final = np.float32(2.0**-126)
LARGEST_FACTOR: Final = np.float32(2.0**126)
# Times the smallest e4m3, 2**-9, this is still normal.
_SMALLEST_TENSOR_FACTOR: Final = np.float32(2.0**-117)


class Factors(NamedTuple):
    """What the elements of a tensor are multiplied by, and counted from; see `Quantized`."""

    scale: jax.Array
    zero_point: jax.Array | None = None
    tensor_scale: jax.Array | None = None


class Quantized(NamedTuple):
    """Elements and the factors needed to dequantize them.

    Attributes:
      values: shape of the tensor; values of the element format in float32 (float64 for float64).
      scale: float32 factors, values of `Quantizer.scale`: shape [] for a tensor; the tensor's shape
        with length 1 at the grouped axes (channel), or the number of blocks at the grouped axis.
      zero_point: like `scale`, or None if not affine.
      tensor_scale: float32 [], or None.
    """

    values: jax.Array
    scale: jax.Array
    zero_point: jax.Array | None = None
    tensor_scale: jax.Array | None = None

    @property
    def factors(self) -> Factors:
        """All but the elements."""
        return Factors(*self[1:])

    @property
    def factor(self) -> jax.Array:
        """The factor of a group: `scale` times `tensor_scale`."""
        return _factor(self.scale, self.tensor_scale)


def elements(
    x: jax.Array, quantizer: Quantizer, *, axis: Axis = -1, scale: jax.Array | None = None
) -> tuple[jax.Array, jax.Array]:
    """A tensor in units of its format, before and after it is rounded to nearest.

    Without groups these are `x` and its rounding. With a zero point the units are counted from it.
    Arguments and errors are those of `quantize_with_scale`.
    """
    if quantizer.groups == "none":
        return x, quantize(x, quantizer.format, overflow="clamp")
    quantized = quantize_with_scale(x, quantizer, axis=axis, scale=scale)
    grouping = Grouping.of(x, quantizer, axis)
    factor = grouping.spread(quantized.factor)
    scaled = grouping.merge(_divide(grouping.split(widen(x)), factor, quantizer))
    values = quantized.values
    if quantized.zero_point is not None:
        zero_point = grouping.spread(quantized.zero_point).astype(values.dtype)
        values = grouping.merge(grouping.split(values) - zero_point)
    return scaled, values


@functools.partial(jax.jit, static_argnames=("quantizer", "axis", "rounding"), inline=True)
def quantize_with_scale(
    x: jax.Array,
    quantizer: Quantizer,
    *,
    axis: Axis = -1,
    rounding: Rounding = "nearest_even",
    key: jax.Array | None = None,
    scale: jax.Array | None = None,
    factors: Factors | None = None,
) -> Quantized:
    """Finds the factors of `x` and rounds `x / factor` to the element format, saturating.

    A group of zeros gets the smallest factor and stays zero. Groups whose factor rounds to zero
    (e4m3) become zero.

    Args:
      x: float array of any shape; one dimension at least for channels and blocks.
      quantizer: format and groups; its groups must not be `none`.
      axis: what groups run along.
      rounding: how elements are rounded; factors are always rounded to nearest.
      key: random key for stochastic rounding.
      scale: float32 [], a factor for the whole tensor to be used instead of finding one (delayed
        scaling). Infinities in `x` then become NaN, as saturating would hide them.
      factors: of all groups, to be used instead of finding them.

    Raises:
      ValueError: the quantizer has no factors, or delayed scaling got none.
    """
    with rounded_to(str(quantizer)):
        if factors is None and scale is not None:
            _check_scaled(quantizer, scale)
            factors = Factors(scale)
        elif factors is None:
            factors = find_factors(x, quantizer, axis=axis)
        return _quantized(x, quantizer, axis, rounding, key, factors)


def _quantized(
    x: jax.Array,
    quantizer: Quantizer,
    axis: Axis,
    rounding: Rounding,
    key: jax.Array | None,
    factors: Factors,
) -> Quantized:
    grouping = Grouping.of(x, quantizer, axis)
    groups = grouping.split(widen(x))
    zero_point = factors.zero_point
    factor = _factor(factors.scale, factors.tensor_scale)
    scaled = _divide(groups, grouping.spread(factor), quantizer)
    if zero_point is None:
        values = quantize(scaled, quantizer.format, rounding, key)
    else:
        values = _shift(scaled, grouping.spread(zero_point), quantizer.format, rounding, key)
    values = jnp.where(jnp.isfinite(groups), values, jnp.nan)
    return Quantized(grouping.merge(values), *factors)


def find_factors(
    x: jax.Array,
    quantizer: Quantizer,
    *,
    axis: Axis = -1,
    bounds: Bounds | None = None,
    tensor_scale: jax.Array | None = None,
) -> Factors:
    """The factors of `x`: under them, the elements of each group reach its largest numbers.

    Args:
      x: float array, as for `quantize_with_scale`.
      quantizer: format and groups; its groups must not be `none`.
      axis: what groups run along.
      bounds: what they reach instead, for each group, as a calibration chose it; of a quantizer
        without zero point the larger of both magnitudes counts.
      tensor_scale: the factor of the factors, if `x` is part of a tensor that has one.

    Raises:
      ValueError: the quantizer has no factors, or takes them from past tensors.
    """
    _check_scaled(quantizer, None)
    grouping = Grouping.of(x, quantizer, axis)
    groups = grouping.split(widen(x))
    if quantizer.affine:
        return Factors(*_affine_parameters(bounds or grouping.bounds(groups), quantizer))
    if bounds is None:
        amax, largest = grouping.reduce(largest_magnitude, groups), largest_magnitude(x)
    else:
        amax = jnp.maximum(jnp.abs(bounds[0]), jnp.abs(bounds[1]))
        largest = largest_magnitude(amax)
    if quantizer.tensor_scale and tensor_scale is None:
        tensor_scale = _tensor_factor(largest, quantizer)
    return Factors(scale_from_maximum(amax, quantizer, tensor_scale), None, tensor_scale)


def dequantize(
    quantized: Quantized, quantizer: Quantizer, *, axis: Axis = -1, dtype: Any = jnp.float32
) -> jax.Array:
    """`(values - zero_point) * scale * tensor_scale`.

    Exact for e8m0 factors but for the rounding to `dtype`; one rounding more for the others.

    Args:
      quantized: what `quantize_with_scale` returned.
      quantizer: the same quantizer.
      axis: the same axis.
      dtype: dtype of the result.
    """
    with aside("factors"):
        grouping = Grouping.of(quantized.values, quantizer, axis)
        groups = grouping.split(quantized.values)
        if quantized.zero_point is not None:
            groups = groups - grouping.spread(quantized.zero_point).astype(groups.dtype)
        factor = grouping.spread(quantized.factor)
        return grouping.merge(apply_factor(groups, factor, quantizer)).astype(dtype)


def apply_factor(x: jax.Array, factor: jax.Array, quantizer: Quantizer) -> jax.Array:
    """`x * factor`, in the dtype of `x`; exact for e8m0 factors.

    Args:
      x: float32 or float64 array: elements, or sums of them.
      factor: `Quantized.factor`, in a shape that broadcasts against `x`.
      quantizer: what it is a factor of.
    """
    with aside("factors"):
        if quantizer.scale == E8M0:
            return jnp.where(jnp.isnan(factor), jnp.nan, ldexp(x, floor_log2(factor)))
        return x * factor.astype(x.dtype)


def fake_quantize(
    x: jax.Array,
    quantizer: Quantizer,
    *,
    axis: Axis = -1,
    rounding: Rounding = "nearest_even",
    key: jax.Array | None = None,
    scale: jax.Array | None = None,
) -> jax.Array:
    """Quantizes and dequantizes: `x` with the errors of the format, in its own shape and dtype.

    The derivative with respect to `x` is the identity. Arguments and errors are those of
    `quantize_with_scale`; a quantizer without factors is a plain `quantize`.
    """
    if quantizer.groups == "none":
        return quantize(x, quantizer.format, rounding, key, "clamp")
    return _fake_quantize(x, key, scale, quantizer, axis, rounding)


@functools.partial(jax.custom_jvp, nondiff_argnums=(3, 4, 5))
@functools.partial(jax.jit, static_argnums=(3, 4, 5), inline=True)
def _fake_quantize(
    x: jax.Array,
    key: jax.Array | None,
    scale: jax.Array | None,
    quantizer: Quantizer,
    axis: Axis,
    rounding: Rounding,
) -> jax.Array:
    with rounded_to(str(quantizer)):
        quantized = quantize_with_scale(
            x, quantizer, axis=axis, rounding=rounding, key=key, scale=scale
        )
        return dequantize(quantized, quantizer, axis=axis, dtype=x.dtype)


@_fake_quantize.defjvp
def _straight_through(
    quantizer: Quantizer,
    axis: Axis,
    rounding: Rounding,
    primals: tuple[jax.Array, jax.Array | None, jax.Array | None],
    tangents: tuple[jax.Array, Any, Any],
) -> tuple[jax.Array, jax.Array]:
    return _fake_quantize(*primals, quantizer, axis, rounding), tangents[0]


def scale_from_maximum(
    amax: jax.Array, quantizer: Quantizer, tensor_scale: jax.Array | None = None
) -> jax.Array:
    """The factor of a group whose largest magnitude is `amax`.

    Args:
      amax: float array of any shape, one maximum a group.
      quantizer: says how; its `groups` do not matter here.
      tensor_scale: float32 [], the factor of the factors.

    Returns:
      float32 of the shape of `amax`; NaN where `amax` is not finite.
    """
    if quantizer.scale == E8M0:
        exponent = floor_log2(amax) - np.int32(quantizer.format.largest_exponent)
        if quantizer.rceil:
            largest = np.asarray(quantizer.format.largest_finite, amax.dtype)
            exponent += (ldexp(amax, -exponent) > largest).astype(jnp.int32)
        exponent = jnp.clip(exponent, np.int32(-127), np.int32(127))
        scale = ldexp(jnp.ones(amax.shape, jnp.float32), exponent)
    else:
        scale = amax.astype(jnp.float32) * np.float32(1.0 / quantizer.format.largest_finite)
        if tensor_scale is not None:
            scale = scale * (np.float32(1.0) / tensor_scale)
        if quantizer.scale == E4M3:
            scale = quantize(scale, E4M3)
        else:
            scale = jnp.clip(scale, SMALLEST_FACTOR, LARGEST_FACTOR)
    return jnp.where(jnp.isfinite(amax), scale, np.float32(np.nan))


def _check_scaled(quantizer: Quantizer, scale: jax.Array | None) -> None:
    if quantizer.groups == "none":
        raise ValueError(f"{quantizer} has no factors; use quantize, or add @tensor")
    if bool(quantizer.history) != (scale is not None):
        raise ValueError("pass scale=state.scale if the quantizer is a delayed one, and only then")


def _tensor_factor(amax: jax.Array, quantizer: Quantizer) -> jax.Array:
    largest = quantizer.format.largest_finite * quantizer.scale.largest_finite
    factor = amax.astype(jnp.float32) * np.float32(1.0 / largest)
    factor = jnp.clip(factor, _SMALLEST_TENSOR_FACTOR, LARGEST_FACTOR)
    return jnp.where(jnp.isfinite(amax), factor, np.float32(np.nan))


def _affine_parameters(bounds: Bounds, quantizer: Quantizer) -> tuple[jax.Array, jax.Array]:
    """Factor and zero point that map [min(x, 0), max(x, 0)] onto the whole range of the integer."""
    first, last = quantizer.format.smallest_finite, quantizer.format.largest_finite
    low, high = bounds
    scale = jnp.clip(
        (high - low) * np.float32(1.0 / (last - first)), SMALLEST_FACTOR, LARGEST_FACTOR
    )
    # Rounded before it is subtracted: a fused multiply-subtract would round differently.
    steps = quantize(low * (np.float32(1.0) / scale), integer(quantizer.format.bits + 1))
    zero_point = jnp.clip(np.float32(first) - steps, np.float32(first), np.float32(last))
    finite = jnp.isfinite(low) & jnp.isfinite(high)
    return jnp.where(finite, scale, np.float32(np.nan)), zero_point


def _shift(
    scaled: jax.Array, zero_point: jax.Array, format: Format, rounding: Rounding, key: Any
) -> jax.Array:
    """`round(scaled) + zero_point`, clamped to the format."""
    rounded = quantize(scaled, integer(format.bits + 1), rounding, key)
    shifted = rounded + zero_point.astype(scaled.dtype)
    return jnp.clip(shifted, format.smallest_finite, format.largest_finite)


def _factor(scale: jax.Array, tensor_scale: jax.Array | None) -> jax.Array:
    return scale if tensor_scale is None else scale * tensor_scale


def _divide(groups: jax.Array, factor: jax.Array, quantizer: Quantizer) -> jax.Array:
    if quantizer.scale == E8M0:
        return jnp.where(jnp.isnan(factor), jnp.nan, ldexp(groups, -floor_log2(factor)))
    reciprocal = jnp.where(factor == 0, np.float32(0.0), np.float32(1.0) / factor)
    return groups * reciprocal.astype(groups.dtype)
