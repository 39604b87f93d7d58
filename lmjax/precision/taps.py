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

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

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
      non_finite: number of elements that are not finite, but are in r.
      largest: largest magnitude of r.
      furthest: largest magnitude of x - r.
    """

    error: jax.Array
    actual: jax.Array
    expected: jax.Array
    non_finite: jax.Array
    largest: jax.Array
    furthest: jax.Array


class Compare(NamedTuple):
    """How far the tensor is from a reference.

    Attributes:
      values: the reference, in at least f32; None in the slot that comes out.
      deviation: in the slot that goes in, `largest` says by what to scale, see `squares.py`.
    """

    values: Any
    deviation: Deviation

    @classmethod
    def to(cls, values: jax.Array, largest: jax.Array) -> Any:
        """The slot that goes in, or a stack of them.

        Args:
          values: the reference.
          largest: about its largest magnitude, or that of each member.
        """
        zeros = jnp.zeros(largest.shape, values.dtype)
        numbers = dict.fromkeys(Deviation._fields, zeros) | {"largest": largest}
        return cls(values, Deviation(**numbers))

    def of(self, tensor: Any) -> Any:
        """One pass over both tensors."""
        x, r = jax.lax.stop_gradient((tensor.values, self.values))
        scale = scale_for_squares(self.deviation.largest)
        # In a branch, which is always taken: no compiler computes what is handed on a second time
        # to fuse it into a branch, where it could be rounded otherwise. A barrier does not keep
        # XLA's CPU backend from that.
        nothing = lambda *_: self.deviation
        found = jax.lax.cond(scale > 0, self._deviation, nothing, *map(_rows, (x, r)), scale)
        return type(self)(None, found)

    def _deviation(self, x: jax.Array, r: jax.Array, scale: jax.Array) -> Deviation:
        x = x.astype(r.dtype)
        error, lost = x - r, ~jnp.isfinite(x) & jnp.isfinite(r)
        sums = (*(jnp.square(one * scale) for one in (error, x, r)), lost.astype(r.dtype))
        return Deviation._make(_reduced(sums, (jnp.abs(r), jnp.abs(error))))


class Swap(Compare):
    """The error alone; `values` of the slot is handed on in place of the tensor."""

    def _deviation(self, x: jax.Array, r: jax.Array, scale: jax.Array) -> Deviation:
        (error,) = _reduced((jnp.square((x.astype(r.dtype) - r) * scale),), ())
        return self.deviation._replace(error=error)


def _rows(x: jax.Array) -> jax.Array:
    """As `[groups, rows, columns]`, with 8 rows where that divides their number."""
    columns = x.shape[-1] if x.ndim else 1
    return x.reshape(-1, math.gcd(x.size // columns, 8), columns)


def _reduced(sums: tuple[jax.Array, ...], maxima: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
    """Sums and maxima of tensors from `_rows`, all in one pass.

    First over the rows of a group: XLA's CPU backend unrolls a short axis and uses vectors along
    the next one, where it reduces the last axis of several tensors element by element. No sum in
    f32 is long.
    """

    def joined(a: Sequence[jax.Array], b: Sequence[jax.Array]) -> tuple[jax.Array, ...]:
        pairs = list(zip(a, b, strict=True))
        # A NaN may be left out here; it is in the sums. What `maximum` does for them is slow.
        larger = (jnp.where(y > x, y, x) for x, y in pairs[len(sums) :])
        return (*(x + y for x, y in pairs[: len(sums)]), *larger)

    terms = (*sums, *maxima)
    zeros = tuple(jnp.zeros((), one.dtype) for one in terms)
    partial = jax.lax.reduce(terms, zeros, joined, (1,))
    added = (jnp.sum(jnp.sum(one, axis=-1)) for one in partial[: len(sums)])
    return (*added, *(jnp.max(one) for one in partial[len(sums) :]))


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
