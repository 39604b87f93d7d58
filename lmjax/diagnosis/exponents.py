"""Exponents of tensors, and what formats would do to what has them.

Knows formats and quantizers.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

from lmjax.precision.formats import parse_format
from lmjax.precision.quantizer import parse_quantizer

GRADIENTS = ("/dx", "/dw", "/g")
"""How the names of tensors end that a loss scale multiplies."""


class Exponents(NamedTuple):
    """The tensors of one role at one site, over some steps.

    Attributes:
      size: number of elements.
      maximum: largest magnitude.
      counts: by exponent e, how many have a magnitude in [2^e, 2^(e + 1)).
    """

    size: float
    maximum: float
    counts: dict[int, float]

    @property
    def zeros(self) -> float:
        """Share of elements that are 0."""
        return 1 - sum(self.counts.values()) / self.size

    def times(self, power: float) -> Exponents:
        """Those of the tensors times a power of two."""
        shift = round(math.log2(power))
        counts = {exponent + shift: count for exponent, count in self.counts.items()}
        return Exponents(self.size, self.maximum * power, counts)

    def share(self, low: float, high: float) -> float:
        """Share of elements with magnitudes from `low` to `high`; uniform within an exponent."""
        inside = 0.0
        for exponent, count in self.counts.items():
            start = math.ldexp(1.0, exponent)
            part = min(high, 2 * start) - max(low, start)
            inside += count * min(max(part / start, 0.0), 1.0)
        return inside / self.size if self.size else 0.0


class Loss(NamedTuple):
    """Shares of a tensor: `underflow` becomes 0, `overflow` is beyond the largest number."""

    underflow: float
    overflow: float

    @property
    def worst(self) -> float:
        """The larger share."""
        return max(self)


def predicted(tensor: Exponents, text: str) -> Loss:
    """What a format would do to a tensor.

    Args:
      tensor: its exponents in f32.
      text: the format, such as `e4m3@tensor`. The factor of one that is scaled by channels or
        blocks is taken to be that of the tensor, which is the worst case.
    """
    quantizer = parse_quantizer(text)
    number_format, factor = quantizer.format, 1.0
    if quantizer.groups != "none" and tensor.maximum > 0:
        factor = tensor.maximum / number_format.largest_finite
    # To nearest: what is at most half of the smallest number becomes 0.
    smallest = number_format.smallest_subnormal / 2
    return Loss(
        tensor.share(0.0, smallest * factor),
        tensor.share(number_format.largest_finite * factor, math.inf) if factor == 1 else 0.0,
    )


def f16_loss_scales(
    exponents: Mapping[str, Exponents], budget: float
) -> tuple[float | None, float]:
    """The smallest loss scale at which gradients survive f16, and the largest without overflow.

    Returns:
      Powers of two; None for the first if 1 is enough.
    """
    f16 = parse_format("f16")
    gradients = [e for path, e in exponents.items() if path.endswith(GRADIENTS)]
    highest = max((e.maximum for e in gradients), default=0.0) or 1.0
    largest = 2.0 ** math.floor(math.log2(f16.largest_finite / 2 / highest))
    scale = 1.0
    threshold = f16.smallest_subnormal / 2
    while scale < 2.0**100 and any(e.share(0, threshold / scale) > budget for e in gradients):
        scale *= 2
    return (None if scale == 1 else scale), largest
