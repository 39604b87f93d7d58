"""Random Hadamard transforms, which spread outliers over a block before a product is rounded.

Both operands of a product are multiplied, along the summed axis and in blocks of N, by the same
orthogonal matrix, which cancels in the sum:

    (x Q) (Q^T w) = x w        Q = diag(signs) H / sqrt(N)

H is the Hadamard matrix in Sylvester's order, N a power of two, and the signs are random. An
outlier becomes N numbers of 1/sqrt(N) its size, and no longer inflates the scale factor of its
group. The signs are applied first, so that H does not concentrate a fixed pattern of a tensor, such
as a constant, in a single number.

The gain depends on the grid: on the uniform grid of integers, the squared error of a group with a
large outlier falls to 1/N; a 4-bit float is precise near its own outliers and gains less.

Sources: Tseng et al. 2025, arXiv 2502.20586, for both backward products; NVIDIA 2025, arXiv
2509.25149, for weight gradients only, with N = 16. Here, new signs are drawn for every step and
product, and all blocks of one product share them.

Knows JAX, numpy and `exact`.
"""

from __future__ import annotations

import functools
from typing import Any, Final

import jax
import jax.numpy as jnp
import numpy as np

from lmjax.precision.asides import aside
from lmjax.precision.exact import at_least_f32

DEFAULT_BLOCK: Final = 16
LARGEST_BLOCK: Final = 1024
"""The matrix is multiplied explicitly, so longer blocks would cost more than they gain."""


def check_block(size: int) -> None:
    """Checks the size of a block.

    Raises:
      ValueError: `size` is not a power of two from 2 to `LARGEST_BLOCK`.
    """
    if not 2 <= size <= LARGEST_BLOCK or size & (size - 1):
        raise ValueError(
            f"a rotation of blocks of {size}; it must be a power of two from 2 to {LARGEST_BLOCK}"
        )


def random_signs(size: int, key: jax.Array | None) -> jax.Array:
    """Returns f32[size] of 1 and -1; without a key, as in evaluation, always the same signs."""
    key = jax.random.key(0, impl="threefry2x32") if key is None else key
    return jax.random.rademacher(key, (size,), jnp.float32)


def rotate(x: jax.Array, axis: int, signs: jax.Array) -> jax.Array:
    """Computes `x Q` along an axis, block by block.

    Sums are in f32 (f64 for f64) without further rounding: the products with +1 and -1 are exact,
    and 1/sqrt(N) is applied to their sum.

    Args:
      x: floating-point array.
      axis: the axis to divide into blocks. It is padded with zeros to a whole number of blocks,
        which does not change the product of two operands padded alike.
      signs: f32[N].

    Returns:
      f32 (f64 for f64), of the shape of `x` but for the length of the axis.
    """
    with aside("rotation"):
        return _rotated(x, range(x.ndim)[axis], signs)


def _rotated(x: jax.Array, axis: int, signs: jax.Array) -> jax.Array:
    size = signs.size
    x = x.astype(at_least_f32(x.dtype))
    missing = -x.shape[axis] % size
    padded = jnp.pad(x, [(0, missing if i == axis else 0) for i in range(x.ndim)])
    before, after = x.shape[:axis], x.shape[axis + 1 :]
    blocks = padded.reshape(*before, -1, size, *after)
    matrix = signs[:, None].astype(x.dtype) * jnp.asarray(_hadamard(size), x.dtype)
    highest = jax.lax.Precision.HIGHEST
    sums = jnp.tensordot(blocks, matrix, axes=((axis + 1,), (0,)), precision=highest)
    rotated = jnp.moveaxis(sums, -1, axis + 1) * jnp.asarray(size**-0.5, x.dtype)
    return rotated.reshape(padded.shape)


@functools.cache
def _hadamard(size: int) -> np.ndarray[Any, np.dtype[np.float32]]:
    """f32[size, size]: 1 where the indices share an even number of set bits, else -1."""
    index = np.arange(size)
    return np.where(np.bitwise_count(index[:, None] & index) % 2, -1.0, 1.0).astype(np.float32)
