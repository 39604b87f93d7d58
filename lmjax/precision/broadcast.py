"""Rows combined with a parameter that all of them share, whose gradient is a sum over them.

The gradient of a bias is a sum over all tokens of a batch. Autodiff would sum the cotangents of a
bf16 addition in bf16, where XLA's CPU backend sums 4096 ones to 1024.

Knows only JAX.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from lmjax.precision.exact import at_least_f32


@jax.custom_vjp
def add_to_rows(x: jax.Array, row: jax.Array) -> jax.Array:
    """`x + row`, where the axes of `row` are the last ones of `x`.

    Args:
      x: `[..., *row.shape]`.
      row: a bias `[N]`, or a table of positions `[T, D]`; in the dtype of `x`.

    Returns:
      The sum, in the dtype of `x`. The gradient of `row` is summed over the leading axes in f32
      (f64 for f64) and rounded once.
    """
    return x + row


def _forward(x: jax.Array, row: jax.Array) -> tuple[jax.Array, jax.Array]:
    return x + row, row


def _backward(row: jax.Array, g: jax.Array) -> tuple[jax.Array, jax.Array]:
    leading = tuple(range(g.ndim - row.ndim))
    return g, jnp.sum(g, leading, dtype=at_least_f32(g.dtype)).astype(row.dtype)


add_to_rows.defvjp(_forward, _backward)
