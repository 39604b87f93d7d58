"""Contracts two arrays in the form that is fastest on the devices that a program is for.

That is `jnp.einsum`, except on XLA's CPU backend:

- It has bf16 kernels, but on many processors they are slower than the f32 kernels, and it always
  widens f16. Narrow operands are therefore multiplied as f32, unless bf16 pays (`bf16_pays`).
- Before a dot that sums over two axes (the weight gradient, over batch and positions), it
  transposes an operand in memory, element by element, and recomputes the operand's producers.
  Adjacent axes are therefore merged.
- If the last index of the result belongs to the first operand, it transposes the result. The
  operands are therefore swapped.
- Its fast kernels do not accept a first operand whose rows are summed over. x^T g, the weight
  gradient, would run in a slower one, and in f32 where bf16 pays. The transpose is therefore
  materialised first.
- Its bf16 kernels take six times as long for one row as for two, as when a token is decoded. A
  row that is alone is therefore multiplied twice.
- Before a product of int8 or f16, or of weights that are stored in another dtype than the
  activations', it writes them out in a wider one. With one row, such a product is therefore a loop
  that reads each weight once (`one_row.py`), and with few rows, weights are widened in pieces that
  stay in the cache (`few_rows.py`).

All but the first apply to a single device only: axes that a mesh divides cannot be merged in place.
A product of narrow operands is exact in f32, so only the order of the sum can change.

Knows backends and JAX.
"""

from __future__ import annotations

import functools
import math
import re
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from lmjax.precision.backend import this_backend
from lmjax.precision.few_rows import SMALLEST, in_pieces
from lmjax.precision.one_row import row_times

CPU_INFO = Path("/proc/cpuinfo")

FEW_ROWS = 64
"""Most rows for which widening a weight takes as long as multiplying by it."""

Axes = tuple[tuple[int, ...], tuple[int, ...]]
"""Axes of the first operand and of the second."""


def contract(
    spec: str, x: jax.Array, w: jax.Array, *, precision: jax.lax.Precision, accumulate: Any
) -> jax.Array:
    """`jnp.einsum` of two operands of one dtype, or of two fp8 dtypes.

    Args:
      spec: as `lmjax.precision.matmul.einsum` takes it.
      x: the first operand.
      w: the second operand, where `few_rows` in any dtype that holds numbers of `x`'s.
      precision: precision of the product.
      accumulate: dtype of the sum and of the result.
    """
    backend = this_backend().platform
    if backend != "cpu":
        return jnp.einsum(spec, x, w, precision=precision, preferred_element_type=accumulate)
    slow = x.dtype != w.dtype or x.dtype in (jnp.int8, jnp.float16)
    rows = few_rows(spec, x.shape) if slow else 0
    if rows == 1:
        return _one_row(spec, x, w, precision, accumulate)
    is_fp8 = x.dtype.itemsize == 1 and x.dtype != jnp.int8  # times another fp8, not to be cast
    if rows and not is_fp8:
        if w.size >= SMALLEST:
            return _few_rows(spec, x, w, precision, accumulate)
        w = w.astype(x.dtype)
    return _on_cpu(spec, x, w, precision, accumulate)


def _on_cpu(
    spec: str, x: jax.Array, w: jax.Array, precision: jax.lax.Precision, accumulate: Any
) -> jax.Array:
    algorithm: Any = precision
    if accumulate == jnp.float32 and widened("cpu", x.dtype):
        algorithm = jax.lax.DotAlgorithmPreset.F32_F32_F32
    one_device = jax.device_count() == 1
    product = _on_one_cpu if one_device else jnp.einsum
    return product(spec, x, w, precision=algorithm, preferred_element_type=accumulate)


def few_rows(spec: str, x_shape: tuple[int, ...]) -> int:
    """How many rows the first operand has, if `contract` takes a second one of any dtype; else 0.

    On one CPU it does for at most `FEW_ROWS` rows, times weights that are summed over their first
    axes, or over their last.

    Args:
      spec: as `lmjax.precision.matmul.einsum` takes it.
      x_shape: shape of the first operand.
    """
    if not is_one_cpu():
        return 0
    x_axes, w_axes, y_axes = axes_of(spec)
    summed = "".join(axis for axis in x_axes if axis not in y_axes)
    kept = "".join(axis for axis in w_axes if axis not in summed)
    sizes = dict(zip(x_axes, x_shape, strict=True))
    rows = math.prod(sizes[axis] for axis in roles_of(spec).x_kept)
    apart = w_axes in (summed + kept, kept + summed) and not set(kept) & set(x_axes)
    suits = apart and bool(kept) and y_axes.endswith(kept)
    return rows if suits and rows <= FEW_ROWS else 0


