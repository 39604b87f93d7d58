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

Knows policies, quantizers, probes, contractions and JAX.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Literal

import jax
import jax.numpy as jnp

from lmjax.precision.contraction import Plan, axes_of, contract, plan_of
from lmjax.precision.exact import at_least_f32
from lmjax.precision.policy import Accumulator, Operand, SitePolicy
from lmjax.precision.probes import Probe, Rounded, Slots, measure, report, report_cotangent
from lmjax.precision.quantizer import Quantizer
from lmjax.precision.rounding import quantize
from lmjax.precision.scaling import elements, fake_quantize

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
    x = _watched(x, site.activations, plan.x_axis, site, factors.get("x"), slots.get("x", {}))
    w = _watched(w, getattr(site, second), plan.w_axis, site, factors.get("w"), slots.get("w", {}))
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
    axis: int,
    site: SitePolicy,
    factor: jax.Array | None,
    slots: Mapping[str, Any],
) -> jax.Array:
    """An operand, cast to the compute format; measured before it is cast and quantized."""
    view = lambda: _view(x, factor, operand=operand, axis=axis, site=site)
    return report(site.to_compute(x), slots, view)


def _view(
    x: jax.Array, factor: jax.Array | None, *, operand: Operand | None, axis: int, site: SitePolicy
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
    """Quantizes both operands along the summed axis and multiplies; not yet rounded to compute."""
    plan = plan_of(spec)
    (x_role, of_x), (w_role, of_w) = roles
    x = _quantized(pair[0], of_x, plan.x_axis, _fold(key, 0), factors.get(x_role))
    w = _quantized(pair[1], of_w, plan.w_axis, _fold(key, 1), factors.get(w_role))
    if site.matmul == "tf32" and x.dtype == jnp.float32:
        x, w = quantize(x, "tf32"), quantize(w, "tf32")
    if site.accum.chunk:
        product = _chunked(plan, x, w, site.accum)
    else:
        product = _contract(spec, x, w, site)
        if site.accum.format.bits < 32:
            product = quantize(product, site.accum.format, overflow="native")
    if unit:
        terms = math.prod(x.shape[axis] for axis in plan.x_summed)
        product = product * jnp.asarray(terms**-0.5, product.dtype)
    return product


def _quantized(
    x: jax.Array, operand: Operand | None, axis: int, key: Key, factor: jax.Array | None
) -> jax.Array:
    if operand is None:
        return x
    stochastic = operand.rounding == "stochastic" and key is not None
    return fake_quantize(
        x,
        _current(operand.quantizer, factor),
        axis=axis,
        rounding="stochastic" if stochastic else "nearest_even",
        key=key if stochastic else None,
        scale=factor,
    )


def _current(quantizer: Quantizer, factor: jax.Array | None) -> Quantizer:
    """The quantizer, scaling by the tensor itself where it should be delayed but nobody knows."""
    return quantizer if factor is not None else replace(quantizer, history=0)


def _contract(spec: str, x: jax.Array, w: jax.Array, site: SitePolicy) -> jax.Array:
    """The sums of products in f32 (f64 for f64), not yet rounded.

    f32 operands are multiplied as f32: without `HIGHEST`, GPUs would use TF32 and TPUs bf16.
    """
    accumulate = at_least_f32(site.accum.format.dtype or jnp.float32)
    if x.dtype == jnp.float64:
        accumulate = x.dtype
    exact = x.dtype == at_least_f32(x.dtype) and site.matmul != "default"
    precision = jax.lax.Precision.HIGHEST if exact else jax.lax.Precision.DEFAULT
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
