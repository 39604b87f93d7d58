"""What a program does with numbers: one `Fact` for each operation, traced or compiled.

Formats have the names that policies give them, whatever JAX or XLA calls their dtypes.

Knows formats, and how JAX and XLA name dtypes and operations.
"""

from __future__ import annotations

import enum
import functools
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import numpy as np

from lmjax.hlo.module import word_set
from lmjax.hlo.scopes import Scope
from lmjax.precision.asides import ASIDES, rounding_named
from lmjax.precision.formats import Format, parse_format

ROLES: Final = ("y", "dx", "dw")
"""Scopes of the three products of a site."""


class OperationKind(enum.Enum):
    """What an operation is, as far as its precision is concerned."""

    PRODUCT = "product"
    SUM = "sum"
    EXPONENTIAL = "exponential"
    ARITHMETIC = "arithmetic"
    CAST = "cast"
    KERNEL = "kernel"


@dataclass(frozen=True)
class Fact:
    """One operation.

    Attributes:
      kind: what it is.
      name: JAX's or XLA's name of it.
      scope: its site or part of a step; None: no scope names it.
      words: the names of scopes inside that one, outermost first.
      operands: formats of its floating-point operands.
      result: format of its result.
      shape: of its result.
      precision: what a product asks of its f32 operands, in XLA's words; empty: nothing.
      flops: floating-point operations, over all executions of a step.
      key: what pairs an operation of a compiled program with the traced one it was made for.
      weak: whether it converts an array of a weak type, which follows whatever it meets.
      makers: paths of the sites or parts that made the operands of a compiled product.
      origin: JAX's record of the Python lines that made it; None in compiled programs.
    """

    kind: OperationKind
    name: str
    scope: Scope | None
    words: tuple[str, ...]
    operands: tuple[str, ...]
    result: str
    shape: tuple[int, ...] = ()
    precision: str = ""
    flops: float = 0.0
    key: str = ""
    weak: bool = False
    makers: frozenset[str] = frozenset()
    origin: Any = field(default=None, compare=False, repr=False)

    @property
    def role(self) -> str:
        """`y`, `dx` or `dw`: which product of its site it belongs to; empty: none."""
        return next((word for word in self.words if word in ROLES), "")

    @property
    def aside(self) -> str:
        """Which of `ASIDES` it belongs to; empty: none."""
        return next((word for word in self.words if word in ASIDES), "")

    @property
    def rounding(self) -> str:
        """What it rounds to, as a policy writes it: `e4m3@tensor`; empty: it is not a rounding."""
        return rounding_of(self.words)

    @property
    def where(self) -> str:
        """File and line of the innermost call outside of JAX; empty if unknown."""
        frames = getattr(getattr(self.origin, "traceback", None), "frames", ())
        for frame in frames:
            if not re.search(r"/(jax|flax|optax|contextlib|functools)[/.]", frame.file_name):
                return f"{Path(frame.file_name).name}:{frame.line_num}"
        return ""


def rounding_of(words: tuple[str, ...]) -> str:
    """The format or quantizer of the outermost rounding among nested scopes."""
    return next(filter(None, map(rounding_named, words)), "")


_XLA_FLOATS: Final = {"f8": "float8_", "f4": "float4_", "f6": "float6_"}


@functools.cache
def format_name(dtype: str) -> str:
    """A dtype's name as policies write it: `float32` and `f32` are `f32`, `f8e4m3fn` is `e4m3`.

    Dtypes that are not of real numbers keep their names.
    """
    for prefix, long in _XLA_FLOATS.items():
        if dtype.startswith(prefix) and len(dtype) > len(prefix):
            dtype = long + dtype.removeprefix(prefix)
    try:
        return parse_format(dtype).name
    except ValueError:
        return dtype


@functools.cache
def format_of(name: str) -> Format | None:
    """The format of a name; None for anything but a floating-point format."""
    try:
        found = parse_format(name)
    except ValueError:
        return None
    return None if found.is_integer else found


def dtype_name(dtype: Any) -> str:
    """The name of a numpy dtype as policies write it."""
    return format_name(np.dtype(dtype).name) if _plain(dtype) else str(dtype)


def _plain(dtype: Any) -> bool:
    try:
        np.dtype(dtype)
    except TypeError:  # random keys
        return False
    return True


def is_float(name: str) -> bool:
    """Whether a dtype or format of this name holds floating-point numbers."""
    return format_of(name) is not None


def narrower(one: str, other: str) -> bool:
    """Whether `other` has every value of `one`, and more."""
    a, b = format_of(one), format_of(other)
    return a is not None and b is not None and a != b and b.contains(a)


_STRUCTURE: Final = word_set(
    """
    while body cond closed_call eval_jaxpr checkpoint rematted_computation jvp vmap custom_jvp_call
    custom_vjp_call shard_map transpose
    """
)


def key_of(op_name: str) -> str:
    """An operation's name without what only says how it was transformed or called.

    A traced operation and the compiled ones that were made for it have the same.
    """
    op_name = op_name.partition(";")[0]  # XLA joins the names of merged instructions
    backward = "transpose(" in op_name
    plain = re.sub(r"\bp?jit\([^()]*\)", "", op_name)
    words = re.split(r"[/()]+", plain)
    kept = [word for word in words[:-1] if word and word not in _STRUCTURE]
    return "/".join((*(("backward",) if backward else ()), *kept, words[-1]))
