"""Slots that take whole tensors out of a step, and put others in their place.

They are slots as in `probes.py`, and so leave the program as gradients do. A tap looks at a tensor
as its site hands it on, after rounding:

    Outline   which tensors there are, their shapes, and the order in which they are computed
    Copy      the tensor
    Swap      the tensor; handed on in its place is the one that the slot holds
    Extreme   its first element that is not finite, or else its largest

`Copy` and `Swap` keep the compiler from computing across a tap, so that two passes of one program
with the same formats have the same bits.

Knows jax.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lmjax.precision.exact import at_least_f32


@jax.tree_util.register_static
@dataclass(frozen=True, eq=False)
class Outline:
    """Notes, while a step is traced, that there is a tensor.

    Attributes:
      found: by path, in the order of computation: shape, and dtype of at least f32. Inside a stack,
        those of one member.
      path: of the tensor.
    """

    found: dict[str, jax.ShapeDtypeStruct]
    path: str

    def of(self, tensor: Any) -> Outline:
        """Notes the tensor; there is nothing to measure."""
        values = tensor.values
        outline = jax.ShapeDtypeStruct(values.shape, at_least_f32(values.dtype))
        self.found.setdefault(self.path, outline)
        return self


class Copy(NamedTuple):
    """The tensor, in the dtype of the slot."""

    values: jax.Array

    def of(self, tensor: Any) -> Copy:
        """The tensor as it is handed on."""
        return type(self)(tensor.values.astype(self.values.dtype))


class Swap(Copy):
    """The tensor; `values` of the slot is handed on in its place."""


class Extreme(NamedTuple):
    """The first element of a tensor that is not finite, or else the first of the largest.

    Attributes:
      non_finite: f32[], number of elements that are not finite.
      position: f32[2], `position @ (2^20, 1)` is that of the element in row-major order.
      value: f32[], the element.
      square: f32[], mean square of the finite elements.
    """

    non_finite: jax.Array
    position: jax.Array
    value: jax.Array
    square: jax.Array

    @classmethod
    def empty(cls) -> Extreme:
        """Nothing seen."""
        zero = jnp.zeros((), jnp.float32)
        return cls(zero, jnp.zeros((2,), jnp.float32), zero, zero)

    def of(self, tensor: Any) -> Extreme:
        """Two passes over the tensor as it is handed on."""
        flat = tensor.values.astype(jnp.float32).reshape(-1)
        finite = jnp.isfinite(flat)
        magnitude = jnp.where(finite, jnp.abs(flat), jnp.inf)
        index = jnp.argmax(magnitude).astype(jnp.int32)
        halves = jnp.stack([index >> np.int32(20), index & np.int32(2**20 - 1)])
        squares = jnp.where(finite, jnp.square(flat), jnp.zeros_like(flat))
        return Extreme(
            jnp.sum((~finite).astype(jnp.float32)),
            halves.astype(jnp.float32),
            flat[index],
            jnp.mean(squares),
        )


def taps_in(slots: Mapping[str, Any]) -> dict[str, Any]:
    """Those of the slots that take a tensor as it is handed on."""
    return {who: slot for who, slot in slots.items() if isinstance(slot, Copy | Outline | Extreme)}


def handed_on(x: jax.Array, slots: Mapping[str, Any]) -> jax.Array:
    """What is handed on at a place with these slots: `x`, or what a `Swap` holds, in its dtype."""
    for slot in slots.values():
        if isinstance(slot, Swap):
            return jax.lax.optimization_barrier(slot.values.astype(x.dtype))
        if isinstance(slot, Copy):
            return jax.lax.optimization_barrier(x)
    return x
