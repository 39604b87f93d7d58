"""The one dot product of the whole model, with its own backward pass.

Every matrix product of lmjax goes through `einsum`. It says three things that plain `jnp.einsum`
leaves to chance: the format of both operands, the format products are accumulated in, and the same
two for the gradients. Left to autodiff, a bf16 product with f32 accumulation has f32 cotangents and
so runs its backward products in f32.

    forward    y   = round_c( sum_acc( round_c(x) * round_c(w) ) )
    backward   dx  = round_c( sum_acc( g * round_c(w) ) )
               dw  = round_c( sum_acc( round_c(x) * g ) )

with c the site's compute format, acc the accumulator and g the cotangent of y, which arrives in c.

Knows policies and JAX.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from lmjax.precision.exact import at_least_f32
from lmjax.precision.policy import SitePolicy


def einsum(spec: str, x: jax.Array, w: jax.Array, site: SitePolicy) -> jax.Array:
    """A product of two operands in the formats of a site.

    Args:
      spec: an `einsum` specification of two operands, `"btk,kn->btn"`. Every index of an operand
        must stand in the other operand or in the result, and no operand may repeat one, so that
        the gradients are products of the same kind.
      x: any floating-point format; cast to the site's compute format.
      w: as x.
      site: the formats.

    Returns:
      The product, in the site's compute format.

    Raises:
      ValueError: for a specification whose gradient is not a product of two operands.
    """
    _check(spec)
    return _einsum(spec, site.to_compute(x), site.to_compute(w))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _einsum(spec: str, x: jax.Array, w: jax.Array) -> jax.Array:
    return _contract(spec, x, w)


def _forward(
    spec: str, x: jax.Array, w: jax.Array
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return _contract(spec, x, w), (x, w)


def _backward(
    spec: str, operands: tuple[jax.Array, jax.Array], g: jax.Array
) -> tuple[jax.Array, jax.Array]:
    x, w = operands
    x_axes, w_axes, y_axes = _axes(spec)
    dx = _contract(f"{y_axes},{w_axes}->{x_axes}", g, w)
    dw = _contract(f"{x_axes},{y_axes}->{w_axes}", x, g)
    return dx, dw


_einsum.defvjp(_forward, _backward)


def _contract(spec: str, x: jax.Array, w: jax.Array) -> jax.Array:
    """One product: operands as they come, wide accumulation, one rounding to the operands' format.

    f32 operands are multiplied as f32: without `HIGHEST`, GPUs would use TF32 and TPUs bf16.
    """
    accumulate = at_least_f32(x.dtype)
    wide = x.dtype == accumulate
    precision = jax.lax.Precision.HIGHEST if wide else jax.lax.Precision.DEFAULT
    product = jnp.einsum(spec, x, w, precision=precision, preferred_element_type=accumulate)
    return product.astype(x.dtype)


def _axes(spec: str) -> tuple[str, str, str]:
    operands, _, y_axes = spec.partition("->")
    x_axes, _, w_axes = operands.partition(",")
    return x_axes, w_axes, y_axes


@functools.cache
def _check(spec: str) -> None:
    x_axes, w_axes, y_axes = _axes(spec)
    for own, others in ((x_axes, w_axes + y_axes), (w_axes, x_axes + y_axes)):
        if len(set(own)) != len(own) or not set(own) <= set(others):
            raise ValueError(
                f"einsum '{spec}': every index of an operand must stand once in it and again in "
                "the other operand or the result"
            )
