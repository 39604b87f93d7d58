"""Counts the floating-point operations of a compiled program, by source operation.

The usual conventions apply: a matrix product has two operations per multiplication, an elementwise
operation one per element of its result, a reduction one per element that it reads. Conversions,
comparisons and selections do not count. Loops count once per iteration.

Knows the format of HLO text, and numpy.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

import numpy as np

from lmjax.hlo.module import Computation, Instruction, executed, parse, shapes

_ROOTS: Final = ("power", "sqrt", "rsqrt", "cbrt")
_EXPONENTIALS: Final = ("exponential", "exponential-minus-one", "log", "log-plus-one")
_CURVES: Final = ("logistic", "erf", "tanh", "tan", "sine", "cosine", "atan2")
_PAIRS: Final = ("add", "subtract", "multiply", "divide", "remainder", "maximum", "minimum")
_ELEMENTWISE: Final = frozenset((*_PAIRS, *_ROOTS, *_EXPONENTIALS, *_CURVES))
_REDUCTIONS: Final = frozenset(
    ("reduce", "reduce-window", "scatter", "select-and-scatter", "all-reduce", "reduce-scatter")
)


@dataclass(frozen=True)
class Operation:
    """The floating-point arithmetic of one instruction.

    Attributes:
      op: its opcode, such as `dot`.
      dtype: HLO name of the dtype of its result.
      operands: element types of its operands.
      flops: total over all executions of the instruction.
      source: JAX's name of the operation that it was generated for; empty if there is none.
    """

    op: str
    dtype: str
    operands: tuple[str, ...]
    flops: float
    source: str


def operations(text: str) -> list[Operation]:
    """Returns every executed instruction with floating-point arithmetic.

    Args:
      text: text of a module.

    Raises:
      ValueError: the text has no entry computation, or a loop without a known trip count.
    """
    return [
        operation
        for running, times, _ in executed(parse(text))
        for one in running.values()
        for operation in _operation(one, running, times)
    ]


def _operation(one: Instruction, running: Computation, times: int) -> Iterator[Operation]:
    flops = flops_of(one, running)
    results = shapes(one.type)
    if not flops or not results or not _is_float(results[0][0]):
        return
    operands = tuple(
        dtype for name in one.operands if name in running for dtype, _ in shapes(running[name].type)
    )
    yield Operation(one.op, results[0][0], operands, flops * times, one.source)


def flops_of(one: Instruction, running: Computation) -> float:
    """Floating-point operations of a single run of an instruction; 0 of a custom call."""
    results = shapes(one.type)
    size = sum(math.prod(shape) for _, shape in results)
    op = one.op.removesuffix("-start")
    if op in _ELEMENTWISE:
        return size
    if op == "dot":
        contracted = one.attribute("lhs_contracting_dims") or "{}"
        ((_, lhs),) = shapes(running[one.operands[0]].type)
        return 2 * size * math.prod(lhs[int(axis)] for axis in re.findall(r"\d+", contracted))
    if op == "convolution":
        return 2 * _multiplications_of_convolution(one, running)
    if op == "scatter":
        return sum(math.prod(s) for _, s in shapes(running[one.operands[-1]].type))
    if op in _REDUCTIONS:
        read = one.operands[: max(len(one.operands) // 2, 1)]
        return sum(math.prod(s) for name in read for _, s in shapes(running[name].type))
    return 0


def _multiplications_of_convolution(one: Instruction, running: Computation) -> int:
    """Without those of padding and of holes; TPUs' batched products are dilated convolutions."""
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", one.rest)
    if labels is None:
        raise ValueError(f"the program does not say how the convolution {one.name} is laid out")
    types = [running[name].type for name in one.operands[:2]] + [one.type]
    x, kernel, result = (
        dict(zip(names, shapes(type_)[0][1], strict=True))
        for names, type_ in zip(labels.groups(), types, strict=True)
    )
    count = result["b"] * result["f"] * kernel["i"]
    for place, axis in enumerate(sorted(name for name in kernel if name.isdigit())):
        window = lambda key, default, at=place: _of_window(one, key, at, default)
        first = int(window("pad", "0_0").partition("_")[0])
        starts = np.arange(result[axis]) * int(window("stride", "1")) - first
        reached = starts[:, None] + np.arange(kernel[axis]) * int(window("rhs_dilate", "1"))
        holes = int(window("lhs_dilate", "1"))
        count *= np.sum((reached % holes == 0) & (reached >= 0) & (reached < holes * x[axis]))
    return int(count)


def _of_window(one: Instruction, key: str, place: int, default: str) -> str:
    found = re.search(rf"window=\{{[^}}]*\b{key}=([-\w]+)", one.rest)
    return found[1].split("x")[place] if found else default


def _is_float(dtype: str) -> bool:
    return dtype.startswith(("f", "bf"))
