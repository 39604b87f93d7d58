"""Sums products in f32, rounded to a narrow accumulator at the end or after every chunk.

Knows policies, backends, contractions, rounding and JAX.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp

from lmjax.precision.backend import this_backend
from lmjax.precision.contraction import Roles, contract, roles_of
from lmjax.precision.exact import at_least_f32
from lmjax.precision.policy import SUMMED_IN_F32, SitePolicy
from lmjax.precision.rounding import quantize
from lmjax.precision.settings import Accumulator


def sum_of_products(
    spec: str, x: jax.Array, w: jax.Array, site: SitePolicy, *, rounded: bool = False
) -> jax.Array:
    """The product in the accumulator of a site, held in f32 (f64 for f64).

    Args:
      spec: as `lmjax.precision.matmul.einsum` takes it.
      x: the first operand, as it is multiplied: elements or numbers of the compute format.
      w: the second.
      site: the accumulator, and the precision of products.
      rounded: whether the sums may be returned in the compute format, to which they are rounded
        next. They are on GPUs with `m=default`: faster, but where a kernel divides a sum, it may
        round the parts as well.
    """
    if site.matmul == "tf32" and x.dtype == jnp.float32:
        x, w = quantize(x, "tf32", overflow="clamp"), quantize(w, "tf32", overflow="clamp")
    if site.accum.chunk:
        return _chunked(roles_of(spec), x, w, site.accum)
    if rounded and _may_round_parts(x, w, site):
        default = jax.lax.Precision.DEFAULT
        return contract(spec, x, w, precision=default, accumulate=x.dtype)
    return rounded_sum(_contract(spec, x, w, site), site)


def _may_round_parts(x: jax.Array, w: jax.Array, site: SitePolicy) -> bool:
    """Whether a GPU may write a product out in its 16-bit compute format."""
    native = x.dtype == w.dtype == site.compute.dtype and x.dtype.itemsize == 2
    free = site.matmul == "default" and site.accum == SUMMED_IN_F32
    return native and free and this_backend().platform == "gpu"


def rounded_sum(total: jax.Array, site: SitePolicy) -> jax.Array:
    """A whole sum, rounded to a narrow accumulator."""
    narrow = site.accum.format.bits < 32
    return quantize(total, site.accum.format, overflow="fail") if narrow else total


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


def _chunked(plan: Roles, x: jax.Array, w: jax.Array, accum: Accumulator) -> jax.Array:
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
        return quantize(value, accum.format, overflow="fail")

    def add(total: jax.Array, chunk: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, None]:
        part = jnp.einsum("bmk,bkn->bmn", *chunk, precision=jax.lax.Precision.HIGHEST)
        return rounded(total + rounded(part)), None

    zero = jnp.zeros((x.shape[0], x.shape[1], w.shape[-1]), jnp.float32)
    total, _ = jax.lax.scan(add, zero, (jnp.moveaxis(x, 2, 0), jnp.moveaxis(w, 1, 0)))
    return jnp.transpose(total.reshape(*batch_shape, *x_shape, *w_shape), plan.y_order)
