"""Number formats and exact tables of their values.

A `Format` defines the number of exponent and mantissa bits, the exponent bias, and the meaning of
the patterns at the top of the range. Everything else (largest value, subnormals, the table of all
values, rounding) follows from these, for standard and custom formats alike.

Two observations keep this file, and `rounding.py`, short.

*Codes are ordered.* Read without its sign, a bit pattern is an integer, and larger integers are
larger numbers. A format ends at its largest finite code, and the next code is the result of
overflow: rounding first and then comparing with the largest code gives the correct boundary between
"rounds to the largest" and "overflows" without stating it explicitly.

*An integer is a float that is subnormal everywhere.* Below the smallest normal number a float has a
fixed quantum; `intN` has a fixed quantum of one over its whole range. It is the format with no
exponent bits and N-1 mantissa bits, and the rounding code does not distinguish the two.

Knows ml_dtypes and numpy; nothing of jax, nothing else of lmjax.
"""

from __future__ import annotations

import difflib
import enum
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Final

import ml_dtypes
import numpy as np


class Encoding(enum.Enum):
    """The meaning of the bit patterns at the ends of the range."""

    IEEE = "ieee"  # top exponent: mantissa 0 is infinity, anything else NaN
    FN = "fn"  # finite and NaN: only the all-ones magnitude is NaN, no infinity
    FNUZ = "fnuz"  # finite, NaN where negative zero would be, no infinity
    FINITE = "finite"  # every pattern is a number
    SCALE = "scale"  # unsigned powers of two, all ones is NaN; neither zero nor infinity
    INTEGER = "integer"  # two's complement


@dataclass(frozen=True)
class Format:
    """A number format of at most 64 bits; hashable, so it can be a static argument under jit.

    The value of a finite pattern with exponent field E and mantissa field T is, with Y mantissa
    bits, `2**(E - bias) * (1 + T / 2**Y)` for E > 0 and `2**(1 - bias) * T / 2**Y` for E = 0 (IEEE
    754-2019, section 3.4). `intN` has no exponent field and a bias that makes its quantum one.

    Attributes:
      name: canonical name, accepted by `parse_format`.
      exponent_bits: width of the exponent field; 0 for integers.
      mantissa_bits: width of the mantissa field without the implicit leading bit.
      bias: exponent bias.
      encoding: the special patterns.
      dtype: the numpy dtype with exactly these bits that jax can cast to, or None if there is none
        and the format is emulated in a wider one.
    """

    name: str
    exponent_bits: int
    mantissa_bits: int
    bias: int
    encoding: Encoding
    dtype: np.dtype[Any] | None = None

    def __post_init__(self) -> None:
        if (self.encoding is Encoding.INTEGER) != (self.exponent_bits == 0):
            raise ValueError(f"{self.name}: integers, and only integers, have no exponent bits")
        if self.encoding is Encoding.SCALE and self.mantissa_bits:
            raise ValueError(f"{self.name}: a scale format has no mantissa bits")
        if self.encoding is Encoding.IEEE and not self.mantissa_bits:
            raise ValueError(
                f"{self.name}: infinity and NaN need a mantissa bit to differ in; use fn"
            )

    def __str__(self) -> str:
        return self.name

    @property
    def signed(self) -> bool:
        """Whether negative numbers exist."""
        return self.encoding is not Encoding.SCALE

    @property
    def is_integer(self) -> bool:
        """Whether this is a two's complement integer."""
        return self.encoding is Encoding.INTEGER

    @property
    def bits(self) -> int:
        """Width of a pattern, sign included."""
        return self.signed + self.exponent_bits + self.mantissa_bits

    @property
    def has_infinity(self) -> bool:
        """Whether there are patterns for plus and minus infinity."""
        return self.encoding is Encoding.IEEE

    @property
    def has_nan(self) -> bool:
        """Whether there is a pattern for NaN."""
        return bool(self.nan_codes)

    @property
    def has_negative_zero(self) -> bool:
        """Whether zero has a sign."""
        return self.encoding in (Encoding.IEEE, Encoding.FN, Encoding.FINITE)

    @property
    def largest_code(self) -> int:
        """Pattern of the largest finite number."""
        patterns = 1 << (self.exponent_bits + self.mantissa_bits)  # with the sign bit clear
        match self.encoding:
            case Encoding.IEEE:
                return patterns - (1 << self.mantissa_bits) - 1
            case Encoding.FN | Encoding.SCALE:
                return patterns - 2
            case _:
                return patterns - 1

    @property
    def nan_codes(self) -> tuple[range, ...]:
        """Patterns that are NaN, as ranges in ascending order."""
        sign = 1 << (self.exponent_bits + self.mantissa_bits)
        match self.encoding:
            case Encoding.IEEE:
                first = self.largest_code + 2
                return range(first, sign), range(sign + first, 2 * sign)
            case Encoding.FN:
                return range(sign - 1, sign), range(2 * sign - 1, 2 * sign)
            case Encoding.FNUZ:
                return (range(sign, sign + 1),)
            case Encoding.SCALE:
                return (range(sign - 1, sign),)
            case _:
                return ()

    @property
    def largest_finite(self) -> float:
        """Largest finite value."""
        return self._magnitude(self.largest_code)

    @property
    def smallest_finite(self) -> float:
        """Most negative finite value, or the smallest positive one of an unsigned format."""
        if self.is_integer:
            return -self.largest_finite - self.smallest_subnormal
        return -self.largest_finite if self.signed else self.smallest_normal

    @property
    def largest_exponent(self) -> int:
        """`floor(log2(largest_finite))`: emax of the OCP MX specification."""
        return math.frexp(self.largest_finite)[1] - 1

    @property
    def smallest_exponent(self) -> int:
        """Exponent of the smallest normal number; the quantum below it is constant."""
        return -self.bias if self.encoding is Encoding.SCALE else 1 - self.bias

    @property
    def smallest_normal(self) -> float:
        """Smallest positive value with full precision; the quantum, for integers."""
        if self.is_integer:
            return self.smallest_subnormal
        return math.ldexp(1.0, self.smallest_exponent)

    @property
    def smallest_subnormal(self) -> float:
        """Smallest positive value; the smallest normal one if there are no mantissa bits."""
        return math.ldexp(1.0, self.smallest_exponent - self.mantissa_bits)

    @property
    def epsilon(self) -> float:
        """Distance from 1 to the next larger value of a float; the quantum, for integers."""
        return self.smallest_subnormal if self.is_integer else math.ldexp(1.0, -self.mantissa_bits)

    def _magnitude(self, code: int) -> float:
        """Value of a finite pattern with the sign bit clear."""
        mantissa = code & ((1 << self.mantissa_bits) - 1)
        exponent = code >> self.mantissa_bits
        if self.encoding is Encoding.SCALE:
            return math.ldexp(1.0, exponent - self.bias)
        if exponent:
            mantissa += 1 << self.mantissa_bits
        return math.ldexp(mantissa, max(exponent, 1) - self.bias - self.mantissa_bits)

    def values(self) -> np.ndarray:
        """Every value of the format, float64 [2**bits], indexed by bit pattern.

        Infinities and NaNs are at the indices of their patterns.

        Raises:
          ValueError: the format is wider than 16 bits.
        """
        if self.bits > 16:
            raise ValueError(f"{self.name} has 2**{self.bits} values; tables end at 16 bits")
        patterns = 1 << (self.exponent_bits + self.mantissa_bits)
        positive = np.array([self._magnitude(code) for code in range(patterns)], dtype=np.float64)
        if self.is_integer:
            return np.concatenate([positive, positive - patterns * self.smallest_subnormal])
        if self.has_infinity:
            positive[self.largest_code + 1] = np.inf
        table = np.concatenate([positive, -positive]) if self.signed else positive
        for codes in self.nan_codes:
            table[codes.start : codes.stop] = np.nan
        return table

    def contains(self, other: Format) -> bool:
        """Whether every value of `other`, a format with infinities, is a value of this format."""
        return (
            self.has_infinity
            and self.mantissa_bits >= other.mantissa_bits
            and self.smallest_subnormal <= other.smallest_subnormal
            and self.largest_finite >= max(other.largest_finite, -other.smallest_finite)
        )


