"""The forecast of the loss scale keeps what it promises about overflow and underflow."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmjax.optim.forecast import Forecast, initial_forecast, predict, remember
from lmjax.precision import exact, parse_format
from lmjax.precision.probes import EXPONENTS, Spread

F16 = parse_format("f16")
TAIL = dict.fromkeys(range(-45, -2), 1.0)


def spread(exponents: dict[int, float], maximum: float | None = None) -> Spread:
    histogram = np.zeros(EXPONENTS, np.float32)
    for exponent, count in exponents.items():
        histogram[exponent + 127] = count
    largest = 1.5 * 2.0 ** max(exponents) if maximum is None else maximum
    return Spread(jnp.asarray(largest, jnp.float32), jnp.asarray(histogram))


def after(*spreads: Spread, scale: float = 1.0, memory: int = 20) -> Forecast:
    forecast = initial_forecast(())
    for one in spreads:
        forecast = remember(forecast, one, jnp.float32(scale), F16, memory)
    return forecast


def chosen(forecast: Forecast, probability: float = 1e-4, most: float = 2.0**60) -> float:
    return float(np.log2(predict(forecast, F16, probability, 2.0**-30, most)))


def test_mean_and_variance_are_exponentially_weighted():
    exponents = np.random.default_rng(0).uniform(-12, 3, 30)
    maxima = [spread({-20: 1.0}, 2.0**e) for e in exponents]
    forecast = after(*maxima, memory=7)
    weights = np.exp(-np.arange(29, -1, -1) / 7)
    mean = np.average(exponents, weights=weights)
    variance = np.average((exponents - mean) ** 2, weights=weights)
    np.testing.assert_allclose(forecast.mean, mean, rtol=1e-5)
    np.testing.assert_allclose(forecast.variance, variance, rtol=1e-4)
    np.testing.assert_allclose(forecast.histogram[107], weights.sum(), rtol=1e-5)


def test_what_is_remembered_does_not_depend_on_the_scale_in_use():
    plain = after(spread({-30: 5.0, -3: 2.0}))
    scaled = after(spread({-15: 5.0, 12: 2.0}), scale=2.0**15)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), plain, scaled)


def test_overflow_stays_as_rare_as_asked():
    generator = np.random.default_rng(1)
    bound, deviation, overflows, steps = 0.02, 3.0, 0, 4000
    exponents = generator.normal(-20, deviation, steps + 200)
    learn = exact.jit(lambda f, e: remember(f, _largest(e), jnp.float32(1), F16, 500))
    forecast = initial_forecast(())
    scales = exact.jit(lambda f: predict(f, F16, bound, 2.0**-30, 2.0**60))
    for index, exponent in enumerate(exponents):
        if index >= 200:
            overflows += 2.0**exponent * float(scales(forecast)) > F16.largest_finite
        forecast = learn(forecast, jnp.float32(exponent))
    # The scale is rounded down to a power of two, so the rate is below the bound, but not absurdly.
    assert bound / 8 < overflows / steps <= bound * 1.2


def _largest(exponent: jax.Array) -> Spread:
    everywhere = jnp.ones((EXPONENTS,), jnp.float32)  # a larger scale always saves something
    return Spread(jnp.exp2(exponent), everywhere)


def test_of_scales_that_lose_equally_little_the_smallest_is_chosen():
    # Everything from 2^-10 to 2^-3 is normal in f16 from 2^-4 on: 2^-10 * 2^-4 = 2^-14.
    assert chosen(after(spread({-10: 7.0, -3: 1.0}))) == -4


def test_a_long_tail_pulls_the_scale_up_to_the_bound():
    forecast = after(spread(TAIL))
    # The largest is 1.5 * 2^-3; the normal quantile of 1e-4 is 3.72 deviations of one binade.
    assert chosen(forecast) == np.floor(16 - np.log2(1.5 * 2.0**-3) - 3.72)
    assert chosen(forecast, most=2.0**8) == 8


def test_an_overflow_lowers_the_scale_and_teaches_nothing_else():
    before = after(*[spread(TAIL)] * 5)
    beyond = spread(TAIL, np.inf)
    lower = remember(before, beyond, jnp.float32(2.0**14), F16, 20)
    np.testing.assert_array_equal(lower.histogram, before.histogram)
    assert chosen(lower) < chosen(before)


def test_zero_cotangents_leave_no_trace():
    before = after(spread({-9: 1.0}))
    same = remember(before, spread({-9: 0.0}, 0.0), jnp.float32(1), F16, 20)
    jax.tree.map(np.testing.assert_array_equal, before, same)


@pytest.mark.parametrize("scale", [2.0, [2.0, 4.0, 8.0]])
def test_a_forecast_for_each_scale(scale):
    scale = jnp.asarray(scale, jnp.float32)
    one = spread({-20: 3.0, -2: 1.0})
    many = jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (*scale.shape, *leaf.shape)), one)
    forecast = remember(initial_forecast(scale.shape), many, scale, F16, 20)
    best = predict(forecast, F16, 1e-4, 2.0**-30, 2.0**60)
    singly = [
        predict(
            remember(initial_forecast(()), one, s, F16, 20), F16, 1e-4, 2.0**-30, 2.0**60
        )
        for s in scale.reshape(-1)
    ]  # fmt: skip
    np.testing.assert_array_equal(best.reshape(-1), singly)
