"""Declares what happens inside a site beside what the site itself computes.

Rounding, scaling, measuring and drawing random numbers have arithmetic of their own, whose formats
no policy sets. Each such computation is traced in the scope `aside(name)`, inside that of its site,
so that whoever reads a program (`lmjax/inspection`) can tell it from an accidental upcast.

Knows JAX.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Any, Final

import jax

_ROUNDED: Final = "round_"
"""Begins the names of scopes whose result was rounded to a format: `round_e4m3`."""
_AT: Final = "~"
"""Stands in scopes for the `@` of a quantizer: XLA cuts the name of an operation at an `@`."""

ASIDES: Final[Mapping[str, str]] = {
    "sum": "what a sum of products is multiplied by before it is rounded, in the format of the sum",
    "factors": "scale factors of narrow formats are found and applied in f32",
    "rotation": "random Hadamard transforms are summed in f32",
    "mean": "sums over a row or a batch are divided in f32, and then rounded",
    "order": "multiplied by 1, to be computed after what the 1 was computed from",
    "entering": "an operand is scaled in the format that it arrives in",
    "measuring": "counts and maxima of tensors, for telemetry, delayed factors and the loss scale",
    "range": "powers of two that keep squares in the range of f32",
    "random": "random numbers",
    "total": "what is reported of a loss is summed in f32",
    "wide": "multiplied in f32 and rounded once: the factor may be out of the range of the format",
}
"""Why the arithmetic of each aside has formats of its own, by its name."""


def aside(name: str) -> Any:
    """A scope, or a decorator, for one of `ASIDES`.

    Raises:
      KeyError: it is not declared.
    """
    assert ASIDES[name]
    return jax.named_scope(name)


def rounded_to(number_format: str) -> AbstractContextManager[Any]:
    """A scope whose result is rounded to a format, or by a quantizer; the outermost counts."""
    return jax.named_scope(_ROUNDED + number_format.replace("@", _AT))


def rounding_named(scope: str) -> str:
    """What `rounded_to` was given where it opened a scope of this name; empty for other scopes."""
    if not scope.startswith(_ROUNDED):
        return ""
    return scope.removeprefix(_ROUNDED).replace(_AT, "@")