def _ieee(name: str, exponent_bits: int, mantissa_bits: int, dtype: Any = None) -> Format:
    bias = 2 ** (exponent_bits - 1) - 1
    native = None if dtype is None else np.dtype(dtype)
    # Without mantissa bits the top exponent is a single pattern. It is NaN rather than infinity,
    # because a missing NaN would go unnoticed.
    encoding = Encoding.IEEE if mantissa_bits else Encoding.FN
    return Format(name, exponent_bits, mantissa_bits, bias, encoding, native)


def integer(bits: int) -> Format:
    """Two's complement integer: `-2**(bits-1)` to `2**(bits-1) - 1`."""
    native = {2: ml_dtypes.int2, 4: ml_dtypes.int4, 8: np.int8, 16: np.int16}.get(bits)
    dtype = None if native is None else np.dtype(native)
    return Format(f"int{bits}", 0, bits - 1, 2 - bits, Encoding.INTEGER, dtype)


def _named(*formats: Format) -> dict[str, Format]:
    return {format.name: format for format in formats}


# The kinds of e4m3, e5m2, e3m2, e2m3, e2m1, e8m0 are those of the OCP 8-bit and MX specifications.
# The two 6-bit formats have an ml_dtypes dtype, but XLA cannot convert to it, so here they are
# emulated.
_NAMED: Final = _named(
    _ieee("f64", 11, 52, np.float64),
    _ieee("f32", 8, 23, np.float32),
    _ieee("tf32", 8, 10),
    _ieee("bf16", 8, 7, ml_dtypes.bfloat16),
    _ieee("f16", 5, 10, np.float16),
    _ieee("e5m2", 5, 2, ml_dtypes.float8_e5m2),
    _ieee("e3m4", 3, 4, ml_dtypes.float8_e3m4),
    Format("e4m3", 4, 3, 7, Encoding.FN, np.dtype(ml_dtypes.float8_e4m3fn)),
    Format("e5m2fnuz", 5, 2, 16, Encoding.FNUZ, np.dtype(ml_dtypes.float8_e5m2fnuz)),
    Format("e4m3fnuz", 4, 3, 8, Encoding.FNUZ, np.dtype(ml_dtypes.float8_e4m3fnuz)),
    Format("e8m0", 8, 0, 127, Encoding.SCALE, np.dtype(ml_dtypes.float8_e8m0fnu)),
    Format("e3m2", 3, 2, 3, Encoding.FINITE),
    Format("e2m3", 2, 3, 1, Encoding.FINITE),
    Format("e2m1", 2, 1, 1, Encoding.FINITE, np.dtype(ml_dtypes.float4_e2m1fn)),
)

