"""The one dot product of the whole model, with its own backward pass.

Every matrix product of lmjax goes through `einsum`. It says what plain `jnp.einsum` leaves to
chance: the format of both operands, the format products are accumulated in, and the same two for
the gradients. Left to autodiff, a bf16 product with f32 accumulation has f32 cotangents and so runs
its backward products in f32.

    forward    y   = round_c( sum_a( Qx(x) * Qw(w) ) )
    backward   dx  = round_c( sum_a( Qg(g) * Qw(w) ) )
               dw  = round_c( sum_a( Qx(x) * Qg(g) ) )

with c the site's compute format, a its accumulator, g the cotangent of y, which arrives in c, and Q
the quantizer of each operand. An operand is quantized anew for each product, because factors of
channels and blocks follow the axes that the product at hand sums over: the terms of one sum are a
channel, and blocks are cut along the last of those axes, so that none crosses from one sequence
into the next. Gradients pass straight through the quantizers.

Factors are applied as hardware applies them. Where all terms of a sum share them, elements are
multiplied and summed, and the sum in f32 is multiplied by the factors:

    sum( Qx(x) * Qw(w) )  =  sx * sw * sum_a( ex * ew )

Elements of narrow formats fit the compute format exactly, so nothing is rounded between quantizing
and summing; and where the backend multiplies them natively, they are handed to the dot in their own
dtypes (`native.py`). A narrow accumulator holds sums of elements: those of e4m3, up to 448, leave
f16 where sums of the operands themselves would not.

Factors that differ among the terms of a sum (blocks) and zero points come before it. Such an
operand is held in the compute format: exactly with factors that are powers of two (MX) and `c=bf16`
or wider; with others, `element * factor` is rounded once more.

Knows policies, quantizers, probes, contractions, native products and JAX.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from lmjax.precision.contraction import Plan, axes_of, beside_result, contract, plan_of
from lmjax.precision.exact import at_least_f32
from lmjax.precision.native import multiplies_elements, product_dtypes, this_backend
from lmjax.precision.policy import Accumulator, Operand, SitePolicy
from lmjax.precision.probes import Probe, Rounded, Slots, measure, report, report_cotangent
from lmjax.precision.quantizer import Quantizer
from lmjax.precision.rounding import quantize
from lmjax.precision.scaling import (
    Axis,
    apply_factor,
    elements,
    fake_quantize,
    quantize_with_scale,
)

Role = Literal["weights", "activations"]
Key = jax.Array | None
Factors = Mapping[str, jax.Array]


def einsum(
    spec: str,
    x: jax.Array,
    w: jax.Array,
    site: SitePolicy,
    *,
    second: Role = "weights",
    key: Key = None,
    probe: Probe | None = None,
    unit: bool = False,
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
      probe: factors of delayed scaling, without which operands are scaled by their own maximum; and
        slots for what is to be measured of the operands and gradients.
      unit: divides each of the three products, y, dx and dw, by the root of the number of terms
        that it sums, in the format of the sum and so before it is rounded: unit scaling, which
        turns the gradients into multiples of themselves (see `model/unit_scaling.py`).

    Returns:
      The product, in the site's compute format.

    Raises:
      ValueError: for a specification whose gradient is not a product of two operands.
    """
    _check(spec)
    factors, slots = ({}, {}) if probe is None else probe
    plan = plan_of(spec)
    x = _watched(x, site.activations, plan.x_summed, site, factors.get("x"), slots.get("x", {}))
    of_w = getattr(site, second)
    w = _watched(w, of_w, plan.w_summed, site, factors.get("w"), slots.get("w", {}))
    gradients = {role: slots[role] for role in ("dx", "dw") if role in slots}
    return _einsum(spec, site, second, unit, x, w, key, factors, gradients)


def hand_on(y: jax.Array, site: SitePolicy, probe: Probe | None = None) -> jax.Array:
    """The result of a product in the site's output format; `g` is measured of its cotangent."""
    factors, slots = ({}, {}) if probe is None else probe
    view = functools.partial(_view, operand=site.grads, axis=-1, site=site)
    return report_cotangent(site.to_output(y), slots.get("g", {}), view, factors.get("g"))


