"""Decides which products run natively in narrow formats and which are emulated.

A product is *native* if both operands are passed to the dot in the dtypes of their elements:

    Nvidia GPUs of compute capability 8.9 and above    e4m3 x e4m3, e4m3 x e5m2, e5m2 x e4m3 -> f32
    GPUs and TPUs                                      int8 x int8 -> int32

Otherwise the same elements are multiplied in a wider format that holds them all, which is exact
except for the order of the f32 sum. An operand with zero points, or with factors that differ among
the terms of a sum (blocks), is multiplied by its factors first, and so is emulated in the compute
format.

Native describes the input of XLA. Only the compiled program shows whether XLA has a kernel: fp8
products that cuBLASLt does not support are widened again. The native forms were compared with the
emulation on CPUs, where XLA widens fp8; they have not been run on a GPU or TPU. Nvidia's tensor
cores are known to keep fewer bits of fp8 sums than f32 has (DeepSeek-V3 technical report, arXiv
2412.19437, section 3.3.2).

Knows formats, policies, contractions and JAX.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any, Final, NamedTuple

import jax
import ml_dtypes
import numpy as np

from lmjax.precision.contraction import platform, widened
from lmjax.precision.formats import Format, parse_format
from lmjax.precision.policy import SitePolicy, carrier
from lmjax.precision.settings import Operand

Dtypes = tuple[np.dtype[Any], np.dtype[Any]]

_E4M3: Final = np.dtype(ml_dtypes.float8_e4m3fn)
_E5M2: Final = np.dtype(ml_dtypes.float8_e5m2)
_INT8: Final = np.dtype(np.int8)

_FP8_CAPABILITY: Final = (8, 9)
# No sum of this many products of int8, -128 times itself included, leaves int32.
_INT32_TERMS: Final = (2**31 - 1) // 2**14
# The f32 sum of 2**31 products of elements below this is finite.
_LARGEST_ELEMENT: Final = 2.0**48


class Backend(NamedTuple):
    """The properties of a backend that decide which products are native.

    Attributes:
      platform: JAX name of the platform: `cpu`, `gpu`, `tpu`.
      capability: compute capability of an Nvidia GPU; zeros otherwise.
    """

    platform: str
    capability: tuple[int, int] = (0, 0)


def this_backend() -> Backend:
    """Returns the current backend, or the one being planned for."""
    capability = re.fullmatch(
        r"(\d+)\.(\d+)", str(getattr(jax.devices()[0], "compute_capability", ""))
    )
    version = (int(capability[1]), int(capability[2])) if capability else (0, 0)
    return Backend(platform(), version)


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
        fits = (
            backend.capability >= _FP8_CAPABILITY
            and set(pair) <= {_E4M3, _E5M2}
            and pair != (_E5M2, _E5M2)
        )
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


def products(
    sites: Mapping[str, SitePolicy], tokens: int, backend: Backend | None = None
) -> dict[str, dict[str, Arithmetic]]:
    """Describes how each product site computes its product `y` and gradients `dx` and `dw`.

    Args:
      sites: formats by path.
      tokens: tokens of a micro-batch on all devices, over which weight gradients are summed. Sums
        over a width of the model are assumed to be short enough for int32.
      backend: the current one by default.
    """
    backend = backend or this_backend()
    return {
        path: _of_site(site, tokens, backend)
        for path, site in sites.items()
        if site.site.is_product
    }


def _of_site(site: SitePolicy, tokens: int, backend: Backend) -> dict[str, Arithmetic]:
    x, xb, g = site.activations, site.backward_activations, site.grads
    w, wb = site.second, site.backward_second
    return {
        "y": _arithmetic(backend, site, x, w, 1),
        "dx": _arithmetic(backend, site, g, wb, 1),
        "dw": _arithmetic(backend, site, xb, g, tokens),
    }


def _arithmetic(
    backend: Backend, site: SitePolicy, x: Operand | None, w: Operand | None, terms: int
) -> Arithmetic:
    rounded = "tf32" if site.matmul == "tf32" and site.compute.name == "f32" else site.compute.name
    x_name, w_name = (rounded if o is None else str(o.quantizer) for o in (x, w))
    held = _carrier(site.compute)
    wide = bool(site.accum.chunk) or widened(backend.platform, held.dtype)
    plain = x is None and w is None and rounded == held.name and not wide
    native = plain or product_dtypes(backend, site, x, w, terms) is not None
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
