"""Weights kept as the elements and factors that products multiply: `w=int4@block32.stored`.

Elements narrower than a byte are packed, one after the other from the lowest bit up, along the axis
that products sum over: two of int4 a byte, four of e3m2 in three. `stored.py` keeps whole bytes,
which is what arrays need that a step writes; these are only read.

What a product reads is, bit for bit, what it would make of the weights under the same `w` without
`.stored`, if the weights were rounded to nearest.

Knows jax, formats, quantizers, their arithmetic and its scopes.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lmjax.precision.asides import rounded_to
from lmjax.precision.exact import at_least_f32
from lmjax.precision.formats import Format
from lmjax.precision.quantizer import Quantizer
from lmjax.precision.scaling import Factors, Quantized, dequantize, quantize_with_scale
from lmjax.precision.stored import holder

_BYTE = 8  # bits
_ARRAYS = ("codes", "scale", "zero_point", "tensor_scale", "inputs")


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=_ARRAYS,
    meta_fields=("quantizer", "axis", "length"),
)
@dataclass(frozen=True)
class Packed:
    """A weight, or a stack of them, as it is stored.

    Attributes:
      codes: bit patterns of the elements, `uint8` of the shape of the weight but with the packed
        length at `axis`; formats of whole bytes that have a dtype stand in that.
      scale, zero_point, tensor_scale: as in `Quantized`, each in the `holder` of its format.
      inputs: f32 [], the calibrated factor of the activations that it is multiplied with
        (`x=int8@tensor.static`); None without.
      quantizer: of the elements.
      axis: what products sum over, counted from the last.
      length: of the weight along that axis.
    """

    codes: jax.Array
    scale: jax.Array
    zero_point: jax.Array | None
    tensor_scale: jax.Array | None
    inputs: jax.Array | None
    quantizer: Quantizer
    axis: int
    length: int

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the weight."""
        at = self.codes.ndim + self.axis
        return (*self.codes.shape[:at], self.length, *self.codes.shape[at + 1 :])

    @property
    def ndim(self) -> int:
        """Number of its dimensions."""
        return self.codes.ndim

    @property
    def size(self) -> int:
        """Number of its elements."""
        return math.prod(self.shape)

    def __getitem__(self, index: Any) -> Any:
        """Itself at `...`; at an array of indices these rows of a table, f32."""
        if index is Ellipsis:
            return self
        taken = jax.tree.map(lambda leaf: leaf[index] if leaf.ndim else leaf, self)
        return taken.dense()

    @property
    def quantized(self) -> Quantized:
        """Elements and factors, as `dequantize` takes them."""
        with rounded_to(str(self.quantizer)):
            factors = Factors(self.scale, self.zero_point, self.tensor_scale)
            wide = jax.tree.map(lambda leaf: leaf.astype(at_least_f32(leaf.dtype)), factors)
            values = _read(self.codes, self.quantizer.format, self.axis, self.length)
            return Quantized(values, *wide)

    def dense(self, dtype: Any = jnp.float32) -> jax.Array:
        """The weight, as an array."""
        with rounded_to(str(self.quantizer)):
            return dequantize(self.quantized, self.quantizer, axis=self.axis, dtype=dtype)


@functools.partial(jax.tree_util.register_dataclass, data_fields=("runs",), meta_fields=())
@dataclass(frozen=True)
class Pieces:
    """A stack whose members are not stored alike: runs of them that are, first to last.

    Attributes:
      runs: each an array or `Packed`, with a leading axis of its members.
    """

    runs: tuple[Any, ...]

    def between(self, first: int, last: int) -> Any:
        """Members `first` to `last - 1`, which must be of one run."""
        for run in self.runs:
            size = jax.tree.leaves(run)[0].shape[0]
            if first < size:
                break
            first, last = first - size, last - size
        return members(run, first, last)

    def __getitem__(self, index: Any) -> Pieces:
        """Itself, as parameters are read by `...`."""
        return self


def members(tree: Any, first: int, last: int) -> Any:
    """Members `first` to `last - 1` of every stack in a tree."""
    cut = lambda leaf: leaf.between(first, last) if _in_pieces(leaf) else leaf[first:last]
    return jax.tree.map(cut, tree, is_leaf=_in_pieces)


def one_member(tree: Any, index: int) -> Any:
    """One member of every stack in a tree, without the leading axis."""
    return jax.tree.map(lambda leaf: leaf[0], members(tree, index, index + 1))


def is_stored(node: Any) -> bool:
    """Whether a node of a tree is a weight that is not an array."""
    return isinstance(node, Packed | Pieces)


def _in_pieces(node: Any) -> bool:
    return isinstance(node, Pieces)


def pack(
    x: jax.Array,
    quantizer: Quantizer,
    *,
    axis: int,
    factors: Factors | None = None,
    inputs: jax.Array | None = None,
) -> Packed:
    """A weight as it is stored, to nearest.

    Args:
      x: float array of two dimensions.
      quantizer: format and factors.
      axis: what products sum over.
      factors: of all groups, to be used instead of those of `x` itself.
      inputs: f32 [], the factor of activations.
    """
    return packed(
        quantize_with_scale(x, quantizer, axis=axis, factors=factors),
        quantizer,
        axis=axis - x.ndim if axis >= 0 else axis,
        inputs=inputs,
    )