def _watched(
    x: jax.Array,
    operand: Operand | None,
    axis: Axis,
    site: SitePolicy,
    factor: jax.Array | None,
    slots: Mapping[str, Any],
) -> jax.Array:
    """An operand, cast to the compute format; measured before it is cast and quantized."""
    view = lambda: _view(x, factor, operand=operand, axis=axis, site=site)
    return report(site.to_compute(x), slots, view)


def _view(
    x: jax.Array, factor: jax.Array | None, *, operand: Operand | None, axis: Axis, site: SitePolicy
) -> Rounded:
    """What becomes of a tensor that enters a product."""
    if operand is None:
        return Rounded(x, x, site.to_compute(x), site.compute)
    scaled, values = elements(
        site.to_compute(x), _current(operand.quantizer, factor), axis=axis, scale=factor
    )
    return Rounded(x, scaled, values, operand.quantizer.format)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2, 3))
def _einsum(
    spec: str,
    site: SitePolicy,
    second: Role,
    unit: bool,
    x: jax.Array,
    w: jax.Array,
    key: Key,
    factors: Factors,
    slots: Slots,
) -> jax.Array:
    return _primal(spec, site, second, unit, x, w, key, factors)


def _primal(
    spec: str,
    site: SitePolicy,
    second: Role,
    unit: bool,
    x: jax.Array,
    w: jax.Array,
    key: Key,
    factors: Factors,
) -> jax.Array:
    roles = ("x", site.activations), ("w", getattr(site, second))
    return site.to_compute(_product(spec, site, unit, (x, w), roles, _fold(key, 0), factors))


def _forward(
    spec: str,
    site: SitePolicy,
    second: Role,
    unit: bool,
    x: jax.Array,
    w: jax.Array,
    key: Key,
    factors: Factors,
    slots: Slots,
) -> tuple[jax.Array, tuple[jax.Array, jax.Array, Key, Factors, Slots]]:
    # Not through `_einsum`: a policy of rematerialisation must see the dot to save its result.
    y = _primal(spec, site, second, unit, x, w, key, factors)
    return y, (x, w, key, factors, slots)


def _backward(
    spec: str,
    site: SitePolicy,
    second: Role,
    unit: bool,
    saved: tuple[jax.Array, jax.Array, Key, Factors, Slots],
    g: jax.Array,
) -> tuple[jax.Array, jax.Array, None, Factors, Slots]:
    x, w, key, factors, slots = saved
    x_axes, w_axes, y_axes = axes_of(spec)
    of_g, of_x, of_w = ("g", site.grads), ("x", site.activations), ("w", getattr(site, second))
    dx_spec, dw_spec = f"{y_axes},{w_axes}->{x_axes}", f"{x_axes},{y_axes}->{w_axes}"
    wide = {
        "dx": _product(dx_spec, site, unit, (g, w), (of_g, of_w), _fold(key, 1), factors),
        "dw": _product(dw_spec, site, unit, (x, g), (of_x, of_g), _fold(key, 2), factors),
    }
    dx, dw = site.to_compute(wide["dx"]), site.to_compute(wide["dw"])
    rounded = {"dx": dx, "dw": dw}
    measured = {
        role: measure(asked, Rounded(wide[role], wide[role], rounded[role], site.compute))
        for role, asked in slots.items()
    }
    return dx, dw, None, jax.tree.map(jnp.zeros_like, factors), measured


_einsum.defvjp(_forward, _backward)


def _product(
    spec: str,
    site: SitePolicy,
    unit: bool,
    pair: tuple[jax.Array, jax.Array],
    roles: tuple[tuple[str, Operand | None], tuple[str, Operand | None]],
    key: Key,
    factors: Factors,
) -> jax.Array:
    """The product of both operands, quantized; not yet rounded to compute."""
    plan = plan_of(spec)
    (x_role, of_x), (w_role, of_w) = roles
    x = _ready(pair[0], of_x, plan.x_summed, site, _fold(key, 0), factors.get(x_role))
    w = _ready(pair[1], of_w, plan.w_summed, site, _fold(key, 1), factors.get(w_role))
    terms = math.prod(x.values.shape[axis] for axis in plan.x_summed)
    dtypes = product_dtypes(this_backend(), site, of_x, of_w, terms)
    x_dtype, w_dtype = dtypes or (x.values.dtype, w.values.dtype)
    product = _sum(spec, x.values.astype(x_dtype), w.values.astype(w_dtype), site)
    x_axes, w_axes, y_axes = axes_of(spec)
    for operand, axes, summed in ((x, x_axes, plan.x_summed), (w, w_axes, plan.w_summed)):
        if operand.late is not None:
            factor, quantizer = operand.late
            factor = beside_result(factor, axes, summed, y_axes)
            product = apply_factor(product, factor, quantizer)
    if unit:
        product = product * jnp.asarray(terms**-0.5, product.dtype)
    return product