def _few_rows(
    spec: str, x: jax.Array, w: jax.Array, precision: jax.lax.Precision, accumulate: Any
) -> jax.Array:
    _, w_axes, y_axes = axes_of(spec)
    plan = roles_of(spec)
    turned = w_axes[-1] not in y_axes
    rows = jnp.transpose(x, plan.x_order).reshape(-1, math.prod(x.shape[a] for a in plan.x_summed))
    shape = (-1, rows.shape[1]) if turned else (rows.shape[1], -1)
    flat = "rk,nk->rn" if turned else "rk,kn->rn"
    multiply = lambda piece: _on_cpu(flat, rows, piece.astype(x.dtype), precision, accumulate)
    found = in_pieces(multiply, w.reshape(shape), axis=0 if turned else 1)
    x_kept = [x.shape[axis] for axis in plan.x_order[: len(plan.x_kept)]]
    w_kept = [size for size, axis in zip(w.shape, w_axes, strict=True) if axis in y_axes]
    return jnp.transpose(found.reshape(*x_kept, *w_kept), plan.y_order)


def _one_row(
    spec: str, x: jax.Array, w: jax.Array, precision: jax.lax.Precision, accumulate: Any
) -> jax.Array:
    _, w_axes, y_axes = axes_of(spec)
    turned = w_axes[-1] not in y_axes
    shape = (-1, x.size) if turned else (x.size, -1)
    found = _row_times(precision, accumulate, turned)(x.reshape(-1), w.reshape(shape))
    sizes = dict(zip(w_axes, w.shape, strict=True))
    return found.reshape([sizes.get(axis, 1) for axis in y_axes])


@functools.cache
def _row_times(precision: jax.lax.Precision, accumulate: Any, turned: bool) -> Any:
    """`row_times`; of several rows under `vmap`, a product as for any other rows."""

    @jax.custom_batching.custom_vmap
    def times(row: jax.Array, w: jax.Array) -> jax.Array:
        return row_times(row, w, turned=turned, accumulate=accumulate)

    @times.def_vmap
    def rows_times(size: int, batched: Any, x: jax.Array, w: jax.Array) -> Any:
        """Of `size` rows."""
        del size
        row, weights = ("r" if own else "" for own in batched)
        spec = f"{row}k,{weights}{'nk' if turned else 'kn'}->rn"
        return _on_cpu(spec, x, w.astype(x.dtype), precision, accumulate), True

    return times


def widened(platform: str, dtype: Any) -> bool:
    """Whether `contract` multiplies operands of a dtype as f32 on a JAX platform."""
    if platform != "cpu":
        return False
    return dtype == jnp.float16 or (dtype == jnp.bfloat16 and not bf16_pays())


@functools.cache
def bf16_pays() -> bool:
    """Whether this processor multiplies bf16 faster than f32; False if unknown.

    AMD's AVX512-BF16 does, at twice the rate, and so does AMX. Intel's AVX512-BF16 alone has the
    same peak rate as its f32 units, of which XLA's kernels reach 0.6.
    """
    try:
        text = CPU_INFO.read_text()
    except OSError:
        return False
    flags = set(" ".join(re.findall(r"^flags\s*:(.*)$", text, re.MULTILINE)).split())
    return "amx_bf16" in flags or ("avx512_bf16" in flags and "AuthenticAMD" in text)


def _on_one_cpu(
    spec: str, x: jax.Array, w: jax.Array, *, precision: Any, preferred_element_type: Any
) -> jax.Array:
    x_axes, w_axes, y_axes = axes_of(spec)
    if y_axes and y_axes[-1] not in w_axes:
        x, w, x_axes, w_axes = w, x, w_axes, x_axes
    plan = roles_of(f"{x_axes},{w_axes}->{y_axes}")
    x_summed, w_summed = plan.x_summed, plan.w_summed
    if not plan.batch and _adjacent(x_summed) and _adjacent(w_summed):
        x, w = _merged(x, x_summed), _merged(w, w_summed)
        x_summed, w_summed = x_summed[:1], w_summed[:1]
    shared = [[axes.index(axis) for axis in plan.batch] for axes in (x_axes, w_axes)]
    dot = functools.partial(
        jax.lax.dot_general, precision=precision, preferred_element_type=preferred_element_type
    )
    rows = x.ndim == w.ndim == 2 and x_summed == w_summed == (0,) and x.shape[0] % 2 == 0
    if rows and x.dtype.itemsize in (2, 4):
        return jnp.transpose(_sum_of_rows(dot, x, w), plan.y_order)
    product = _sum_of_terms(dot, x, w, (x_summed, w_summed), (tuple(shared[0]), tuple(shared[1])))
    return jnp.transpose(product, plan.y_order)


def _sum_of_terms(dot: Any, x: jax.Array, w: jax.Array, summed: Axes, shared: Axes) -> jax.Array:
    """`dot_general` over axes of both operands; a row of `x` that is alone is multiplied twice."""
    rows = [axis for axis in range(x.ndim) if axis not in (*summed[0], *shared[0])]
    alone = bool(rows) and math.prod(x.shape[axis] for axis in rows) == 1
    if not (alone and x.dtype == jnp.bfloat16 and bf16_pays()):
        return dot(x, w, (summed, shared))
    product = dot(jnp.concatenate([x, x], axis=rows[-1]), w, (summed, shared))
    return jax.lax.slice_in_dim(product, 0, 1, axis=len(shared[0]) + len(rows) - 1)