_ALIASES: Final = {
    "float64": "f64",
    "float32": "f32",
    "full": "f32",
    "bfloat16": "bf16",
    "float16": "f16",
    "e8m23": "f32",
    "e8m10": "tf32",
    "e8m7": "bf16",
    "e5m10": "f16",
    "e4m3fn": "e4m3",
    "float8_e4m3fn": "e4m3",
    "float8_e4m3fnuz": "e4m3fnuz",
    "float8_e5m2": "e5m2",
    "float8_e5m2fnuz": "e5m2fnuz",
    "float8_e3m4": "e3m4",
    "float8_e8m0fnu": "e8m0",
    "float6_e3m2fn": "e3m2",
    "float6_e2m3fn": "e2m3",
    "float4_e2m1fn": "e2m1",
}


def parse_format(name: str) -> Format:
    """The format called `name`.

    Accepted: `f64 f32 tf32 bf16 f16 e4m3 e4m3fnuz e5m2 e5m2fnuz e8m0 e3m2 e2m3 e2m1`, the dtype
    names of numpy and ml_dtypes for them, jmp's names (`full float32 ...`), any `eXmY` with
    2 <= X <= 8 and 0 <= Y <= 23, and `intN` with 2 <= N <= 16.

    Names of the same bits give the same format (`e5m10` is `f16`). As in the OCP specifications,
    `e4m3` has NaN but no infinity, `e3m2 e2m3 e2m1` have neither, and `e8m0` is the unsigned scale.
    Every other `eXmY` follows IEEE 754: bias `2**(X-1) - 1`, infinities, NaNs, subnormals. With
    Y = 0 there is no room for an infinity, and the top exponent is NaN. `half` is not accepted,
    because it depends on the backend.

    Raises:
      ValueError: unknown name; the message lists what is accepted and suggests the nearest name.
    """
    canonical = _ALIASES.get(name, name)
    if canonical in _NAMED:
        return _NAMED[canonical]
    if match := re.fullmatch(r"e([2-8])m(\d|1\d|2[0-3])", name):
        return _ieee(name, int(match[1]), int(match[2]))
    if match := re.fullmatch(r"int([2-9]|1[0-6])", name):
        return integer(int(match[1]))
    known = [*_NAMED, *_ALIASES, "int4", "int8", "int16"]
    near = difflib.get_close_matches(name, known, n=1)
    hint = f" (did you mean {near[0]!r}?)" if near else ""
    raise ValueError(
        f"unknown number format {name!r}{hint}; accepted are {', '.join(_NAMED)}, "
        "their numpy names, eXmY with 2 <= X <= 8 and 0 <= Y <= 23, and intN with 2 <= N <= 16"
    )


def as_format(format: Format | str) -> Format:
    """Returns `format` itself, or the format that it names."""
    return parse_format(format) if isinstance(format, str) else format


@dataclass(frozen=True)
class FormatRow:
    """One line of the table of formats; `native` is a dtype's name, or "emulated"."""

    name: str
    bits: int
    layout: str
    bias: int | None
    largest: float
    smallest_normal: float
    smallest_subnormal: float
    infinity: bool
    nan: bool
    native: str


def format_table(names: Iterable[str] | None = None) -> list[FormatRow]:
    """Returns the properties of formats in readable form.

    Args:
      names: formats, as accepted by `parse_format`; by default every named format and the integers
        that have a dtype.
    """
    if names is None:
        names = [*_NAMED, "int16", "int8", "int4", "int2"]
    return [_row(parse_format(name)) for name in names]


def _row(format: Format) -> FormatRow:
    if format.is_integer:
        layout = "two's complement"
    else:
        sign = "1+" if format.signed else ""
        layout = f"{sign}{format.exponent_bits}+{format.mantissa_bits} {format.encoding.value}"
    return FormatRow(
        name=format.name,
        bits=format.bits,
        layout=layout,
        bias=None if format.is_integer else format.bias,
        largest=format.largest_finite,
        smallest_normal=format.smallest_normal,
        smallest_subnormal=format.smallest_subnormal,
        infinity=format.has_infinity,
        nan=format.has_nan,
        native="emulated" if format.dtype is None else format.dtype.name,
    )
