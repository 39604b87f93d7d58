"""Decides which products run natively in narrow formats and which are emulated.

A product is *native* if both operands are passed to the dot in the dtypes of their elements:

    Nvidia GPUs of compute capability 8.9 and above    e4m3 x e4m3, e4m3 x e5m2, e5m2 x e4m3 -> f32
    Nvidia GPUs of compute capability 10               the same in MX blocks of 32, and e2m1 x e2m1
                                                       in NVFP4 blocks of 16 -> f32
    GPUs and TPUs                                      int8 x int8 -> int32

Otherwise the same elements are multiplied in a wider format that holds them all, which is exact
except for the order of the f32 sum. An operand with zero points, or with factors that differ among
the terms of a sum (blocks), is multiplied by its factors first, and so is emulated in the compute
format. In the native form of blocks (`block_scaled.py`) they must be whole.

Native describes the input of XLA. Only the compiled program shows whether XLA has a kernel
(`python -m lmjax plan --target`): fp8 products that cuBLASLt does not support are widened again.
The native forms were compiled for H100 and B200, and compared with the emulation on CPUs, where XLA
widens fp8. Those of fp8 ran on an H200, in cuBLASLt's kernels; blocks and integers have not been
run on a GPU or TPU. Nvidia's tensor cores are known to keep fewer bits of fp8 sums than f32 has
(DeepSeek-V3 technical report, arXiv 2412.19437, section 3.3.2).

Knows formats, policies, contractions and JAX.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any, Final, NamedTuple

import ml_dtypes
import numpy as np

from lmjax.precision.backend import Backend, this_backend
from lmjax.precision.contraction import widened
from lmjax.precision.formats import Format, parse_format
from lmjax.precision.policy import SitePolicy, carrier
from lmjax.precision.quantizer import E4M3, E8M0
from lmjax.precision.settings import Operand

Dtypes = tuple[np.dtype[Any], np.dtype[Any]]

_E4M3: Final = np.dtype(ml_dtypes.float8_e4m3fn)
_E5M2: Final = np.dtype(ml_dtypes.float8_e5m2)
_INT8: Final = np.dtype(np.int8)

_FP8_CAPABILITY: Final = (8, 9)
_BLOCKS_CAPABILITY: Final = 10
"""Major number alone: cuDNN has these kernels for data-center Blackwell."""

_FP8_PAIRS: Final = ((_E4M3, _E4M3), (_E4M3, _E5M2), (_E5M2, _E4M3))
_BLOCK_PAIRS: Final = {
    (E8M0, 32): _FP8_PAIRS,
    (E4M3, 16): ((np.dtype(ml_dtypes.float4_e2m1fn),) * 2,),
}
"""Elements that are multiplied in blocks, by format of the factors and length of a block."""

# No sum of this many products of int8, -128 times itself included, leaves int32.
_INT32_TERMS: Final = (2**31 - 1) // 2**14
# The f32 sum of 2**31 products of elements below this is finite.
_LARGEST_ELEMENT: Final = 2.0**48


def native_dtypes(backend: Backend, x: Format, w: Format, terms: int) -> Dtypes | None:
    """Returns the dtypes in which a backend multiplies elements of two narrow formats, or None.

    Args:
      backend: the backend.
      x: format of the elements of the first operand.
      w: format of the elements of the second.
      terms: length of the sums.
    """
    pair = _holder(x), _holder(w)
    if pair == (_INT8, _INT8):
        fits = backend.platform in ("gpu", "tpu") and terms <= _INT32_TERMS
    else:
        fits = backend.capability >= _FP8_CAPABILITY and pair in _FP8_PAIRS
    return (pair[0], pair[1]) if fits and pair[0] and pair[1] else None


def _holder(elements: Format) -> np.dtype[Any] | None:
    """The narrow dtype of elements, if there is hardware that may multiply it."""
    if elements.is_integer:
        return _INT8 if elements.bits <= 8 and elements.smallest_subnormal == 1 else None
    return elements.dtype if elements.dtype in (_E4M3, _E5M2) else None


def multiplies_elements(operand: Operand, compute: Format) -> bool:
    """Whether an operand's elements are multiplied and its factors applied to the sum.

    This requires that all terms of a sum share the factors, that the carrier of the compute format
    holds every element, and that no f32 sum of products can overflow.
    """
    quantizer = operand.quantizer
    shared = quantizer.groups != "block" and not quantizer.affine
    small = quantizer.groups == "none" or quantizer.format.largest_finite <= _LARGEST_ELEMENT
    return shared and small and _carrier(compute).contains(quantizer.format)


def multiplied(operand: Operand | None, compute: Format) -> Format:
    """The format of an operand's numbers as they enter a product.

    That of its elements, or else of the compute format's carrier; without a quantizer, the compute
    format itself.
    """
    if operand is None:
        return compute
    elements = multiplies_elements(operand, compute)
    return operand.quantizer.format if elements else _carrier(compute)


def product_dtypes(
    backend: Backend, site: SitePolicy, x: Operand | None, w: Operand | None, terms: int
) -> Dtypes | None:
    """Returns the dtypes in which a product of a site is native on a backend, or None.

    Args:
      backend: the backend.
      site: the formats.
      x: quantization of the first operand.
      w: quantization of the second.
      terms: length of the sums.
    """
    wide = site.compute.bits > 32 or site.accum.format.bits > 32
    if wide or site.accum.chunk or not (_shows_nan(x) and _shows_nan(w)):
        return None
    return native_dtypes(backend, multiplied(x, site.compute), multiplied(w, site.compute), terms)


def is_block_scaled(
    backend: Backend,
    site: SitePolicy,
    x: Operand | None,
    w: Operand | None,
    lengths: tuple[int, ...],
) -> bool:
    """Whether a product of a site is one block-scaled product on a backend.

    Args:
      backend: the backend.
      site: the formats.
      x: quantization of the first operand.
      w: quantization of the second.
      lengths: of the axes that are summed over; blocks run along the last one.
    """
    if x is None or w is None or not lengths or backend.capability[0] != _BLOCKS_CAPABILITY:
        return False
    blocks = {(one.quantizer.scale, one.quantizer.block) for one in (x, w)}
    if len(blocks) > 1 or site.compute.bits > 32 or site.accum.format.bits > 32:
        return False
    (kind,) = blocks
    pair = x.quantizer.format.dtype, w.quantizer.format.dtype
    whole = kind in _BLOCK_PAIRS and lengths[-1] % kind[1] == 0
    return whole and pair in _BLOCK_PAIRS[kind] and not site.accum.chunk


def _shows_nan(operand: Operand | None) -> bool:
    """Whether a NaN survives in elements or factor. Integers have none, so the factor must."""
    if operand is None or not operand.quantizer.format.is_integer:
        return True
    return operand.quantizer.groups != "none" and not operand.quantizer.history


def _carrier(compute: Format) -> Format:
    return parse_format(np.dtype(carrier(compute)).name)


# --- in words


class Arithmetic(NamedTuple):
    """A readable description of how one product is computed.

    Attributes:
      operands: formats of both operands in the policy.
      native: whether they are multiplied in those formats.
      multiplied: name of the format in which they are multiplied otherwise.
    """

    operands: tuple[str, str]
    native: bool
    multiplied: str

    def __str__(self) -> str:
        return "native" if self.native else f"emulated in {self.multiplied}"


class Sums(NamedTuple):
    """Lengths of the axes that the product of a site and its gradients sum over, blocks last."""

    y: tuple[int, ...]
    dx: tuple[int, ...]
    dw: tuple[int, ...]


def products(
    sites: Mapping[str, SitePolicy], sums: Mapping[str, Sums], backend: Backend | None = None
) -> dict[str, dict[str, Arithmetic]]:
    """Describes how each product site computes its product `y` and gradients `dx` and `dw`.

    Args:
      sites: formats by path.
      sums: what the products of a micro-batch on all devices sum over, by path.
      backend: the current one by default.
    """
    backend = backend or this_backend()
    return {
        path: _of_site(site, sums[path], backend)
        for path, site in sites.items()
        if site.site.is_product
    }


def _of_site(site: SitePolicy, sums: Sums, backend: Backend) -> dict[str, Arithmetic]:
    x, xb, g = site.activations, site.backward_activations, site.grads
    w, wb = site.second, site.backward_second
    pairs = {"y": (x, w), "dx": (g, wb), "dw": (xb, g)}
    return {
        name: _arithmetic(backend, site, *pair, getattr(sums, name)) for name, pair in pairs.items()
    }


def _arithmetic(
    backend: Backend,
    site: SitePolicy,
    x: Operand | None,
    w: Operand | None,
    lengths: tuple[int, ...],
) -> Arithmetic:
    rounded = "tf32" if site.matmul == "tf32" and site.compute.name == "f32" else site.compute.name
    x_name, w_name = (rounded if o is None else str(o.quantizer) for o in (x, w))
    held = _carrier(site.compute)
    wide = bool(site.accum.chunk) or widened(backend.platform, held.dtype)
    plain = x is None and w is None and rounded == held.name and not wide
    dtypes = product_dtypes(backend, site, x, w, math.prod(lengths))
    native = plain or dtypes is not None or is_block_scaled(backend, site, x, w, lengths)
    return Arithmetic((x_name, w_name), native, "f32" if wide else held.name)


def in_words(arithmetic: Mapping[str, Arithmetic]) -> str:
    """The products of one site in a few words: `native`, `y native, dx emulated in bf16, ...`."""
    words = {name: str(product) for name, product in arithmetic.items()}
    if len(set(words.values())) == 1:
        return words["y"]
    return ", ".join(f"{name} {word}" for name, word in words.items())


def summary(arithmetic: Iterable[Mapping[str, Arithmetic]]) -> dict[str, list[str]]:
    """The kinds of products there are: `{"native": ["e4m3@tensor x e5m2@tensor"], ...}`."""
    kinds = dict.fromkeys(product for site in arithmetic for product in site.values())
    name = lambda product: " x ".join(product.operands)
    return {
        "native": [name(product) for product in kinds if product.native],
        "emulated": [
            f"{name(product)} in {product.multiplied}" for product in kinds if not product.native
        ],
    }