def _adjacent(axes: tuple[int, ...]) -> bool:
    return len(axes) > 1 and axes == tuple(range(axes[0], axes[-1] + 1))


def _merged(x: jax.Array, axes: tuple[int, ...]) -> jax.Array:
    return x.reshape(*x.shape[: axes[0]], -1, *x.shape[axes[-1] + 1 :])


def _sum_of_rows(dot: Any, x: jax.Array, w: jax.Array) -> jax.Array:
    """`x.T @ w` of `[R, M]` and `[R, N]`, R even, for kernels without transposed operands."""
    if x.size > w.size:
        # The barrier keeps XLA from folding the transpose into the dot, which then fails to run.
        return jax.lax.optimization_barrier(_sum_of_rows(dot, w, x)).T
    return dot(_materialised(x, (1, 0)), w, (((1,), (0,)), ((), ())))


def relaid(x: jax.Array, order: tuple[int, ...]) -> jax.Array:
    """`jnp.transpose(x, order)` as an operand of products with shared axes.

    On one CPU it stands in memory as its shape says. XLA would otherwise give the dot another
    layout, for which it has no bf16 kernel.
    """
    if is_one_cpu() and x.shape[order[-1]] % 2 == 0:
        return _materialised(x, order)
    return jnp.transpose(x, order)


def not_before(g: jax.Array, x: jax.Array) -> jax.Array:
    """`x`, which a program for one CPU reads only once `g` is known.

    Barriers and control dependences do not survive XLA's CPU pipeline until it schedules.
    """
    if not is_one_cpu():
        return x
    first = g.reshape(-1)[:1]
    zero = 0 * jnp.where(jnp.isfinite(first), first, jnp.zeros_like(first)).astype(x.dtype)
    return x * (1 + zero).reshape((1,) * x.ndim)


def is_one_cpu() -> bool:
    """Whether the program is for a single CPU device."""
    return this_backend().platform == "cpu" and jax.device_count() == 1


def _materialised(x: jax.Array, order: tuple[int, ...]) -> jax.Array:
    """A transpose whose last axis is even, through pairs: XLA undoes a plain one."""
    last = order[-1]
    pairs = x.reshape(*x.shape[:last], x.shape[last] // 2, 2, *x.shape[last + 1 :])
    turned = [axis + (axis > last) for axis in order]
    shape = [x.shape[axis] for axis in order]
    return jax.lax.optimization_barrier(pairs.transpose(*turned, last + 1).reshape(shape))


class Roles(NamedTuple):
    """The role of each index of a product: batch, kept or summed.

    `x_order` brings x to [batch, kept, summed], `w_order` w to [batch, summed, kept], and
    `y_order` [batch, x kept, w kept] to the order of the result.
    """

    batch: str
    x_kept: str
    x_summed: tuple[int, ...]
    w_summed: tuple[int, ...]
    x_order: tuple[int, ...]
    w_order: tuple[int, ...]
    y_order: tuple[int, ...]


@functools.cache
def roles_of(spec: str) -> Roles:
    """Parses an `einsum` specification of two operands into a plan."""
    x_axes, w_axes, y_axes = axes_of(spec)
    summed = "".join(axis for axis in x_axes if axis in w_axes and axis not in y_axes)
    batch = "".join(axis for axis in x_axes if axis in w_axes and axis in y_axes)
    x_kept = "".join(axis for axis in x_axes if axis not in w_axes)
    w_kept = "".join(axis for axis in w_axes if axis not in x_axes)
    result = batch + x_kept + w_kept
    return Roles(
        batch=batch,
        x_kept=x_kept,
        x_summed=tuple(x_axes.index(axis) for axis in summed),
        w_summed=tuple(w_axes.index(axis) for axis in summed),
        x_order=tuple(x_axes.index(axis) for axis in batch + x_kept + summed),
        w_order=tuple(w_axes.index(axis) for axis in batch + summed + w_kept),
        y_order=tuple(result.index(axis) for axis in y_axes),
    )


def axes_of(spec: str) -> tuple[str, str, str]:
    """The indices of both operands and of the result."""
    operands, _, y_axes = spec.partition("->")
    x_axes, _, w_axes = operands.partition(",")
    return x_axes, w_axes, y_axes


def beside_result(factor: jax.Array, axes: str, summed: tuple[int, ...], y_axes: str) -> jax.Array:
    """Reshapes a factor of an operand to broadcast against the result of the product.

    Args:
      factor: a scalar, or of the operand's shape with length 1 at all summed axes.
      axes: the indices of the operand.
      summed: its axes that are summed over.
      y_axes: the indices of the result.
    """
    if not factor.ndim:
        return factor
    kept = [index for axis, index in enumerate(axes) if axis not in summed]
    order = [kept.index(index) for index in y_axes if index in kept]
    missing = [axis for axis, index in enumerate(y_axes) if index not in kept]
    return jnp.expand_dims(jnp.transpose(jnp.squeeze(factor, summed), order), missing)
