"""The block-scaled product: elements and the factors of their blocks go into one kernel.

Nvidia's GPUs of compute capability 10 multiply MXFP8 and NVFP4 operands in this form, through cuDNN
(`jax.nn.scaled_matmul`). They apply the factors of blocks inside the sum, so that, unlike in the
emulation, no `element * factor` is rounded to the compute format.

Knows contractions and JAX.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

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


@jax.custom_batching.custom_vmap
def _multiply(x: jax.Array, w: jax.Array, of_x: jax.Array, of_w: jax.Array) -> jax.Array:
    """`[B, M, K]` times `[B, N, K]`, with factors of blocks of K."""
    return jax.nn.scaled_matmul(x, w, of_x, of_w, preferred_element_type=jnp.float32)


@_multiply.def_vmap
def _(size: int, mapped: list[bool], *operands: jax.Array) -> tuple[jax.Array, bool]:
    """JAX's own rule refuses operands of which only some are mapped."""
    spread = (
        x if is_mapped else jnp.broadcast_to(x, (size, *x.shape))
        for x, is_mapped in zip(operands, mapped, strict=True)
    )
    product = _multiply(*(x.reshape(-1, *x.shape[2:]) for x in spread))
    return product.reshape(size, -1, *product.shape[1:]), True