class _Ready(NamedTuple):
    """An operand as it is multiplied.

    Attributes:
      values: of its shape and dtype.
      late: what the sum is still to be multiplied by, and the quantizer that this is a factor of:
        f32[], or f32 of the operand's shape, but with length 1 at the summed axes.
    """

    values: jax.Array
    late: tuple[jax.Array, Quantizer] | None = None


def _ready(
    x: jax.Array,
    operand: Operand | None,
    summed: tuple[int, ...],
    site: SitePolicy,
    key: Key,
    factor: jax.Array | None,
) -> _Ready:
    if operand is None:
        return _Ready(x)
    stochastic = operand.rounding == "stochastic" and key is not None
    quantizer = _current(operand.quantizer, factor)
    how: dict[str, Any] = {
        "axis": summed,
        "rounding": "stochastic" if stochastic else "nearest_even",
        "key": key if stochastic else None,
        "scale": factor,
    }
    if quantizer.groups == "none" or not multiplies_elements(operand, site.compute):
        return _Ready(fake_quantize(x, quantizer, **how))
    quantized = quantize_with_scale(x, quantizer, **how)
    return _Ready(quantized.values.astype(x.dtype), (quantized.factor, quantizer))


def _current(quantizer: Quantizer, factor: jax.Array | None) -> Quantizer:
    """The quantizer, scaling by the tensor itself where it should be delayed but nobody knows."""
    return quantizer if factor is not None else replace(quantizer, history=0)


def _sum(spec: str, x: jax.Array, w: jax.Array, site: SitePolicy) -> jax.Array:
    """Sums of products in the accumulator of the site, held in f32 (f64 for f64)."""
    if site.matmul == "tf32" and x.dtype == jnp.float32:
        x, w = quantize(x, "tf32"), quantize(w, "tf32")
    if site.accum.chunk:
        return _chunked(plan_of(spec), x, w, site.accum)
    total = _contract(spec, x, w, site)
    if site.accum.format.bits < 32:
        total = quantize(total, site.accum.format, overflow="native")
    return total


def _contract(spec: str, x: jax.Array, w: jax.Array, site: SitePolicy) -> jax.Array:
    """The sums of products in f32 (f64 for f64), not yet rounded.

    f32 operands are multiplied as f32: without `HIGHEST`, GPUs would use TF32 and TPUs bf16. fp8
    operands are summed as exactly as there is hardware for: without it, Nvidia's GPUs leave the sum
    to the tensor cores ("fast accumulation"). Integers are summed in int32, without rounding.
    """
    accumulate = at_least_f32(site.accum.format.dtype or jnp.float32)
    if x.dtype == jnp.float64:
        accumulate = x.dtype
    if x.dtype == jnp.int8:
        whole = contract(spec, x, w, precision=jax.lax.Precision.DEFAULT, accumulate=jnp.int32)
        return whole.astype(accumulate)
    careful = x.dtype == at_least_f32(x.dtype) or x.dtype.itemsize == 1
    highest = careful and site.matmul != "default"
    precision = jax.lax.Precision.HIGHEST if highest else jax.lax.Precision.DEFAULT
    return contract(spec, x, w, precision=precision, accumulate=accumulate)


def _chunked(plan: Plan, x: jax.Array, w: jax.Array, accum: Accumulator) -> jax.Array:
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


def _fold(key: Key, index: int) -> Key:
    return None if key is None else jax.random.fold_in(key, index)


@functools.cache
def _check(spec: str) -> None:
    x_axes, w_axes, y_axes = axes_of(spec)
    for own, others in ((x_axes, w_axes + y_axes), (w_axes, x_axes + y_axes)):
        if len(set(own)) != len(own) or not set(own) <= set(others):
            raise ValueError(
                f"einsum '{spec}': every index of an operand must stand once in it and again in "
                "the other operand or the result"
            )
