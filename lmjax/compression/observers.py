"""Observers: which numbers the elements of a group must reach.

    minmax       all of them: the largest element becomes the largest of the format
    percentile   all but a share of the largest, which are clamped; zeros do not count, so that
                 neither pruned weights nor the filling of a last block narrow the range
    mse          those that make the sum of squared errors least, of a grid of shares of the largest

Knows quantizers and their arithmetic.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final, Literal

import jax
import jax.numpy as jnp
import numpy as np

from lmjax.precision.bits import widen
from lmjax.precision.grouping import Bounds, Grouping
from lmjax.precision.quantizer import Quantizer
from lmjax.precision.scaling import Factors, dequantize, find_factors, quantize_with_scale

Observer = Literal["minmax", "percentile", "mse"]

PERCENTILE: Final = 99.9
SHARES: Final = np.linspace(1.0, 0.3, 29, dtype=np.float32)
"""What `mse` tries, the largest first, so that it wins a tie."""


def observed_factors(
    x: jax.Array, quantizer: Quantizer, observer: Observer, *, axis: int, **given: Any
) -> Factors:
    """The factors of a tensor, as `find_factors` finds them, but of what an observer chose.

    Args:
      x: float array.
      quantizer: format and groups.
      observer: which.
      axis: what groups run along.
      given: other arguments of `find_factors`.
    """
    if observer == "minmax":
        return find_factors(x, quantizer, axis=axis, **given)
    grouping = Grouping.of(x, quantizer, axis)
    groups = grouping.split(widen(x))
    low, high = grouping.bounds(groups)
    found = lambda bounds: find_factors(x, quantizer, axis=axis, bounds=bounds, **given)
    if observer == "percentile":
        return found(_percentiles(groups, grouping, quantizer))
    return found(_least_error(x, (low, high), found, grouping, quantizer, axis))


def _percentiles(groups: jax.Array, grouping: Grouping, quantizer: Quantizer) -> Bounds:
    """Of magnitudes, or with a zero point of both ends; never less than nothing."""

    def at(x: jax.Array, share: float) -> jax.Array:
        found = grouping.reduce(lambda g, axes: jnp.nanpercentile(g, share, axis=axes), x)
        return jnp.where(jnp.isnan(found), jnp.zeros_like(found), found)

    groups = jnp.where(groups == 0, jnp.full_like(groups, jnp.nan), groups)
    if quantizer.affine:
        low, high = at(groups, 100 - PERCENTILE), at(groups, PERCENTILE)
        return jnp.minimum(low, 0.0), jnp.maximum(high, 0.0)
    high = at(jnp.abs(groups), PERCENTILE)
    return -high, high


def _least_error(
    x: jax.Array,
    bounds: Bounds,
    found: Callable[[Bounds], Factors],
    grouping: Grouping,
    quantizer: Quantizer,
    axis: int,
) -> Bounds:
    """The share of the bounds under which each group has the least squared error."""
    wide = widen(x)

    def error(share: jax.Array) -> jax.Array:
        factors = found((bounds[0] * share, bounds[1] * share))
        quantized = quantize_with_scale(x, quantizer, axis=axis, factors=factors)
        miss = wide - dequantize(quantized, quantizer, axis=axis)
        return grouping.reduce(lambda g, axes: jnp.sum(g, axis=axes), grouping.split(miss * miss))

    best = jnp.argmin(jax.lax.map(error, jnp.asarray(SHARES)), axis=0)
    share = jnp.asarray(SHARES)[best]
    return bounds[0] * share, bounds[1] * share