def packed(
    quantized: Quantized, quantizer: Quantizer, *, axis: int, inputs: jax.Array | None = None
) -> Packed:
    """Elements and factors that were found already, as they are stored; see `pack`."""
    values, scale, zero_point, tensor_scale = quantized
    if zero_point is not None:
        zero_point = zero_point.astype(holder(quantizer.format))
    return Packed(
        _written(values, quantizer.format, axis),
        scale.astype(holder(quantizer.scale)),
        zero_point,
        tensor_scale,
        inputs,
        quantizer,
        axis,
        values.shape[axis],
    )


def is_packed(number_format: Format) -> bool:
    """Whether elements of a format are bit patterns in bytes, rather than of a dtype."""
    return number_format.bits <= _BYTE and not (
        number_format.bits == _BYTE and number_format.dtype is not None
    )


def _written(values: jax.Array, number_format: Format, axis: int) -> jax.Array:
    """Elements as bit patterns, packed along an axis; or in their own dtype."""
    if not is_packed(number_format):
        return values.astype(holder(number_format))
    bits, count, width = _units(number_format)
    codes = _codes(values, number_format).astype(jnp.uint16)
    at = values.ndim + axis
    padding = [(0, -codes.shape[at] % count if i == at else 0) for i in range(codes.ndim)]
    codes = jnp.pad(codes, padding)
    codes = codes.reshape(*codes.shape[:at], -1, count, *codes.shape[at + 1 :])
    part = _taking(codes, at + 1)
    written = []
    for byte in range(width):
        total = jnp.zeros_like(part(0))
        for index in range(count):
            shift = index * bits - byte * _BYTE
            if -bits < shift < _BYTE:
                total |= part(index) << shift if shift >= 0 else part(index) >> -shift
        written.append(total & 0xFF)
    stacked = jnp.stack(written, axis=at + 1).astype(jnp.uint8)
    return stacked.reshape(*stacked.shape[:at], -1, *stacked.shape[at + 2 :])


def _read(codes: jax.Array, number_format: Format, axis: int, length: int) -> jax.Array:
    """Elements of such patterns, as values in f32 (f64 stays f64)."""
    if not is_packed(number_format):
        return codes.astype(at_least_f32(codes.dtype))
    bits, count, width = _units(number_format)
    at = codes.ndim + axis
    codes = codes.reshape(*codes.shape[:at], -1, width, *codes.shape[at + 1 :]).astype(jnp.uint16)
    first, shift = np.divmod(np.arange(count, dtype=np.uint16) * bits, _BYTE)
    if width > 1:  # an element may begin in one byte and end in the next
        following = jnp.roll(codes, -1, axis=at + 1)
        codes = jnp.take(codes | (following << _BYTE), first, axis=at + 1)
    shift = shift.astype(np.uint16).reshape(-1, *[1] * (codes.ndim - at - 2))
    read = (codes >> shift) & ((1 << bits) - 1)
    read = read.reshape(*read.shape[:at], -1, *read.shape[at + 2 :])
    return _values(jax.lax.slice_in_dim(read, 0, length, axis=at), number_format)


def _units(number_format: Format) -> tuple[int, int, int]:
    """Bits of an element, and the fewest elements that fill whole bytes, and those bytes."""
    whole = math.lcm(number_format.bits, _BYTE)
    return number_format.bits, whole // number_format.bits, whole // _BYTE


def _taking(x: jax.Array, axis: int) -> Callable[[int], jax.Array]:
    return lambda index: jax.lax.index_in_dim(x, index, axis, keepdims=False)


def _codes(values: jax.Array, number_format: Format) -> jax.Array:
    """The bit pattern of each value of a format, uint8."""
    if number_format.is_integer:
        counted = values * np.float32(1 / number_format.smallest_subnormal)
        return counted.astype(jnp.int8).astype(jnp.uint8) & np.uint8((1 << number_format.bits) - 1)
    magnitudes = number_format.values()[: number_format.largest_code + 1].astype(np.float32)
    codes = jnp.searchsorted(magnitudes, jnp.abs(values).astype(jnp.float32)).astype(jnp.uint8)
    sign = jnp.signbit(values) & ((codes > 0) | number_format.has_negative_zero)
    return codes | (sign.astype(jnp.uint8) << (number_format.bits - 1))


def _values(codes: jax.Array, number_format: Format) -> jax.Array:
    """The value of each bit pattern, f32."""
    if number_format.is_integer:
        sign = 1 << (number_format.bits - 1)
        counted = (codes.astype(jnp.int16) ^ sign) - sign
        return counted.astype(jnp.float32) * np.float32(number_format.smallest_subnormal)
    return jnp.asarray(number_format.values().astype(np.float32))[codes]
