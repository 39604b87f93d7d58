"""Slots that take whole tensors out of a step, and put others in their place.

They are slots as in `probes.py`, and so leave the program as gradients do. A tap looks at a tensor
as its site hands it on, after rounding:

    Outline   which tensors there are, their shapes, and the order in which they are computed
    Copy      the tensor
    Compare   how far it is from the tensor that the slot holds
    Swap      the same; and handed on in its place is the one that the slot holds
    Extreme   its first element that is not finite, or else its largest

`Copy`, `Compare` and `Swap` keep the compiler from computing across a tap, so that two passes of
one program with the same formats have the same bits.

Knows jax, `bits` and `squares`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lmjax.precision.bits import join, split
from lmjax.precision.exact import at_least_f32
from lmjax.precision.squares import scale_for_squares


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
        return Copy(tensor.values.astype(self.values.dtype))


class Deviation(NamedTuple):
    """How far a tensor x is from a reference r; sums are taken after scaling by a power of two.

    Attributes:
      error: sum of squares of x - r.
      actual: of x.
      expected: of r.
      product: sum of x * r.
      non_finite: number of elements that are not finite, but are in r.
      largest: largest magnitude of r.
      furthest: largest magnitude of x - r.
    """

    error: jax.Array
    actual: jax.Array
    expected: jax.Array
    product: jax.Array
    non_finite: jax.Array
    largest: jax.Array
    furthest: jax.Array


class Compare(NamedTuple):
    """How far the tensor is from a reference.

    Attributes:
      values: the reference, in at least f32; None in the slot that comes out.
      deviation: zeros in the slot that goes in.
    """

    values: Any
    deviation: Deviation

    @classmethod
    def to(cls, values: jax.Array, stacked: bool) -> Any:
        """The slot that goes in, or a stack of them."""
        zeros = jnp.zeros(values.shape[:stacked], values.dtype)
        return cls(values, Deviation._make([zeros] * len(Deviation._fields)))

    def of(self, tensor: Any) -> Any:
        """Two passes over both tensors."""
        x = tensor.values.astype(self.values.dtype)
        x, r = jax.lax.stop_gradient((x, self.values))
        # Of floats: the CPU backend takes seven times as long for bit patterns. A NaN that it may
        # leave out is in the sums, and a subnormal that it takes for 0 has the scale of 0.
        largest = jnp.max(jnp.abs(r), initial=0)
        scale = scale_for_squares(largest)
        # In a branch, which is always taken: no compiler computes what is handed on a second time
        # to fuse it into a branch, where it could be rounded otherwise. A barrier does not keep
        # XLA's CPU backend from that.
        nothing = lambda *_: self.deviation
        found = jax.lax.cond(scale > 0, self._deviation, nothing, x, r, scale, largest)
        return type(self)(None, found)

    def _deviation(
        self, x: jax.Array, r: jax.Array, scale: jax.Array, largest: jax.Array
    ) -> Deviation:
        a, b, lost = x * scale, r * scale, ~jnp.isfinite(x) & jnp.isfinite(r)
        # A comparison of bit patterns is one instruction; a maximum of floats is a chain of them
        # that took half of the time.
        work, _, distance = split(x - r)
        error = jnp.square((x - r) * scale)
        terms = error, jnp.square(a), jnp.square(b), a * b, lost.astype(r.dtype), distance
        *sums, furthest = _reduced(*terms)
        furthest = join(jnp.zeros_like(furthest), furthest, work.dtype)
        return Deviation._make((*sums, largest, furthest))


class Swap(Compare):
    """The error alone; `values` of the slot is handed on in place of the tensor."""

    def _deviation(
        self, x: jax.Array, r: jax.Array, scale: jax.Array, largest: jax.Array
    ) -> Deviation:
        (error,) = _reduced(jnp.square((x - r) * scale))
        return self.deviation._replace(error=error)


def _reduced(*terms: jax.Array) -> tuple[jax.Array, ...]:
    """Sums of floats and maxima of integers in one pass; rows first: no sum in f32 is long."""

    def joined(x: Sequence[jax.Array], y: Sequence[jax.Array]) -> tuple[jax.Array, ...]:
        largest = [jnp.issubdtype(one.dtype, jnp.integer) for one in x]
        each = zip(x, y, largest, strict=True)
        return tuple(jnp.maximum(a, b) if integer else a + b for a, b, integer in each)

    zeros, axes = tuple(jnp.zeros((), one.dtype) for one in terms), range(terms[0].ndim)
    for some in (axes[-1:], axes[:-1]):
        terms = tuple(jax.lax.reduce(terms, zeros, joined, some))
    return terms


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


TAPS: Final = (Outline, Copy, Compare, Extreme)


def taps_in(slots: Mapping[str, Any]) -> dict[str, Any]:
    """Those of the slots that take a tensor as it is handed on."""
    return {who: slot for who, slot in slots.items() if isinstance(slot, TAPS)}


def handed_on(x: jax.Array, slots: Mapping[str, Any]) -> jax.Array:
    """What is handed on at a place with these slots: `x`, or what a `Swap` holds, in its dtype."""
    for slot in slots.values():
        if isinstance(slot, Swap):
            return jax.lax.optimization_barrier(slot.values.astype(x.dtype))
        if isinstance(slot, Copy | Compare):
            return jax.lax.optimization_barrier(x)
    return x
