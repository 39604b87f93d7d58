"""Reads the collectives of a partitioned XLA program from its HLO text.

The text is that of `compiled.as_text()` or of a dump after a pass. A collective in a loop counts
once per iteration; dead code does not count. Bytes are those that one device sends with ring
algorithms (Chan et al. 2007, "Collective communication: theory, practice, and experience",
section 4), where R is the size of the whole tensor and n the size of a group:

    all-gather, reduce-scatter, all-to-all    (n - 1) / n R
    all-reduce                                2 (n - 1) / n R
    collective-permute                        R

An all-reduce of which each device keeps only its own slice counts as a reduce-scatter: XLA's GPU
and TPU backends turn it into one, the CPU backend does not.

Knows only the format of HLO text.
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
      dtype: HLO name of the dtype that is moved: `bf16`, `f32`, `s32`, `pred`.
      bytes: size of the whole tensor, before scattering or after gathering, per execution.
      group: number of devices in a group.
      axes: the mesh axes that a group spans.
      count: executions per step.
      source: JAX's name of the operation that it was generated for.
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
    """Returns the collectives of a step, except those within a single device.

    They are in the order of the text; those of a loop follow the computation that contains it.

    Args:
      text: a partitioned module.
      mesh: the sizes of its mesh axes, devices numbered row by row.

    Raises:
      ValueError: the text has no entry computation, a loop without a known trip count, or an
        unknown notation for groups of devices.
    """
    found: list[Collective] = []
    for running, times, _ in executed(parse(text)):
        users = users_of(running)
        seen = set()
        for one in running.values():
            kind = one.op.removesuffix("-start")
            if kind not in KINDS:
                continue
            # XLA's pass all-gather-cse merges repeated gathers of the same operand.
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
    """Whether each device keeps only a slice of 1 / group of an all-reduce."""
    if one.op != "all-reduce" or one.type.startswith("("):
        return False
    slices = list(_final_users(one, users))
    return bool(slices) and all(
        user.op == "dynamic-slice" and elements(user.type) * group == elements(one.type)
        for user in slices
    )


def _final_users(one: Instruction, users: Mapping[str, list[Instruction]]) -> Iterator[Instruction]:
    """The users of an instruction, looking through instructions that only move elements."""
    for user in users.get(one.name, []):
        if user.op in _THROUGH:
            yield from _final_users(user, users)
        else:
            yield user
