"""Predicts the loss scale from the distribution of cotangents over exponents.

Dynamic loss scaling finds its scale by trial and error: it grows until a step overflows and is
lost. A forecast instead inspects the cotangents before they are rounded. From every step it takes
the logarithm of the largest cotangent and a histogram of exponents, both unscaled, and averages
them with exponentially decaying weights. These determine two functions of the scale 2^k:

    P(overflow)  the largest cotangent of the next step, taken as log-normal with the remembered
                 mean and variance, exceeds the largest finite number
    lost(k)      the significand bits of all cotangents that are lost to underflow: some of those of
                 a number that becomes subnormal, all of one that becomes 0

The forecast is the k that loses least among those whose P(overflow) stays below a bound; of several
that lose equally little the smallest. Modelling the logarithm of the largest gradient as normal is
the idea of OpenSeq2Seq's LogMax scaling (Kuchaiev et al. 2018, arXiv 1805.10387, section 4.2).

Knows JAX, formats and probes.
"""

from __future__ import annotations

import statistics
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lmjax.precision.bits import floor_log2
from lmjax.precision.formats import Format
from lmjax.precision.probes import EXPONENTS, Spread

LEAST_DEVIATION = 1.0
"""Binades: what the standard deviation of the largest exponent is at least taken to be, so that a
few similar steps in a row do not use up all head room."""


class Forecast(NamedTuple):
    """Statistics of past steps; the leading axes of every array are those of the scale.

    Attributes:
      weight: f32[...], sum of the weights of the steps seen; 0 before the first.
      mean: f32[...], weighted mean of log2 of the largest unscaled cotangent.
      variance: f32[...], weighted variance of the same.
      histogram: f32[..., EXPONENTS], weighted counts of the exponents of unscaled cotangents.
    """

    weight: jax.Array
    mean: jax.Array
    variance: jax.Array
    histogram: jax.Array


def initial_forecast(shape: tuple[int, ...]) -> Forecast:
    """Nothing seen yet."""
    zeros = lambda *more: jnp.zeros((*shape, *more), jnp.float32)
    return Forecast(zeros(), zeros(), zeros(), zeros(EXPONENTS))


def remember(
    forecast: Forecast, spread: Spread, scale: jax.Array, number_format: Format, memory: int
) -> Forecast:
    """Updates the forecast with one step.

    A step that overflowed says only that its largest cotangent was beyond the format: it counts as
    one binade beyond, and leaves the histogram alone.

    Args:
      forecast: before the step.
      spread: of the scaled cotangents, with the shape of `scale` in front.
      scale: f32[...], the powers of two in use.
      number_format: what the cotangents are rounded to.
      memory: steps over which weights decay by a factor e.
    """
    if scale.ndim:
        each = lambda f, s, k: remember(f, s, k, number_format, memory)
        return jax.vmap(each)(forecast, spread, scale)
    shift = floor_log2(scale)
    overflowed = ~jnp.isfinite(spread.maximum)
    limit = np.float32(number_format.largest_exponent + 2)
    exponent = jnp.where(overflowed, limit, jnp.log2(spread.maximum))
    exponent = exponent - shift.astype(jnp.float32)
    decay = np.float32(np.exp(-1.0 / memory))
    weight = decay * forecast.weight + 1
    step = exponent - forecast.mean
    mean = forecast.mean + step / weight
    # West (1979): the weighted variance without subtracting large numbers.
    variance = (decay * forecast.weight / weight) * (forecast.variance + step * step / weight)
    bins = jnp.arange(EXPONENTS, dtype=jnp.int32) + shift
    unscaled = jnp.take(spread.histogram, bins, mode="fill", fill_value=0)
    kept = jnp.where(overflowed, np.float32(1), decay)
    histogram = kept * forecast.histogram + jnp.where(overflowed, np.float32(0), unscaled)
    seen = Forecast(weight, mean, variance, histogram)
    # Cotangents that are all zero have no exponent to learn from.
    nothing = spread.maximum == 0
    return jax.tree.map(lambda old, new: jnp.where(nothing, old, new), forecast, seen)


def predict(
    forecast: Forecast,
    number_format: Format,
    overflow_probability: float,
    smallest: float,
    largest: float,
) -> jax.Array:
    """Returns the best scale for the next step, as defined in the module docstring.

    Args:
      forecast: of at least one step.
      number_format: what cotangents are rounded to.
      overflow_probability: bound on P(overflow) of a step.
      smallest, largest: powers of two between which to choose.

    Returns:
      f32[...], powers of two.
    """
    if forecast.weight.ndim:
        each = lambda f: predict(f, number_format, overflow_probability, smallest, largest)
        return jax.vmap(each)(forecast)
    deviations = np.float32(statistics.NormalDist().inv_cdf(1.0 - overflow_probability))
    spread = jnp.maximum(jnp.sqrt(forecast.variance), np.float32(LEAST_DEVIATION))
    highest = np.float32(number_format.largest_exponent + 1)
    admissible = jnp.floor(highest - forecast.mean - deviations * spread).astype(jnp.int32)
    first, last = round(np.log2(smallest)), round(np.log2(largest))
    scales = np.arange(first, last + 1, dtype=np.int32)
    lost = _lost(forecast.histogram, scales, number_format)
    allowed = (scales <= admissible) | (scales == first)
    best = jnp.argmin(jnp.where(allowed, lost, np.float32(np.inf)))
    return jnp.ldexp(jnp.ones((), jnp.float32), jnp.asarray(scales)[best])


def _lost(histogram: jax.Array, scales: np.ndarray, number_format: Format) -> jax.Array:
    """For each scale 2^k the significand bits lost to underflow; f32[scales].

    A number that is n binades below the smallest normal one has lost n bits, and when it has lost
    them all it is 0. Zeros have none to lose.
    """
    exponents = np.arange(EXPONENTS) - 127
    below = number_format.smallest_exponent - (exponents[None, :] + scales[:, None])
    bits = np.clip(below, 0, number_format.mantissa_bits + 1).astype(np.float32)
    bits[:, 0] = 0
    return jnp.einsum("ke,e->k", bits, histogram, precision=jax.lax.Precision.HIGHEST)
