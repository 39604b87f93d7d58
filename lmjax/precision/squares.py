"""Roots of sums of squares that overflow or underflow only where the root itself does.

The square of 2e19 is infinite in f32 and that of 1e-25 is 0, so a norm computed by its formula is
infinite or 0 although every element and the norm itself are ordinary numbers. As in LAPACK's nrm2,
elements are therefore scaled before they are squared. The scale is a power of two, which rounds
nothing, and 1 as long as the largest magnitude lies within a quarter of the exponents of its
format, 2^-31 to 2^32 in f32: ordinary values give the bits of the plain formula.

Knows jax, numpy and bits.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lmjax.precision.bits import join, largest_magnitude, split, unsigned
from lmjax.precision.exact import at_least_f32

Axes = int | tuple[int, ...] | None


class Root(NamedTuple):
    """A root of a sum of squares, held as `scaled / scale`.

    Attributes:
      scaled: the root of the sum of the squares of `scale * x`.
      scale: a power of two; 1 unless squares of `x` would overflow or underflow.
    """

    scaled: jax.Array
    scale: jax.Array

    @property
    def value(self) -> jax.Array:
        """The root; infinite where it is too large for its format."""
        return self.scaled / self.scale


def scale_for_squares(largest: jax.Array) -> jax.Array:
    """A power of two by which to multiply numbers before squaring them.

    Args:
      largest: f32 or f64, the largest magnitude among the numbers, or anything larger.

    Returns:
      Of the same shape and dtype: 1 within a quarter of the exponent range, otherwise what brings
      `largest` to [1, 2), as far as the scale and its reciprocal are normal numbers. No gradient
      flows through it.
    """
    work, sign, magnitude = split(jax.lax.stop_gradient(largest))
    hidden = unsigned(work)(1 << work.mantissa_bits)
    power = join(sign, magnitude & ~(hidden - unsigned(work)(1)), work.dtype)
    quarter = (work.bias + 1) // 4
    number = lambda exponent: np.asarray(2.0**exponent, work.dtype)
    ordinary = (power >= number(-quarter + 1)) & (power < number(quarter))
    one, smallest = number(0), 1 - work.bias
    return jnp.where(ordinary, one, one / jnp.clip(power, number(smallest), number(-smallest)))


def root_sum_square(x: jax.Array, axes: Axes = None) -> jax.Array:
    """The root of the sum of squares over some axes, all by default, in at least f32."""
    x = x.astype(at_least_f32(x.dtype))
    scale = scale_for_squares(largest_magnitude(x, axes))
    spread = scale if axes is None else jnp.expand_dims(scale, axes)
    return jnp.sqrt(jnp.sum(jnp.square(x * spread), axis=axes)) / scale


def tree_root(tree: Any, *, in_order: bool = False) -> Root:
    """The root of the sum of the squares of everything in a tree of float arrays.

    Args:
      tree: at least one array; everything is squared in the widest of their dtypes, f32 at least.
      in_order: sums every array in the order of its elements. Otherwise a sum goes through memory,
        in which arrays lie as suits what made them. Arrays must then be whole: one that is cut
        would be sent to every device.
    """
    leaves = jax.tree.leaves(tree)
    dtype = functools.reduce(np.promote_types, (at_least_f32(leaf.dtype) for leaf in leaves))
    leaves = [leaf.astype(dtype) for leaf in leaves]
    # Of floats and not of bit patterns, which takes XLA's CPU backend fifteen times as long. A NaN
    # it leaves out, and a subnormal it may take for 0: both change nothing here.
    each = (jnp.max(jnp.abs(leaf), initial=0) for leaf in leaves)
    largest = functools.reduce(jnp.maximum, each)
    # Of constant zeros, XLA would multiply the square by the square of the scale, 0 by infinity.
    scale = jnp.where(largest == 0, jnp.ones_like(largest), scale_for_squares(largest))
    flat = (leaf.reshape(-1) if in_order else leaf for leaf in leaves)
    squares = (jnp.sum(jnp.square(leaf * scale)) for leaf in flat)
    return Root(jnp.sqrt(functools.reduce(jnp.add, squares)), scale)
