"""The gradient of what is added to every row: summed in f32, rounded once."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmjax.precision import exact
from lmjax.precision.broadcast import add_to_rows


def pulled_back(g: jax.Array, row_shape: tuple[int, ...]) -> tuple[jax.Array, jax.Array]:
    def run(g: jax.Array) -> tuple[jax.Array, jax.Array]:
        return jax.vjp(add_to_rows, jnp.zeros_like(g), jnp.ones(row_shape, g.dtype))[1](g)

    return exact.jit(run)(g)


def test_4096_ones_sum_to_4096_in_bf16():
    # Autodiff of `x + bias` gives 1024 here, and in a bf16 accumulator 256 + 1 is 256 again.
    _, row = pulled_back(jnp.ones((64, 64, 4), jnp.bfloat16), (4,))
    assert row.dtype == jnp.bfloat16
    assert row.tolist() == [4096.0] * 4


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("row_shape", [(5,), (7, 5)])
def test_the_gradient_is_rounded_once(dtype, row_shape: tuple[int, ...]):
    g = jnp.asarray(np.random.default_rng(0).normal(size=(64, 7, 5)).astype(np.float32), dtype)
    x, row = pulled_back(g, row_shape)
    assert (x == g).all()
    leading = tuple(range(3 - len(row_shape)))
    expected = np.asarray(g).astype(np.float64).sum(leading)
    once = expected.astype(np.float32).astype(dtype).astype(np.float64)
    actual = np.asarray(row).astype(np.float64)
    np.testing.assert_allclose(actual, once, rtol=float(jnp.finfo(dtype).eps), atol=1e-4)
    if dtype != jnp.float32:
        assert (actual == once).all()


def test_it_adds():
    x, row = jnp.ones((2, 3), jnp.float16), jnp.arange(3, dtype=jnp.float16)
    assert add_to_rows(x, row).tolist() == [[1.0, 2.0, 3.0]] * 2
