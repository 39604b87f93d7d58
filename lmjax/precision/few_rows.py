"""A few rows times a matrix on XLA's CPU backend, whose weights are widened in pieces.

As when tokens are decoded for a batch of prompts. Weights of f16, int8 or fp8 would be written to
memory in a wider dtype, and read again, before the product. A piece stays in the cache.

Knows JAX only.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

PIECE = 2**20
"""Most weights in a piece: 2 MiB of bf16."""

SMALLEST = 2**18
"""Fewest weights of a matrix for which a loop over pieces pays."""

MULTIPLE = 16
"""What the outputs of a piece are a multiple of, but for the last piece."""


def in_pieces(multiply: Callable[[jax.Array], jax.Array], w: jax.Array, *, axis: int) -> jax.Array:
    """`multiply(w)`, `[R, N]`, with as many outputs at a time as weights fit in a piece.

    Args:
      multiply: the product of R rows and a matrix, or a piece of one with fewer outputs.
      w: the weights, a matrix of any dtype; it pays with `SMALLEST` or more.
      axis: that of its N outputs.
    """
    outputs, terms = w.shape[axis], w.shape[1 - axis]
    most = max(min(outputs // 2, PIECE // terms), 1)
    even = -(-outputs // -(-outputs // most))
    size = -(-even // MULTIPLE) * MULTIPLE
    pieces, last = divmod(outputs, size)

    def product(index: jax.Array) -> jax.Array:
        return multiply(jax.lax.dynamic_slice_in_dim(w, index * size, size, axis))

    found = jax.lax.map(product, jnp.arange(pieces, dtype=jnp.int32))
    found = jnp.moveaxis(found, 0, 1).reshape(-1, pieces * size)
    if not last:
        return found
    rest = multiply(jax.lax.slice_in_dim(w, pieces * size, outputs, axis=axis))
    return jnp.concatenate([found, rest], axis=1)
