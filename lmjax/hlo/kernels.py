"""Names the kernels of a compiled program, and its products by the dtypes that they multiply.

XLA compiles most of a program itself. A product or an attention may instead be a call of a library
(cuBLASLt, cuDNN), a kernel written in Pallas (Mosaic, Triton), or a fusion that XLA hands to
Triton. On TPUs, products are convolutions in HLO; cuBLASLt and cuDNN take theirs as custom calls.

Knows only the format of HLO text.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from dataclasses import dataclass
from typing import Final

from lmjax.hlo.module import Computation, Instruction, elements, executed, parse, shapes
from lmjax.hlo.operations import flops_of

_LIBRARIES: Final = (
    (r"__cublas\$lt\$(\w+).*", "cuBLASLt"),
    (r"__cublas\$(\w+).*", "cuBLAS"),
    (r"__cudnn\$(\w+).*", "cuDNN"),
    (r"__cub\$(\w+)", "CUB"),
    (r"__triton_?(\w*)|triton_kernel_call|__gpu\$xla\.gpu\.(triton)", "Triton"),
    (r"mosaic_gpu.*|tpu_custom_call", "Mosaic"),
)
"""Patterns of the targets of custom calls and of the kinds of fusions, and whose kernel it is."""

_ATTENTION: Final = ("fmha", "flash", "splash")


@dataclass(frozen=True)
class Kernel:
    """A kernel that XLA did not generate itself.

    Attributes:
      library: cuBLASLt, cuBLAS, cuDNN, CUB, Triton or Mosaic; `XLA` for other custom calls, most of
        which are annotations.
      name: what the program calls it.
      count: executions in a step.
      attention: whether it computes attention without writing all scores.
    """

    library: str
    name: str
    count: int
    attention: bool


@dataclass(frozen=True)
class Product:
    """A matrix product.

    Attributes:
      operands: HLO names of the dtypes of both operands, as they are multiplied.
      summed: that of the result: of the sum, if nothing is fused to it.
      precision: asked for products of f32 operands: `highest`, or empty.
      library: what multiplies: that of a kernel, or `XLA`.
      count: executions in a step.
      flops: of all executions, two for each multiplication.
      source: JAX's name of the operation that it was generated for; empty if there is none.
    """

    operands: tuple[str, ...]
    summed: str
    precision: str
    library: str
    count: int
    flops: float
    source: str


def kernels(text: str) -> list[Kernel]:
    """The kernels of a program that are calls of libraries or handed to Triton, by library.

    Args:
      text: text of a compiled module.

    Raises:
      ValueError: the text has no entry computation, or a loop without a known trip count.
    """
    found: Counter[tuple[str, str, bool]] = Counter()
    for running, times, _ in executed(parse(text)):
        for one in running.values():
            named = _kernel(one)
            if named is not None:
                words = f"{named[1]} {one.source}".lower()
                attention = any(word in words for word in _ATTENTION)
                found[(*named, attention)] += times
    listed = (Kernel(library, name, n, flash) for (library, name, flash), n in found.items())
    return sorted(listed, key=lambda kernel: (kernel.library == "XLA", kernel.library, kernel.name))


def products(text: str) -> list[Product]:
    """The matrix products of a program, except those inside kernels of attention.

    Arguments and errors are those of `kernels`.
    """
    found = []
    for running, times, fusion in executed(parse(text)):
        outside = _kernel(fusion) if fusion else None
        for one in running.values():
            product = _product(one, running, times, outside[0] if outside else "XLA")
            if product is not None:
                found.append(product)
    return found


def _kernel(one: Instruction) -> tuple[str, str] | None:
    """Library and name of the kernel that an instruction calls, if it is one."""
    if one.op not in ("custom-call", "fusion"):
        return None
    called = one.op == "custom-call"
    target = one.quoted("custom_call_target" if called else "kind")
    for pattern, library in _LIBRARIES:
        found = re.fullmatch(pattern, target)
        if found:
            name = next((group for group in found.groups() if group), "")
            # A kernel written in Pallas names its instruction.
            return library, name or re.sub(r"[.\d]+$", "", one.name) if called else name or "fusion"
    return ("XLA", target) if called else None


def _product(one: Instruction, running: Computation, times: int, library: str) -> Product | None:
    if one.op in ("dot", "convolution"):
        flops = flops_of(one, running)
    elif one.op == "custom-call":
        library, name = _kernel(one) or ("", "")
        if name not in ("matmul", "gemm", "blockScaledDot"):
            return None
        flops = 2 * elements(one.type.partition("}")[0]) * _terms(one, running)
    else:
        return None
    operands = (shapes(running[operand].type) for operand in one.operands[:2])
    asked = re.search(r"operand_precision=\{(\w+)", one.rest)
    return Product(
        operands=tuple(found[0][0] for found in operands),
        summed=shapes(one.type)[0][0],
        precision=asked[1] if asked else "",
        library=library,
        count=times,
        flops=flops * times,
        source=one.source,
    )


def _terms(one: Instruction, running: Computation) -> int:
    """How many products each element of the result of a custom call sums."""
    ((_, first),) = shapes(running[one.operands[0]].type)
    axes = re.search(r'"lhs_contracting_dimensions":\[([^\]]*)\]', one.rest)
    contracted = re.findall(r"\d+", axes[1]) if axes else [len(first) - 1]
    return math.prod(first[int(axis)] for axis in contracted)
