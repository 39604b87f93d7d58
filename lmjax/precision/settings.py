"""Structured values of policy keys: how parameters are stored, operands quantized and products
summed. Each has a canonical string, which `grammar.py` parses.

Knows formats, quantizers and rotations.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from lmjax.precision import hadamard
from lmjax.precision.formats import Format
from lmjax.precision.quantizer import Quantizer
from lmjax.precision.rounding import Rounding

Update = Literal["nearest", "sr", "kahan"]


@dataclass(frozen=True)
class Storage:
    """How parameters are stored: a format, and how an update is rounded to it.

    `nearest` loses updates below half a unit in the last place; `sr` rounds stochastically, so that
    they arrive on average; `kahan` keeps what was lost in a second array of the same format and
    adds it to the next update (Zamirai et al. 2020, arXiv 2010.06192, section 4).
    """

    format: Format
    update: Update = "nearest"

    def __str__(self) -> str:
        return self.format.name + ("" if self.update == "nearest" else f".{self.update}")


@dataclass(frozen=True)
class Operand:
    """How an operand of a product is quantized, after it was cast to the compute format.

    Attributes:
      quantizer: to what.
      rounding: how.
      rotation: 0, or the block of a random Hadamard transform (`hadamard.py`) that both operands
        of the product go through first; the longer one where both ask for it.
      kept: `stored` for weights that are stored as elements and factors (`packed.py`), to be read
        and not trained; `static` for activations whose factor is a calibrated number, stored with
        the weights.
    """

    quantizer: Quantizer
    rounding: Rounding = "nearest_even"
    rotation: int = 0
    kept: Literal["", "stored", "static"] = ""

    def __post_init__(self) -> None:
        self._check_kept()
        if not self.rotation:
            return
        hadamard.check_block(self.rotation)
        if self.quantizer.groups == "none":
            raise ValueError(
                "a rotation is for numbers that share a factor; write FORMAT@tensor.rht, "
                "FORMAT@channel.rht or FORMAT@blockN.rht"
            )
        if self.quantizer.history:
            raise ValueError(
                "past maxima are those of the tensor before it is rotated; drop .delayed or .rht"
            )

    def _check_kept(self) -> None:
        if not self.kept:
            return
        if self.quantizer.history or self.rotation or self.rounding != "nearest_even":
            raise ValueError(f"what is {self.kept} is not .sr, .rht or .delayed; leave that out")
        if self.quantizer.groups == "none":
            raise ValueError(f"what is {self.kept} has factors; write FORMAT@tensor.{self.kept}")
        if self.kept == "static" and (self.quantizer.groups != "tensor" or self.quantizer.affine):
            raise ValueError("a static factor is one for the tensor; write FORMAT@tensor.static")

    def __str__(self) -> str:
        size = "" if self.rotation == hadamard.DEFAULT_BLOCK else str(self.rotation)
        rotation = f".rht{size}" if self.rotation else ""
        rounding = ".sr" if self.rounding == "stochastic" else ""
        return f"{self.quantizer}{rotation}{rounding}" + (f".{self.kept}" if self.kept else "")


@dataclass(frozen=True)
class Accumulator:
    """What products are summed in: chunks of `chunk` terms exactly as f32, then chunk by chunk in
    `format`, one rounding each; `chunk` 0 is the whole sum in one go.
    """

    format: Format
    chunk: int = 0

    def __str__(self) -> str:
        return self.format.name + (f"@block{self.chunk}" if self.chunk else "")
