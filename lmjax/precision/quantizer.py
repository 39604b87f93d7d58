"""Configuration of scale factors: which numbers share one, and how it is stored and computed.

A narrow format covers a few binades. A `Quantizer` defines how a tensor is scaled into them, and
`parse_quantizer` parses its short name. The block formats of the OCP Microscaling (MX)
specification v1.0 and NVFP4 are named quantizers. `scaling.py` does the arithmetic.

Knows `formats`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import Any, Final, Literal

from lmjax.precision.formats import Encoding, Format, parse_format

Groups = Literal["none", "tensor", "channel", "block"]

F32: Final = parse_format("f32")
E8M0: Final = parse_format("e8m0")
E4M3: Final = parse_format("e4m3")

Way = Literal["delayed", "observed", "learned"]

DEFAULT_HISTORY: Final = 16
DEFAULT_EVERY: Final = 100
_HISTORIES: Final = {"observed": 2, "learned": 3}
"""Numbers that the state of a factor keeps, where a policy does not say how many."""


@dataclass(frozen=True)
class Quantizer:
    """How a tensor is scaled into a narrow format; hashable.

    Attributes:
      format: format of the elements.
      groups: which elements share a factor. `none`: no factor, a plain cast. `tensor`: all of them.
        `channel`: the terms of one sum of a dot product, so that each output channel (or token) has
        its own. `block`: `block` consecutive ones along the axis that is summed over, the last one
        where there are several; the last block may be shorter.
      block: elements in a block; 0 without blocks.
      scale: what factors are stored in. f32: `amax / largest`, so that the largest element becomes
        the largest value. e4m3: the same, rounded. e8m0: `2**(floor(log2(amax)) - emax)` as in the
        MX specification (section 6.3), under which elements near the end of a binade saturate, by
        up to a quarter in e2m1: stochastic rounding cannot be unbiased there. Rounded e4m3 factors
        are at most 1/16 too small, with the same consequence.
      rceil: whether an e8m0 factor is `2**ceil(log2(amax / largest))`, the smallest under which
        nothing saturates, as in Mishra et al. 2025, arXiv 2506.08027.
      tensor_scale: whether the factors are themselves divided by one f32 factor for the whole
        tensor, `amax / (largest * largest factor)`; for factors in e4m3.
      affine: whether elements are `round(x / scale) + zero_point`, which spends no codes on values
        that do not occur; for integers. Zero stays exact.
      history: numbers of past steps from which the factor follows (see `ScaleState`); 0 takes it
        from the tensor itself.
      way: how it follows. delayed: from the largest of so many past maxima. observed: from the
        largest magnitude of `every` steps, after which it is found again. learned: by gradient
        descent (Esser et al. 2020).
      every: steps between two recalibrations of an observed factor; else 0.
    """

    format: Format
    groups: Groups = "none"
    block: int = 0
    scale: Format = F32
    rceil: bool = False
    tensor_scale: bool = False
    affine: bool = False
    history: int = 0
    way: Way = "delayed"
    every: int = 0

    def __post_init__(self) -> None:
        if not self.format.signed:
            raise ValueError(
                f"{self.format} has no negative numbers; it is for factors, not elements"
            )
        if (self.groups == "block") != (self.block > 0):
            raise ValueError(f"block={self.block} with groups={self.groups!r}: use blockN, N >= 1")
        if self.scale not in (F32, E8M0, E4M3):
            raise ValueError(f"factors in {self.scale} are not supported; use f32, e8m0 or e4m3")
        if self.groups == "none" and replace(self, groups="tensor") != Quantizer(
            self.format, "tensor"
        ):
            raise ValueError("without groups there are no factors to describe; add @tensor")
        if self.rceil and self.scale != E8M0:
            raise ValueError("rceil says how e8m0 factors are found; add .e8m0, or leave it out")
        if self.tensor_scale and (self.scale != E4M3 or self.groups == "tensor"):
            raise ValueError("a factor for the factors needs e4m3 factors of channels or blocks")
        if self.affine and not (self.format.is_integer and self.scale == F32):
            raise ValueError("a zero point needs integer elements and f32 factors")
        if self.history < 0 or (
            self.history and (self.groups != "tensor" or self.affine or self.scale == E4M3)
        ):
            raise ValueError(
                "a delayed factor is one f32 or e8m0 for the tensor, without zero point"
            )
        if self.history != _HISTORIES.get(self.way, self.history):
            raise ValueError(f"a factor that is {self.way} keeps {_HISTORIES[self.way]} numbers")
        if (self.way == "observed") != (self.every > 0):
            raise ValueError("a factor is observed for N steps, at least 1; write .observedN")
        if self.way == "learned" and self.scale != F32:
            raise ValueError("a learned factor is any f32; leave out the format of factors")

    @property
    def spans_tensor(self) -> bool:
        """Whether all elements of a tensor share a factor, that of each or that of the factors."""
        return self.groups == "tensor" or self.tensor_scale

    @property
    def of_the_tensor(self) -> Quantizer:
        """The same quantizer, but with factors that follow from the tensor itself."""
        return replace(self, history=0, way="delayed", every=0)

    def __str__(self) -> str:
        """The canonical name: `parse_quantizer(str(quantizer)) == quantizer`."""
        for name, named in _NAMED.items():
            if replace(self, rceil=False) == named:
                return f"{name}.rceil" if self.rceil else name
        parts = [f"{self.format}" if self.groups == "none" else f"{self.format}@{self.groups}"]
        parts[0] += str(self.block) if self.block else ""
        if self.scale != F32:
            parts.append(f"{self.scale}@tensor" if self.tensor_scale else f"{self.scale}")
        if self.rceil:
            parts.append("rceil")
        if self.affine:
            parts.append("affine")
        if self.history:
            names = {"delayed": f"delayed{self.history}", "observed": f"observed{self.every}"}
            parts.append(names.get(self.way, self.way))
        return ".".join(parts)


def _mx(element: Format) -> Quantizer:
    return Quantizer(element, "block", block=32, scale=E8M0)


# The elements of MXINT8 are int8 with an implied factor 2**-6 (MX v1.0, section 5.3.4).
_MXINT8_ELEMENT: Final = Format("int8q6", 0, 7, 0, Encoding.INTEGER)

_NAMED: Final = {
    "mxfp8": _mx(E4M3),
    "mxfp8_e5m2": _mx(parse_format("e5m2")),
    "mxfp6": _mx(parse_format("e3m2")),
    "mxfp6_e2m3": _mx(parse_format("e2m3")),
    "mxfp4": _mx(parse_format("e2m1")),
    "mxint8": _mx(_MXINT8_ELEMENT),
    "nvfp4": Quantizer(parse_format("e2m1"), "block", block=16, scale=E4M3, tensor_scale=True),
}

_ALIASES: Final = {"mxfp8_e4m3": "mxfp8", "mxfp6_e3m2": "mxfp6", "mxfp4_e2m1": "mxfp4"}


def parse_quantizer(text: str) -> Quantizer:
    """Parses a quantizer.

    `FORMAT[@tensor|@channel|@blockN][.OPTION]...` with the options `e8m0`, `e4m3` (what factors are
    stored in), `e4m3@tensor` (and one f32 factor for those), `rceil`, `affine`, `delayed` or
    `delayedN`, `observedN`, `learned`. Or a name: `mxfp8` (e4m3 elements), `mxfp8_e5m2`, `mxfp6`
    (e3m2 elements), `mxfp6_e2m3`, `mxfp4` or `mxint8`, which `.rceil` may follow, or `nvfp4`.

    Raises:
      ValueError: says what is wrong and what is accepted.
    """
    stem = text.removesuffix(".rceil")
    name = _ALIASES.get(stem, stem)
    if name in _NAMED:
        return replace(_NAMED[name], rceil=stem != text)
    match = re.fullmatch(r"(\w+)(?:@(tensor|channel|block)(\d*))?((?:\.[\w@]+)*)", text)
    if match is None or (match[3] and match[2] != "block"):
        raise ValueError(
            f"cannot read {text!r} as a quantizer; write FORMAT, FORMAT@tensor, FORMAT@channel or "
            f"FORMAT@blockN, or one of {', '.join(_NAMED)}"
        )
    settings: dict[str, Any] = {"groups": match[2] or "none", "block": int(match[3] or 0)}
    for option in match[4].split(".")[1:]:
        settings |= _parse_option(option, text)
    return Quantizer(parse_format(match[1]), **settings)


def _parse_option(option: str, text: str) -> dict[str, Any]:
    if option in ("f32", "e8m0", "e4m3"):
        return {"scale": parse_format(option)}
    if option == "e4m3@tensor":
        return {"scale": E4M3, "tensor_scale": True}
    if option in ("rceil", "affine"):
        return {option: True}
    if delayed := re.fullmatch(r"delayed(\d*)", option):
        return {"history": int(delayed[1] or DEFAULT_HISTORY)}
    if observed := re.fullmatch(r"observed(\d*)", option):
        every = int(observed[1] or DEFAULT_EVERY)
        return {"way": "observed", "every": every, "history": _HISTORIES["observed"]}
    if option == "learned":
        return {"way": option, "history": _HISTORIES[option]}
    raise ValueError(
        f"unknown option {option!r} in {text!r}; "
        "use e8m0, e4m3, e4m3@tensor, rceil, affine, delayed, delayedN, observedN or learned"
    )
