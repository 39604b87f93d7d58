"""The collectives of a partitioned XLA program, read from its HLO text.

Text is what XLA offers for reading: `compiled.as_text()`, or what it dumps after a pass. A loop
counts as often as it runs, and what only dead code uses does not count. Bytes are those that one
device sends, by the ring algorithms (Chan et al. 2007, "Collective communication: theory, practice,
and experience", section 4), where R is the size of the whole tensor and n that of a group:

    all-gather, reduce-scatter, all-to-all    (n - 1) / n R
    all-reduce                                2 (n - 1) / n R
    collective-permute                        R

An all-reduce of which each device keeps its own slice alone is a reduce-scatter: XLA's backends for
GPUs and TPUs make it one, the CPU's does not.

Knows the format of HLO text alone.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Final

from lmjax.hlo.module import (
    Computation,
    Instruction,
    bits,
    elements,
    executed,
    parse,
    shapes,
    users_of,
)
from lmjax.hlo.replica_groups import Group, devices_of, spanned

KINDS: Final = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
_RING: Final = {"all-reduce": 2.0}

_THROUGH: Final = ("bitcast", "copy", "reshape", "transpose")


@dataclass(frozen=True)
class Collective:
    """One collective of a step.

    Attributes:
      kind: one of `KINDS`.
      dtype: of what is moved, as HLO calls it: `bf16`, `f32`, `s32`, `pred`.
      bytes: size of the whole tensor, before it is scattered or after it is gathered, in one run.
      group: number of devices that take part together.
      axes: the mesh axes that a group spans.
      count: how often a step runs it.
      source: the operation it was made for, as JAX names it.
    """

    kind: str
    dtype: str
    bytes: float
    group: int
    axes: tuple[str, ...]
    count: int
    source: str

    @property
    def sent(self) -> float:
        """Bytes that one device sends in a step."""
        if self.kind == "collective-permute":
            return self.count * self.bytes
        share = (self.group - 1) / self.group
        return self.count * _RING.get(self.kind, 1.0) * share * self.bytes


def collectives(text: str, mesh: Mapping[str, int]) -> list[Collective]:
    """The collectives of a step; those of a single device are left out.

    They come in the order of the text, those of a loop after what surrounds it.

    Args:
      text: a partitioned module.
      mesh: the sizes of its mesh axes, devices numbered row by row.

    Raises:
      ValueError: the text has no entry, or has something this reader does not know: a loop whose
        number of runs it does not say, or a new way to write groups of devices.
    """
    found: list[Collective] = []
    for running, times in executed(parse(text)):
        users = users_of(running)
        seen = set()
        for one in running.values():
            kind = one.op.removesuffix("-start")
            if kind not in KINDS:
                continue
            # What the partitioner gathers twice from one place is gathered once: XLA's pass
            # all-gather-cse merges them.
            group = _group(one, kind, mesh)
            key = (kind, one.operands, group, one.attribute("dimensions"))
            if key not in seen:
                found += _read(one, kind, group, mesh, times, running, users)
            seen.add(key)
    return [collective for collective in found if collective.group > 1]


def _read(
    one: Instruction,
    kind: str,
    group: Group,
    mesh: Mapping[str, int],
    times: int,
    running: Computation,
    users: Mapping[str, list[Instruction]],
) -> Iterator[Collective]:
    sizes: dict[str, float] = {}
    for operand in one.operands:
        for dtype, shape in shapes(running[operand].type):
            size = math.prod(shape) * bits(dtype) / 8
            sizes[dtype] = sizes.get(dtype, 0.0) + size
    for dtype, size in sizes.items():
        yield Collective(
            kind="reduce-scatter" if _scattered(one, len(group), users) else kind,
            dtype=dtype,
            bytes=size * (len(group) if kind == "all-gather" else 1),
            group=len(group),
            axes=spanned(group, mesh),
            count=times,
            source=one.source,
        )


def _group(one: Instruction, kind: str, mesh: Mapping[str, int]) -> Group:
    if kind == "collective-permute":
        pairs = re.search(r"source_target_pairs=(\{\{.*?\}\})", one.rest)
        moved = re.findall(r"\{(\d+),(\d+)\}", pairs[1] if pairs else "")
        apart = [(int(a), int(b)) for a, b in moved if a != b]
        return apart[0] if apart else (0,)
    return devices_of(one.rest, mesh)


def _scattered(one: Instruction, group: int, users: Mapping[str, list[Instruction]]) -> bool:
    """Whether of an all-reduce each device keeps a slice of 1 / group alone."""
    if one.op != "all-reduce" or one.type.startswith("("):
        return False
    slices = list(_final_users(one, users))
    return bool(slices) and all(
        user.op == "dynamic-slice" and elements(user.type) * group == elements(one.type)
        for user in slices
    )


def _final_users(one: Instruction, users: Mapping[str, list[Instruction]]) -> Iterator[Instruction]:
    """What uses an instruction, looking through those that only move elements."""
    for user in users.get(one.name, []):
        if user.op in _THROUGH:
            yield from _final_users(user, users)
        else:
            yield user
