"""Operands of products: quantized, or read as they are stored, and ready to be multiplied.

Knows policies, quantizers, native products and JAX.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax

from lmjax.precision.native import multiplies_elements
from lmjax.precision.packed import Packed
from lmjax.precision.policy import SitePolicy
from lmjax.precision.quantizer import Quantizer
from lmjax.precision.rounding import Rounding, quantize
from lmjax.precision.scaling import (
    Factors,
    Quantized,
    dequantize,
    fake_quantize,
    quantize_with_scale,
)
from lmjax.precision.settings import Operand
from lmjax.precision.stored import holder

RandomKey = jax.Array | None


class Ready(NamedTuple):
    """An operand as it is multiplied.

    Attributes:
      values: of its shape and dtype; elements that were stored are f32 and still to be cast.
      late: what the sum is still to be multiplied by, and the quantizer that this is a factor of:
        f32[], or f32 of the operand's shape, but with length 1 at the summed axes.
      factors: of the blocks of a block-scaled product.
      stored: of a weight whose elements are stored as such, a dtype that holds them; else None.
    """

    values: jax.Array
    late: tuple[jax.Array, Quantizer] | None = None
    factors: jax.Array | None = None
    stored: Any = None


def ready_operand(
    role: str,
    x: jax.Array | Packed,
    operand: Operand | None,
    summed: tuple[int, ...],
    key: RandomKey,
    factor: jax.Array | None,
    *,
    site: SitePolicy,
    blocks: bool,
) -> Ready:
    """Quantizes an operand of a product.

    Args:
      role: `x`, `w` or `g`.
      x: the operand, in the compute format or as it is stored.
      operand: how it is quantized; None leaves it.
      summed: axes that the product sums over.
      key: random key for stochastic rounding; without one, to nearest.
      factor: a factor found before, for delayed and static ones.
      site: the formats.
      blocks: whether elements and the factors of blocks go into the product as they are.
    """
    if isinstance(x, Packed):
        return _ready_packed(x, operand, site, blocks)
    if operand is None:
        return Ready(x)
    stochastic = operand.rounding == "stochastic" and key is not None
    if operand.kept == "static" and factor is not None:
        return _ready_static(x, operand.quantizer, factor, site)
    factor = factor if operand.quantizer.history else None
    quantizer = current(operand.quantizer, factor)
    rounding: Rounding = "stochastic" if stochastic else "nearest_even"
    key = key if stochastic else None
    if quantizer.groups == "none":
        overflow = site.cotangents if role == "g" else "clamp"
        return Ready(quantize(x, quantizer.format, rounding, key, overflow))
    how: dict[str, Any] = {"axis": summed, "rounding": rounding, "key": key, "scale": factor}
    if not blocks and not multiplies_elements(operand, site.compute):
        return Ready(fake_quantize(x, quantizer, **how))
    quantized = quantize_with_scale(x, quantizer, **how)
    return _with_factors(quantized, quantizer, x.dtype, blocks)


def _with_factors(quantized: Quantized, quantizer: Quantizer, dtype: Any, blocks: bool) -> Ready:
    """Elements to be multiplied in a dtype, or with the factors of their blocks in their own."""
    if not blocks:
        return Ready(quantized.values.astype(dtype), (quantized.factor, quantizer))
    late = None if quantized.tensor_scale is None else (quantized.tensor_scale, quantizer)
    factors = quantized.scale.astype(quantizer.scale.dtype)
    return Ready(quantized.values.astype(quantizer.format.dtype), late, factors)


def _ready_static(x: jax.Array, quantizer: Quantizer, factor: jax.Array, site: SitePolicy) -> Ready:
    """Activations under a factor that was found before; what exceeds it is clamped."""
    quantized = quantize_with_scale(x, quantizer, factors=Factors(factor))
    if not multiplies_elements(Operand(quantizer), site.compute):
        return Ready(dequantize(quantized, quantizer, dtype=x.dtype))
    return _with_factors(quantized, quantizer, x.dtype, blocks=False)


def _ready_packed(w: Packed, operand: Operand | None, site: SitePolicy, blocks: bool) -> Ready:
    """Weights as they are stored, which were rounded once."""
    if operand is None or not (blocks or multiplies_elements(operand, site.compute)):
        return Ready(site.to_compute(w.dense()))
    elements = w.quantized
    ready = _with_factors(elements, w.quantizer, elements.values.dtype, blocks)
    return ready if blocks else ready._replace(stored=holder(w.quantizer.format))


def current(quantizer: Quantizer, factor: jax.Array | None) -> Quantizer:
    """The quantizer; a delayed one without a factor scales by the tensor itself instead."""
    if factor is not None:
        return quantizer
    return quantizer.of_the_tensor
