"""Compares the traffic of a compiled step, by purpose, with the expected traffic.

Knows the collectives of a program and the arithmetic.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from lmjax.hlo.collectives import Collective
from lmjax.plan.arithmetic import Traffic

PURPOSES = ("parameters", "gradients", "embedding", "activations", "positions", "other")
_SCALAR = 8
_REDUCTIONS = ("all-reduce", "reduce-scatter")


@dataclass(frozen=True)
class TrafficRow:
    """Collectives of one purpose, kind and dtype, along the same mesh axes.

    Attributes:
      purpose: one of `PURPOSES`; `other` is losses, norms and flags.
      kind: kind of the collectives.
      dtype: HLO name of the dtype.
      axes: the mesh axes.
      count: collectives per step.
      sent: bytes that a device sends per step, as compiled.
      expected: bytes expected by `arithmetic.py`; 0 where it expects none, as for `other`.
    """

    purpose: str
    kind: str
    dtype: str
    axes: tuple[str, ...]
    count: int
    sent: float
    expected: float

    @property
    def ratio(self) -> float | None:
        """Compiled over expected."""
        return self.sent / self.expected if self.expected else None


def purpose_of(collective: Collective) -> str:
    """Infers the purpose of a collective from its axes, dtype and source operation."""
    source, axes = collective.source, set(collective.axes)
    reduction = collective.kind in _REDUCTIONS
    if collective.bytes <= _SCALAR:
        return "other"
    if collective.kind == "all-to-all" or collective.dtype == "s32":
        return "embedding"
    if source.endswith("/gather") and "take_along_axis" not in source:
        return "embedding"
    if "sequence" in axes and ("bskh" in source or not reduction):
        return "positions"
    if collective.kind == "all-gather" and axes == {"fsdp"}:
        return "parameters"
    if (reduction or collective.kind == "collective-permute") and not axes & {"tensor"}:
        return "gradients"
    if axes == {"tensor"} and source.endswith("/dot_general"):
        return "activations"
    return "other"


def compared(collectives: Iterable[Collective], expected: Iterable[Traffic]) -> list[TrafficRow]:
    """Returns a row for all traffic, compiled or expected, by purpose and then by size."""
    Key = tuple[str, str, str, tuple[str, ...]]
    counts: dict[Key, int] = {}
    sent: dict[Key, float] = {}
    for one in collectives:
        key = (purpose_of(one), one.kind, one.dtype, one.axes)
        counts[key] = counts.get(key, 0) + one.count
        sent[key] = sent.get(key, 0.0) + one.sent
    wanted = {(one.purpose, one.kind, one.dtype, one.axes): one.sent for one in expected}
    rows = [
        TrafficRow(*key, counts.get(key, 0), sent.get(key, 0.0), wanted.get(key, 0.0))
        for key in sent | wanted
    ]
    return sorted(rows, key=lambda row: (PURPOSES.index(row.purpose), -row.sent, -row.expected))
