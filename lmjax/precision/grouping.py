"""Which elements of a tensor share a factor: cutting it into groups and putting it together again.

Knows jax and `quantizer`.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from lmjax.precision.quantizer import Quantizer

Axis = int | tuple[int, ...]
"""What groups run along: an axis, or all those that a product sums over. The terms of one sum are
then one channel, and blocks run along the last of the axes."""

Bounds = tuple[jax.Array, jax.Array]
"""The smallest and the largest number that the elements of each group must reach, in the shape of
its factors. What lies beyond is clamped."""


@dataclass(frozen=True)
class Grouping:
    """The grouping of a tensor of a given shape.

    Attributes:
      shape: of the tensor.
      reduced: axes of the elements of a group after `split`; None for all of them.
      axis: the axis that is cut into blocks; None where there are none.
      size: elements of a block.
    """

    shape: tuple[int, ...]
    reduced: tuple[int, ...] | None
    axis: int | None = None
    size: int = 0

    @classmethod
    def of(cls, x: jax.Array, quantizer: Quantizer, axis: Axis) -> Grouping:
        """How a quantizer groups the elements of `x`."""
        if quantizer.groups == "tensor":
            return cls(x.shape, None)
        axes = tuple(range(x.ndim)[a] for a in (axis if isinstance(axis, tuple) else (axis,)))
        if quantizer.groups == "channel":
            return cls(x.shape, axes)
        # The gradient of a scalar product sums over nothing: any axis will do.
        last = (axes or (x.ndim - 1,))[-1]
        return cls(x.shape, (last + 1,), last, min(quantizer.block, x.shape[last]))

    def split(self, x: jax.Array) -> jax.Array:
        """[..., length, ...] -> [..., groups, size, ...], the last group filled up with zeros."""
        if self.axis is None:
            return x
        missing = -self.shape[self.axis] % self.size
        if missing:
            padding = [(0, missing if axis == self.axis else 0) for axis in range(x.ndim)]
            x = jnp.pad(x, padding)
        return x.reshape(*x.shape[: self.axis], -1, self.size, *x.shape[self.axis + 1 :])

    def merge(self, groups: jax.Array) -> jax.Array:
        """Undoes `split`."""
        if self.axis is None:
            return groups
        before, after = self.shape[: self.axis], self.shape[self.axis + 1 :]
        padded = groups.reshape(*before, -1, *after)
        return jax.lax.slice_in_dim(padded, 0, self.shape[self.axis], axis=self.axis)

    def reduce(self, function: Any, groups: jax.Array) -> jax.Array:
        """`function(groups, axes)` of the elements of each group: one number a group."""
        result = function(groups, self.reduced)
        if self.reduced is None or self.axis is not None:
            return result
        return jnp.expand_dims(result, self.reduced)

    def spread(self, factor: jax.Array) -> jax.Array:
        """Factors, one a group, in a shape that broadcasts against `split`."""
        return factor if self.axis is None else jnp.expand_dims(factor, self.axis + 1)

    def bounds(self, groups: jax.Array) -> Bounds:
        """The smallest and the largest number of each group and zero, as f32."""
        low, high = (
            self.reduce(functools.partial(extreme, initial=0.0), groups).astype(jnp.float32)
            for extreme in (jnp.min, jnp.max)
        )
        return low, high
