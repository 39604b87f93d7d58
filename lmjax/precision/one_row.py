"""One row times a matrix on XLA's CPU backend, in loops that read each weight as it is stored.

As when a token is decoded. A matrix product would first write out weights of f16, int8 or fp8 in a
wider dtype; a reduction reads them one by one. Here sums of a few products at a time are loops over
neighbouring elements, which LLVM turns into vectors:

    [K, N], summed over K    t[i, n] = sum_b x[32 i + b] w[32 i + b, n], then summed over i
    [N, K]                   t[n, l] = sum_j x[16 j + l] w[n, 16 j + l], then summed over l

Knows JAX only.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from operator import add
from typing import Any

import jax
import jax.numpy as jnp

TERMS = 32
"""Most products in one loop. XLA splits one of 64, and computes its parts again and again."""

FEWEST = 8
"""Fewest terms and neighbours for which such loops pay."""

SUMMANDS = 128
"""Most arrays that are added in one loop."""

LANES = 16, 64
"""How many neighbours are summed apart: a vector of 512 bits in f32, or four for long rows."""


def row_times(row: jax.Array, w: jax.Array, *, turned: bool, accumulate: Any) -> jax.Array:
    """The product `[N]` of a row `[K]` and a matrix.

    Args:
      row: of any dtype.
      w: `[K, N]` of any dtype, or `[N, K]` if `turned`.
      turned: which.
      accumulate: dtype of products, sums and result.
    """
    # Written out, as it would otherwise be computed again for each output.
    row = jax.lax.optimization_barrier(row.astype(accumulate))
    few, many = LANES
    lanes = _largest_divisor(row.size, few if row.size <= few * 2 * TERMS else many)
    terms = _largest_divisor(row.size, TERMS)
    if (lanes if turned else terms) < FEWEST:
        axis = 1 if turned else 0
        return jnp.sum(jnp.expand_dims(row, 1 - axis) * w.astype(accumulate), axis)
    if turned:
        return _along_rows(row, w, lanes, accumulate)
    return _along_columns(row, w, terms, accumulate)


def _along_columns(row: jax.Array, w: jax.Array, terms: int, accumulate: Any) -> jax.Array:
    x, cut = row.reshape(-1, terms, 1), w.reshape(-1, terms, w.shape[1])
    products = (x[:, b] * cut[:, b].astype(accumulate) for b in range(terms))
    return _summed(_written(_total(products)))


def _along_rows(row: jax.Array, w: jax.Array, lanes: int, accumulate: Any) -> jax.Array:
    x, cut = row.reshape(-1, lanes), w.reshape(len(w), -1, lanes)
    products = [x[None, j] * cut[:, j].astype(accumulate) for j in range(len(x))]
    parts = [_written(_total(products[i : i + TERMS])) for i in range(0, len(products), TERMS)]
    sums = _written(_total(parts))
    return _total(sums[:, lane] for lane in range(lanes))


def _summed(x: jax.Array) -> jax.Array:
    """The sum over the first axis, over `SUMMANDS` at a time."""
    while len(x) > 1:
        some = _largest_divisor(len(x), SUMMANDS)
        if some == 1:
            return jnp.sum(x, axis=0)
        cut = x.reshape(-1, some, *x.shape[1:])
        x = _written(_total(cut[:, b] for b in range(some)))
    return x[0]


def _total(terms: Iterable[jax.Array]) -> jax.Array:
    return functools.reduce(add, terms)


def _written(x: jax.Array) -> jax.Array:
    """The array in memory, so that what follows is a loop of its own."""
    return jax.lax.optimization_barrier(x)


def _largest_divisor(number: int, most: int) -> int:
    return next(d for d in range(min(most, number), 0, -1) if number % d == 0)
