"""The one dot product of the whole model, with its own backward pass.

Every matrix product of lmjax goes through `einsum`. It says what plain `jnp.einsum` leaves to
chance: the format of both operands, the format products are accumulated in, and the same two for
the gradients. Left to autodiff, a bf16 product with f32 accumulation has f32 cotangents and so runs
its backward products in f32.

    forward    y   = round_c( sum_a( Qx(x) * Qw(w) ) )
    backward   dx  = round_c( sum_a( Qg(g) * Qw(w) ) )
               dw  = round_c( sum_a( Qx(x) * Qg(g) ) )

with c the site's compute format, a its accumulator, g the cotangent of y, which arrives in c, and Q
the quantizer of each operand. Factors of channels and blocks run along the axis that the product at
hand sums over, as hardware needs them, so an operand is quantized anew for each product. Gradients
pass straight through the quantizers.

Operands are quantized and widened again before they are multiplied, so the narrow formats are
emulated wherever the program runs. Two things to know about that emulation:

- A quantized operand is held in the compute format. Elements with power-of-two factors (MX) fit
  bf16 exactly; with other factors `element * factor` is rounded to bf16 once more, which hardware
  that scales after the sum does not do. With `c=f32` there is no such rounding.
- Where a product sums over two axes (the weight gradient, over batch and positions), factors run
  along the last one: a block never crosses from one sequence into the next.

Knows policies, quantizers and JAX.
"""

from __future__ import annotations

import functools
import math
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp

from lmjax.precision.exact import at_least_f32
from lmjax.precision.policy import Accumulator, Operand, SitePolicy
from lmjax.precision.rounding import Rounding, quantize
from lmjax.precision.scaling import fake_quantize

Role = Literal["weights", "activations"]
Key = jax.Array | None


def einsum(
    spec: str,
    x: jax.Array,
    w: jax.Array,
    site: SitePolicy,
    *,
    second: Role = "weights",
    key: Key = None,
) -> jax.Array:
    """A product of two operands in the formats of a site.

    Args:
      spec: an `einsum` specification of two operands, `"btk,kn->btn"`. Every index of an operand
        must stand in the other operand or in the result, and no operand may repeat one, so that
        the gradients are products of the same kind.
      x: activations, in any floating-point format; cast to the site's compute format.
      w: as x.
      site: the formats.
      second: what `w` holds, and so which of the site's quantizers it gets.
      key: random key for operands that are rounded stochastically; without one, as in evaluation,
        they are rounded to nearest.

    Returns:
      The product, in the site's compute format.

    Raises:
      ValueError: for a specification whose gradient is not a product of two operands.
    """
    _check(spec)
    return _einsum(spec, site, second, site.to_compute(x), site.to_compute(w), key)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _einsum(
    spec: str, site: SitePolicy, second: Role, x: jax.Array, w: jax.Array, key: Key
) -> jax.Array:
    return _primal(spec, site, second, x, w, key)


def _primal(
    spec: str, site: SitePolicy, second: Role, x: jax.Array, w: jax.Array, key: Key
) -> jax.Array:
    operands = (site.activations, getattr(site, second))
    return _product(spec, site, (x, w), operands, _fold(key, 0))


def _forward(
    spec: str, site: SitePolicy, second: Role, x: jax.Array, w: jax.Array, key: Key
) -> tuple[jax.Array, tuple[jax.Array, jax.Array, Key]]:
    # Not through `_einsum`: a policy of rematerialisation must see the dot to save its result.
    return _primal(spec, site, second, x, w, key), (x, w, key)


def _backward(
    spec: str,
    site: SitePolicy,
    second: Role,
    saved: tuple[jax.Array, jax.Array, Key],
    g: jax.Array,
) -> tuple[jax.Array, jax.Array, None]:
    x, w, key = saved
    x_axes, w_axes, y_axes = _axes(spec)
    grads, of_x, of_w = site.grads, site.activations, getattr(site, second)
    dx = _product(f"{y_axes},{w_axes}->{x_axes}", site, (g, w), (grads, of_w), _fold(key, 1))
    dw = _product(f"{x_axes},{y_axes}->{w_axes}", site, (x, g), (of_x, grads), _fold(key, 2))
    return dx, dw, None


_einsum.defvjp(_forward, _backward)


def _product(
    spec: str,
    site: SitePolicy,
    pair: tuple[jax.Array, jax.Array],
    operands: tuple[Operand | None, Operand | None],
    key: Key,
) -> jax.Array:
    """Quantizes both operands along the summed axis, multiplies, rounds once to compute."""
    plan = _plan(spec)
    # The gradient of a scalar product sums over nothing: any axis will do.
    x_axis, w_axis = (plan.x_summed or (-1,))[-1], (plan.w_summed or (-1,))[-1]
    x = _quantized(pair[0], operands[0], x_axis, _fold(key, 0))
    w = _quantized(pair[1], operands[1], w_axis, _fold(key, 1))
    if site.matmul == "tf32" and x.dtype == jnp.float32:
        x, w = quantize(x, "tf32"), quantize(w, "tf32")
    if site.accum.chunk:
        product = _chunked(plan, x, w, site.accum)
    else:
        product = _contract(spec, x, w, site)
        if site.accum.format.bits < 32:
            product = quantize(product, site.accum.format, overflow="native")
    return site.to_compute(product)


