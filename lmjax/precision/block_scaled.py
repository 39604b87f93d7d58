"""The block-scaled product: elements and the factors of their blocks go into one kernel.

Nvidia's GPUs of compute capability 10 multiply MXFP8 and NVFP4 operands in this form, through cuDNN
(`jax.nn.scaled_matmul`). They apply the factors of blocks inside the sum, so that, unlike in the
emulation, no `element * factor` is rounded to the compute format.

Knows contractions and JAX.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental.custom_partitioning import custom_partitioning
from jax.sharding import NamedSharding, PartitionSpec

from lmjax.precision.contraction import roles_of


class Blocks(NamedTuple):
    """An operand: elements, and factors with the number of blocks as the length of an axis."""

    elements: jax.Array
    factors: jax.Array


def block_scaled_product(spec: str, x: Blocks, w: Blocks) -> jax.Array:
    """The sums in f32 of a product of two operands.

    Args:
      spec: as `lmjax.precision.matmul.einsum` takes it.
      x: the first operand, in dtypes that the hardware takes, with whole blocks along the last of
        the summed axes.
      w: the second.
    """
    plan = roles_of(spec)
    shared, summed = len(plan.batch), len(plan.x_summed)
    w_kept = plan.w_order[shared + summed :]
    w_order = plan.w_order[:shared] + w_kept + plan.w_order[shared : shared + summed]
    left = [_rows(array, plan.x_order, shared, summed) for array in x]
    right = [_rows(array, w_order, shared, summed) for array in w]
    product = _multiply(left[0], right[0], left[1], right[1])
    sizes = [x.elements.shape[axis] for axis in plan.x_order[: x.elements.ndim - summed]]
    sizes += [w.elements.shape[axis] for axis in w_kept]
    return jnp.transpose(product.reshape(sizes), plan.y_order)


def _rows(x: jax.Array, order: tuple[int, ...], shared: int, summed: int) -> jax.Array:
    """`[batch, kept, summed]`, each of them one axis."""
    x = jnp.transpose(x, order)
    parts = x.shape[:shared], x.shape[shared : x.ndim - summed], x.shape[x.ndim - summed :]
    return x.reshape([math.prod(part) for part in parts])


def _on_device(x: jax.Array, w: jax.Array, of_x: jax.Array, of_w: jax.Array) -> jax.Array:
    factors = jnp.float8_e4m3fn if x.dtype == jnp.float4_e2m1fn else jnp.float8_e8m0fnu
    of_x, of_w = (jax.lax.bitcast_convert_type(bits, factors) for bits in (of_x, of_w))
    return jax.nn.scaled_matmul(x, w, of_x, of_w, preferred_element_type=jnp.float32)


_divided = custom_partitioning(_on_device)
"""JAX's own rule sends factors between devices as e8m0, which NCCL does not know, and may send
activations where weights would do. Here factors travel as integers, and rows stay in place."""


def _specs(shapes: Sequence[Any]) -> tuple[PartitionSpec, PartitionSpec, PartitionSpec]:
    """How both operands and the result are divided."""
    padded = [tuple(one.sharding.spec) + (None,) * (3 - len(one.sharding.spec)) for one in shapes]
    (batch, rows, terms), (_, columns, others) = padded[:2]
    terms = terms if terms == others else None
    taken = {name for axes in (batch, rows, terms) for name in _names(axes)}
    columns = None if taken & set(_names(columns)) else columns
    spec = PartitionSpec
    return spec(batch, rows, terms), spec(batch, columns, terms), spec(batch, rows, columns)


def _names(axes: Any) -> tuple[str, ...]:
    return (axes,) if isinstance(axes, str) else tuple(axes or ())


def _infer(mesh: Any, shapes: Sequence[Any], result: Any) -> NamedSharding:
    return NamedSharding(mesh, _specs(shapes)[2])


def _partition(mesh: Any, shapes: Sequence[Any], result: Any) -> tuple[Any, ...]:
    left, right, whole = _specs(shapes)
    terms = left[2]

    def on_device(*operands: jax.Array) -> jax.Array:
        product = _on_device(*operands)
        return jax.lax.psum(product, _names(terms)) if _names(terms) else product

    placed = tuple(NamedSharding(mesh, spec) for spec in (left, right, left, right))
    return mesh, on_device, NamedSharding(mesh, whole), placed


_divided.def_partition(
    partition=_partition,
    infer_sharding_from_operands=_infer,
    sharding_rule="b m k, b n k, b m k, b n k -> b m n",
)


@jax.custom_batching.custom_vmap
def _multiply(x: jax.Array, w: jax.Array, of_x: jax.Array, of_w: jax.Array) -> jax.Array:
    """`[B, M, K]` times `[B, N, K]`, with factors of blocks of K."""
    bits = [jax.lax.bitcast_convert_type(factors, jnp.uint8) for factors in (of_x, of_w)]
    return _divided(x, w, *bits)


@_multiply.def_vmap
def _(size: int, mapped: list[bool], *operands: jax.Array) -> tuple[jax.Array, bool]:
    """JAX's own rule refuses operands of which only some are mapped."""
    spread = (
        x if is_mapped else jnp.broadcast_to(x, (size, *x.shape))
        for x, is_mapped in zip(operands, mapped, strict=True)
    )
    product = _multiply(*(x.reshape(-1, *x.shape[2:]) for x in spread))
    return product.reshape(size, -1, *product.shape[1:]), True
