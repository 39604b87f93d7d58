"""The matrix product of the model, with its own backward pass.

Every matrix product of lmjax goes through `einsum`. It fixes what plain `jnp.einsum` leaves open:
the format of both operands and of the accumulation, forwards and backwards. Under autodiff, a bf16
product with f32 accumulation would have f32 cotangents and so run its backward products in f32.

    forward    y   = round_c( sum_a( Qx(x) * Qw(w) ) )       (round_o at sites declared unrounded)
    backward   dx  = round_c( sum_a( Qg(g) * Qwb(w) ) )
               dw  = round_c( sum_a( Qxb(x) * Qg(g) ) )

with c the site's compute format, a its accumulator, g the cotangent of y, rounded to c, and Q
the quantizer of each operand; `wb` and `xb` are `w` and `x` unless a policy sets them, and the
second operand of a product of two activations has the quantizers of the first. Each product
quantizes its operands separately, because factors of channels and blocks follow its summed axes:
the terms of one sum are a channel, and blocks run along the last of those axes, so that none
crosses from one sequence into the next. Gradients pass straight through the quantizers.

A product with an operand `.rht` is *rotated*: before quantization, both operands go through the
same random Hadamard transform along the last summed axis (`hadamard.py`), in f32, and are rounded
to the compute format again. Without rounding this would have no effect; a product that sums over no
axis is not rotated. Rotated operands are scaled by their own maximum even if the policy says
delayed, because past maxima are not those of rotated tensors.

Factors are applied as in hardware. If all terms of a sum share them, elements are multiplied and
summed, and the f32 sum is multiplied by the factors:

    sum( Qx(x) * Qw(w) )  =  sx * sw * sum_a( ex * ew )

Elements of narrow formats fit the compute format exactly, so nothing is rounded between quantizing
and summing; if the backend multiplies them natively, they are passed to the dot in their own dtypes
(`native.py`). A narrow accumulator holds sums of elements: sums of e4m3 elements, up to 448, can
overflow f16 where sums of the operands themselves would not.

Factors that differ among the terms of a sum (blocks) and zero points are applied before the sum.
Such an operand is held in the compute format: exactly if factors are powers of two (MX) and the
policy has `c=bf16` or wider; otherwise `element * factor` is rounded once more. Where the backend
multiplies elements and factors of blocks itself (`block_scaled.py`), it is not.

Knows policies, quantizers, rotations, probes, sums, native products and JAX.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from lmjax.precision.asides import aside
from lmjax.precision.backend import this_backend
from lmjax.precision.block_scaled import Blocks, block_scaled_product
from lmjax.precision.contraction import (
    Roles,
    axes_of,
    beside_result,
    few_rows,
    is_one_cpu,
    not_before,
    roles_of,
)
from lmjax.precision.grouping import Axis
from lmjax.precision.hadamard import random_signs, rotate
from lmjax.precision.native import is_block_scaled, product_dtypes
from lmjax.precision.operands import Ready, current, ready_operand
from lmjax.precision.packed import Packed
from lmjax.precision.policy import NATIVE, SitePolicy
from lmjax.precision.probes import (
    Probe,
    Rounded,
    Slots,
    measure,
    report,
    report_cotangent,
    tap_cotangent,
)
from lmjax.precision.scaling import apply_factor, elements
from lmjax.precision.settings import Operand
from lmjax.precision.sites import Kind
from lmjax.precision.summation import rounded_sum, sum_of_products
from lmjax.precision.taps import handed_on

RandomKey = jax.Array | None
Factors = Mapping[str, jax.Array]


def einsum(
    spec: str,
    x: jax.Array,
    w: jax.Array | Packed,
    site: SitePolicy,
    *,
    key: RandomKey = None,
    probe: Probe | None = None,
    unit: bool = False,
) -> jax.Array:
    """Computes a product of two operands in the formats of a site.

    Args:
      spec: an `einsum` specification of two operands, `"btk,kn->btn"`. Every index of an operand
        must occur in the other operand or in the result, and no operand may repeat an index, so
        that the gradients are products of the same kind.
      x: activations, in any floating-point format; cast to the site's compute format.
      w: as x, or weights as they are stored; their elements are multiplied as they are if the site
        stores them as such, and else they are made an array first.
      site: the formats, of a site that is declared a product. Its kind tells whether `w` holds
        weights or activations, and so which of its quantizers `w` gets.
      key: random key for stochastic rounding of operands and for the signs of rotations; without
        one, as in evaluation, operands are rounded to nearest and signs are fixed.
      probe: factors of delayed scaling, without which operands are scaled by their own maximum; and
        slots for measurements of the operands and gradients.
      unit: divides each of the three products, y, dx and dw, by the root of the number of terms
        that it sums, in the format of the sum and so before it is rounded: unit scaling, which
        turns the gradients into multiples of themselves (see `model/unit_scaling.py`).

    Returns:
      The product, in the site's compute format; in its output format if it is declared unrounded.

    Raises:
      ValueError: for a specification whose gradient is not a product of two operands, and at a site
        that is not declared a product: a policy could not reach its operands.
    """
    _check(spec)
    if not site.site.is_product:
        raise ValueError(
            f"einsum '{spec}' at {site.path or site.site.name}, which is declared "
            f"{site.site.kind.value}; declare it a product in lmjax/precision/sites.py"
        )
    if isinstance(w, Packed) and site.stores != w.quantizer:
        w = w.dense()
    factors, slots = ({}, {}) if probe is None else probe
    roles = roles_of(spec)
    with site.scope:
        x = _watched("x", x, site.activations, roles.x_summed, site, probe)
        if isinstance(w, Packed):
            return _primal(spec, site, unit, x, w, key, factors)
        if "w" in slots or not _cast_again(site):
            w = _watched("w", w, site.second, roles.w_summed, site, probe)
        gradients = {role: slots[role] for role in ("dx", "dw") if role in slots}
        return _einsum(spec, site, unit, x, w, key, factors, gradients)


def second_operand(spec: str, w: Any, site: SitePolicy, probe: Probe | None = None) -> Any:
    """Casts and measures `w` as `einsum` does, which is then done for a product in parts."""
    if isinstance(w, Packed):
        return w
    with site.scope:
        return _watched("w", w, site.second, roles_of(spec).w_summed, site, probe)


def hand_on(y: jax.Array, site: SitePolicy, probe: Probe | None = None) -> jax.Array:
    """Returns the result of a product in the site's output format.

    Measures the result as `y`, its cotangent as it arrives as `dy`, and as `g` the same as the
    product dx quantizes it.
    """
    factors, slots = ({}, {}) if probe is None else probe
    block = _block(site.grads, site.backward_second)
    view = functools.partial(_view, operand=site.grads, axis=-1, site=site, block=block)
    with site.scope:
        rounded = site.to_output(y)
        output = report(rounded, slots.get("y", {}), lambda: Rounded(y, y, rounded, site.output))
        output = tap_cotangent(output, slots, "dy", site.output)
        return report_cotangent(output, slots.get("g", {}), view, factors.get("g"))


def _watched(
    role: str,
    x: jax.Array,
    operand: Operand | None,
    axis: Axis,
    site: SitePolicy,
    probe: Probe | None,
) -> jax.Array:
    """Casts an operand to the compute format; measures it before it is cast and quantized."""
    factors, slots = ({}, {}) if probe is None else probe
    block = _block(site.activations, site.second)
    view = functools.partial(_view, operand=operand, axis=axis, site=site, block=block)
    return report(site.to_compute(x), slots.get(role, {}), lambda: view(x, factors.get(role)))


def _view(
    x: jax.Array,
    factor: jax.Array | None,
    *,
    operand: Operand | None,
    axis: Axis,
    site: SitePolicy,
    block: int,
) -> Rounded:
    """Returns a tensor before and after quantization for a product.

    In a rotated product, that of the rotated tensor, with the signs of evaluation; `raw` is `x`.
    """
    entering = x
    if block and axis != ():
        last = axis if isinstance(axis, int) else axis[-1]
        entering, factor = rotate(site.to_compute(x), last, random_signs(block, None)), None
    if operand is None:
        return Rounded(x, entering, site.to_compute(entering), site.compute)
    scaled, values = elements(
        site.to_compute(entering), current(operand.quantizer, factor), axis=axis, scale=factor
    )
    return Rounded(x, scaled, values, operand.quantizer.format)


def _block(*operands: Operand | None) -> int:
    """The block in which the product of these operands is rotated; 0 if it is not."""
    return max(0 if operand is None else operand.rotation for operand in operands)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _einsum(
    spec: str,
    site: SitePolicy,
    unit: bool,
    x: jax.Array,
    w: jax.Array,
    key: RandomKey,
    factors: Factors,
    slots: Slots,
) -> jax.Array:
    return _primal(spec, site, unit, x, w, key, factors)


def _primal(
    spec: str,
    site: SitePolicy,
    unit: bool,
    x: jax.Array,
    w: jax.Array | Packed,
    key: RandomKey,
    factors: Factors,
) -> jax.Array:
    roles = ("x", site.activations), ("w", site.second)
    if not isinstance(w, Packed):
        w = site.to_compute(w)
    with jax.named_scope("y"):
        rounded = not site.site.unrounded
        wide = _product(spec, site, unit, (x, w), roles, _fold(key, 0), factors, rounded=rounded)
    return site.to_result(wide)


def _forward(
    spec: str,
    site: SitePolicy,
    unit: bool,
    x: jax.Array,
    w: jax.Array,
    key: RandomKey,
    factors: Factors,
    slots: Slots,
) -> tuple[jax.Array, tuple[jax.Array, jax.Array, RandomKey, Factors, Slots]]:
    # Not through `_einsum`: a policy of rematerialisation must see the dot to save its result.
    y = _primal(spec, site, unit, x, w, key, factors)
    return y, (x, w, key, factors, slots)


def _backward(
    spec: str,
    site: SitePolicy,
    unit: bool,
    saved: tuple[jax.Array, jax.Array, RandomKey, Factors, Slots],
    g: jax.Array,
) -> tuple[jax.Array, jax.Array, None, Factors, Slots]:
    x, stored, key, factors, slots = saved
    g = site.to_cotangent(g)
    if _cast_again(site):
        with aside("order"):
            stored = not_before(g, stored)
    w = site.to_compute(stored)
    x_axes, w_axes, y_axes = axes_of(spec)
    of_g, of_x = ("g", site.grads), ("x", site.backward_activations)
    of_w = ("w", site.backward_second)
    dx_spec, dw_spec = f"{y_axes},{w_axes}->{x_axes}", f"{x_axes},{y_axes}->{w_axes}"
    products = {"dx": (dx_spec, (g, w), (of_g, of_w)), "dw": (dw_spec, (x, g), (of_x, of_g))}
    wide = {}
    for index, (role, (own, pair, roles)) in enumerate(products.items(), start=1):
        with jax.named_scope(role):
            given = own, site, unit, pair, roles, _fold(key, index), factors
            wide[role] = _product(*given, rounded=role not in slots)  # else its sums are measured
    dx, dw = site.to_cotangent(wide["dx"]), site.to_cotangent(wide["dw"])
    rounded = {"dx": dx, "dw": dw}
    measured = {
        role: measure(asked, Rounded(wide[role], wide[role], rounded[role], site.compute))
        for role, asked in slots.items()
    }
    dx, dw = (handed_on(rounded[role], slots.get(role, {})) for role in ("dx", "dw"))
    return dx, dw.astype(stored.dtype), None, jax.tree.map(jnp.zeros_like, factors), measured


_einsum.defvjp(_forward, _backward)


def _cast_again(site: SitePolicy) -> bool:
    """Whether the backward pass keeps weights as they are stored, and casts them again.

    On one CPU, XLA would keep every weight twice from the forward pass to the backward pass: cast,
    or cut out of the weights of all blocks.
    """
    weights = site.site.kind is Kind.WEIGHT_PRODUCT
    return weights and site.compute.name in NATIVE and is_one_cpu()


def _product(
    spec: str,
    site: SitePolicy,
    unit: bool,
    pair: tuple[jax.Array, jax.Array | Packed],
    roles: tuple[tuple[str, Operand | None], tuple[str, Operand | None]],
    key: RandomKey,
    factors: Factors,
    *,
    rounded: bool,
) -> jax.Array:
    """The product of both quantized operands, not yet rounded to the compute format.

    `rounded` if the caller rounds it and reads nothing else of it, so that it may be rounded here.
    """
    plan = roles_of(spec)
    (x_role, of_x), (w_role, of_w) = roles
    lengths = tuple(pair[0].shape[axis] for axis in plan.x_summed)
    block = _block(of_x, of_w)
    first, second = pair
    if isinstance(second, Packed):
        factors = factors if second.inputs is None else {"x": second.inputs}
    elif block and plan.x_summed:
        first, second = _rotated((first, second), plan, site, random_signs(block, _fold(key, 2)))
        factors = {}
    blocks = is_block_scaled(this_backend(), site, of_x, of_w, lengths)
    ready = functools.partial(ready_operand, site=site, blocks=blocks)
    x = ready(x_role, first, of_x, plan.x_summed, _fold(key, 0), factors.get(x_role))
    w = ready(w_role, second, of_w, plan.w_summed, _fold(key, 1), factors.get(w_role))
    rounded &= not unit and of_x is of_w is None
    product = _sum(spec, x, w, site, of_x, of_w, math.prod(lengths), rounded)
    x_axes, w_axes, y_axes = axes_of(spec)
    for operand, axes, summed in ((x, x_axes, plan.x_summed), (w, w_axes, plan.w_summed)):
        if operand.late is not None:
            factor, quantizer = operand.late
            factor = beside_result(factor, axes, summed, y_axes)
            product = apply_factor(product, factor, quantizer)
    if unit:
        with aside("sum"):
            product = product * jnp.asarray(math.prod(lengths) ** -0.5, product.dtype)
    return product


def _sum(
    spec: str,
    x: Ready,
    w: Ready,
    site: SitePolicy,
    of_x: Operand | None,
    of_w: Operand | None,
    terms: int,
    rounded: bool,
) -> jax.Array:
    """The sums of products of both operands, without the factors that are still to come."""
    if x.factors is not None and w.factors is not None:
        total = block_scaled_product(spec, Blocks(x.values, x.factors), Blocks(w.values, w.factors))
        return rounded_sum(total, site)
    dtypes = product_dtypes(this_backend(), site, of_x, of_w, terms)
    x_dtype, w_dtype = dtypes or (x.values.dtype, x.values.dtype)
    elements = w.stored is not None and few_rows(spec, x.values.shape)
    second = w.values.astype(w.stored if elements else w_dtype)
    return sum_of_products(spec, x.values.astype(x_dtype), second, site, rounded=rounded)


def _rotated(
    pair: tuple[jax.Array, jax.Array], plan: Roles, site: SitePolicy, signs: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Rotates both operands along the last summed axis; returns them in the compute format."""
    x, w = pair
    rotated = rotate(x, plan.x_summed[-1], signs), rotate(w, plan.w_summed[-1], signs)
    return site.to_compute(rotated[0]), site.to_compute(rotated[1])


def _fold(key: RandomKey, index: int) -> RandomKey:
    return None if key is None else jax.random.fold_in(key, index)


@functools.cache
def _check(spec: str) -> None:
    x_axes, w_axes, y_axes = axes_of(spec)
    for own, others in ((x_axes, w_axes + y_axes), (w_axes, x_axes + y_axes)):
        if len(set(own)) != len(own) or not set(own) <= set(others):
            raise ValueError(
                f"einsum '{spec}': every index of an operand must occur once in it and again in "
                "the other operand or the result"
            )