def _quantized(x: jax.Array, operand: Operand | None, axis: int, key: Key) -> jax.Array:
    if operand is None:
        return x
    stochastic = operand.rounding == "stochastic" and key is not None
    rounding: Rounding = "stochastic" if stochastic else "nearest_even"
    return fake_quantize(
        x, operand.quantizer, axis=axis, rounding=rounding, key=key if stochastic else None
    )


def _contract(spec: str, x: jax.Array, w: jax.Array, site: SitePolicy) -> jax.Array:
    """The sums of products in f32 (f64 for f64), not yet rounded.

    f32 operands are multiplied as f32: without `HIGHEST`, GPUs would use TF32 and TPUs bf16.
    """
    accumulate = at_least_f32(site.accum.format.dtype or jnp.float32)
    if x.dtype == jnp.float64:
        accumulate = x.dtype
    exact = x.dtype == at_least_f32(x.dtype) and site.matmul != "default"
    precision = jax.lax.Precision.HIGHEST if exact else jax.lax.Precision.DEFAULT
    return jnp.einsum(spec, x, w, precision=precision, preferred_element_type=accumulate)


def _chunked(plan: _Plan, x: jax.Array, w: jax.Array, accum: Accumulator) -> jax.Array:
    """Sums chunks of terms in f32 and the chunks one after another in a narrow accumulator.

    Written as a scan, because XLA adds bf16 sums up in f32 wherever it has the choice.
    """
    x = jnp.transpose(x, plan.x_order).astype(jnp.float32)
    w = jnp.transpose(w, plan.w_order).astype(jnp.float32)
    shared, kept = len(plan.batch), len(plan.x_kept)
    batch_shape, x_shape = x.shape[:shared], x.shape[shared : shared + kept]
    w_shape = w.shape[shared + len(plan.x_summed) :]
    terms = math.prod(x.shape[shared + kept :])
    size = min(accum.chunk, terms)
    chunks = -(-terms // size)
    padding = chunks * size - terms
    x = x.reshape(math.prod(batch_shape), math.prod(x_shape), terms)
    w = w.reshape(math.prod(batch_shape), terms, math.prod(w_shape))
    x = jnp.pad(x, ((0, 0), (0, 0), (0, padding))).reshape(*x.shape[:2], chunks, size)
    w = jnp.pad(w, ((0, 0), (0, padding), (0, 0))).reshape(w.shape[0], chunks, size, w.shape[2])

    def rounded(value: jax.Array) -> jax.Array:
        return quantize(value, accum.format, overflow="native")

    def add(total: jax.Array, chunk: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, None]:
        part = jnp.einsum("bmk,bkn->bmn", *chunk, precision=jax.lax.Precision.HIGHEST)
        return rounded(total + rounded(part)), None

    zero = jnp.zeros((x.shape[0], x.shape[1], w.shape[-1]), jnp.float32)
    total, _ = jax.lax.scan(add, zero, (jnp.moveaxis(x, 2, 0), jnp.moveaxis(w, 1, 0)))
    return jnp.transpose(total.reshape(*batch_shape, *x_shape, *w_shape), plan.y_order)


class _Plan(NamedTuple):
    """Where each index of a product stands: which axes are shared, kept, summed.

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
def _plan(spec: str) -> _Plan:
    x_axes, w_axes, y_axes = _axes(spec)
    summed = "".join(axis for axis in x_axes if axis in w_axes and axis not in y_axes)
    batch = "".join(axis for axis in x_axes if axis in w_axes and axis in y_axes)
    x_kept = "".join(axis for axis in x_axes if axis not in w_axes)
    w_kept = "".join(axis for axis in w_axes if axis not in x_axes)
    result = batch + x_kept + w_kept
    return _Plan(
        batch=batch,
        x_kept=x_kept,
        x_summed=tuple(x_axes.index(axis) for axis in summed),
        w_summed=tuple(w_axes.index(axis) for axis in summed),
        x_order=tuple(x_axes.index(axis) for axis in batch + x_kept + summed),
        w_order=tuple(w_axes.index(axis) for axis in batch + summed + w_kept),
        y_order=tuple(result.index(axis) for axis in y_axes),
    )


def _axes(spec: str) -> tuple[str, str, str]:
    operands, _, y_axes = spec.partition("->")
    x_axes, _, w_axes = operands.partition(",")
    return x_axes, w_axes, y_axes


def _fold(key: Key, index: int) -> Key:
    return None if key is None else jax.random.fold_in(key, index)


@functools.cache
def _check(spec: str) -> None:
    x_axes, w_axes, y_axes = _axes(spec)
    for own, others in ((x_axes, w_axes + y_axes), (w_axes, x_axes + y_axes)):
        if len(set(own)) != len(own) or not set(own) <= set(others):
            raise ValueError(
                f"einsum '{spec}': every index of an operand must stand once in it and again in "
                "the other operand or the result"
            )
