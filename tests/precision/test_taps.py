"""Comparing a tensor with a reference: right for shapes and magnitudes of every kind."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from lmjax.precision import exact
from lmjax.precision.probes import Rounded
from lmjax.precision.taps import Compare, Deviation, Swap


def compared(x: Any, r: Any, largest: float = 1, kind: type[Compare] = Compare) -> Deviation:
    """The deviation of x from r, as a compiled program finds it."""

    def found(x: Any, r: Any, largest: Any) -> Deviation:
        given: Any = Rounded(x, x, x, None)  # type: ignore[arg-type]
        deviation: Deviation = kind.to(r, largest).of(given).deviation
        return deviation

    numbers = exact.jit(found)(x, r, jnp.asarray(largest, r.dtype))
    return Deviation._make(map(float, numbers))  # type: ignore[arg-type]


@pytest.mark.parametrize("shape", [(7,), (16, 3, 5)])
def test_sums_and_maxima_are_those_of_all_elements(shape: tuple[int, ...]):
    r = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    x = jnp.asarray(r * 1.01).astype(jnp.bfloat16)
    a, b = np.asarray(x, np.float64), r.astype(np.float64)
    found = compared(x, r)
    sums = [np.sum(np.square(one)) for one in (a - b, a, b)]
    assert found[:3] == pytest.approx(sums, rel=1e-5)
    maxima = np.abs(b).max(), np.abs(a - b).max()
    assert (found.largest, found.furthest) == pytest.approx(maxima, rel=1e-6)
    assert found.non_finite == 0
    assert compared(x, r, kind=Swap).error == pytest.approx(sums[0], rel=1e-5)


def test_elements_are_counted_that_are_not_finite_where_the_reference_is():
    r = np.array([1, np.inf, 2, 3, np.nan, 4, 5, 6], np.float32).reshape(4, 2)
    x = np.array([1, np.inf, np.nan, np.inf, 1, -np.inf, 5, 6], np.float32).reshape(4, 2)
    assert compared(x, r).non_finite == 3


@pytest.mark.parametrize("size", [1e-30, 1e30])
def test_squares_that_would_not_fit_are_scaled(size: float):
    r = np.full((16, 4), size, np.float32)
    x = r * np.float32(1.5)
    assert compared(x, r).error in (0, np.inf)
    found = compared(x, r, largest=compared(x, r).largest)
    assert found.error / found.expected == pytest.approx(0.25)
