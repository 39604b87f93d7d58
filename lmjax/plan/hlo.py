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

from lmjax.plan.replica_groups import Group, devices_of, spanned

KINDS: Final = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
_RING: Final = {"all-reduce": 2.0}

_BITS: Final = {"pred": 8, "c64": 64, "c128": 128}
_TYPE = r"\((?:[^()]|\([^()]*\))*\)|[\w\[\],{}:*()]+"
_INSTRUCTION = re.compile(
    rf"^\s+(?P<root>ROOT )?%(?P<name>[\w.\-]+) = (?P<type>{_TYPE}) (?P<op>[a-z][\w\-]*)"
    r"\((?P<operands>[^()]*)\)(?P<rest>.*)$"
)
_COMPUTATION = re.compile(r"^(?P<entry>ENTRY )?%?(?P<name>[\w.\-]+) \(.*\{$")
_ARRAY = re.compile(r"([a-z]\w*)\[([\d,]*)\]")
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


@dataclass(frozen=True)
class _Instruction:
    name: str
    op: str
    type: str
    operands: tuple[str, ...]
    rest: str
    root: bool

    def attribute(self, name: str) -> str | None:
        found = re.search(rf"\b{name}=%?([\w.\-]+|\{{[\d,]*\}})", self.rest)
        return found[1] if found else None


_Computation = dict[str, _Instruction]


def collectives(text: str, mesh: Mapping[str, int]) -> list[Collective]:
    """The collectives of a step, in the order of the text; those of a single device left out.

    Args:
      text: a partitioned module.
      mesh: the sizes of its mesh axes, devices numbered row by row.

    Raises:
      ValueError: the text has no entry, or has something this reader does not know: a loop whose
        number of runs it does not say, or a new way to write groups of devices.
    """
    computations, entry = _parse(text)
    found = list(_visit(computations, entry, 1, mesh))
    return [collective for collective in found if collective.group > 1]


def _parse(text: str) -> tuple[dict[str, _Computation], str]:
    computations: dict[str, _Computation] = {}
    current: _Computation = {}
    entry = ""
    for line in text.splitlines():
        header = _COMPUTATION.match(line)
        if header:
            current = computations.setdefault(header["name"], {})
            entry = header["name"] if header["entry"] else entry
            continue
        found = _INSTRUCTION.match(line)
        if found:
            operands = tuple(re.findall(r"%([\w.\-]+)", found["operands"]))
            if found["op"] in ("constant", "parameter"):
                operands = (found["operands"],)
            current[found["name"]] = _Instruction(
                found["name"], found["op"], found["type"], operands, found["rest"],
                bool(found["root"]),
            )  # fmt: skip
    if not entry:
        raise ValueError("this is no HLO module: it has no ENTRY computation")
    return computations, entry


def _visit(
    computations: Mapping[str, _Computation], name: str, times: int, mesh: Mapping[str, int]
) -> Iterator[Collective]:
    live = _live(computations[name])
    users = _users(live)
    seen = set()
    for one in live.values():
        kind = one.op.removesuffix("-start")
        if kind in KINDS:
            # What the partitioner gathers twice from one place is gathered once: XLA's pass
            # all-gather-cse merges them.
            group = _group(one, kind, mesh)
            key = (kind, one.operands, group, one.attribute("dimensions"))
            if key not in seen:
                yield from _read(one, kind, group, mesh, times, live, users)
            seen.add(key)
        elif one.op == "while":
            body, runs = one.attribute("body"), _runs(one, computations)
            yield from _visit(computations, str(body), times * runs, mesh)
        else:
            for called in _called(one):
                yield from _visit(computations, called, times, mesh)


def _called(one: _Instruction) -> list[str]:
    """Computations that an instruction runs once; of a conditional all, whichever is taken."""
    if one.op == "conditional":
        branches = re.search(r"branch_computations=\{([^}]*)\}", one.rest)
        names = re.findall(r"%([\w.\-]+)", branches[1]) if branches else []
        both = (one.attribute("true_computation"), one.attribute("false_computation"))
        return names + [name for name in both if name]
    called = {"call": "to_apply", "fusion": "calls", "async-start": "calls"}.get(one.op)
    name = one.attribute(called) if called else None
    return [name] if name else []


def _read(
    one: _Instruction,
    kind: str,
    group: Group,
    mesh: Mapping[str, int],
    times: int,
    live: _Computation,
    users: Mapping[str, list[_Instruction]],
) -> Iterator[Collective]:
    source = re.search(r'op_name="([^"]*)"', one.rest)
    sizes: dict[str, float] = {}
    for operand in one.operands:
        for dtype, shape in _ARRAY.findall(live[operand].type):
            size = math.prod(map(int, filter(None, shape.split(",")))) * _bits(dtype) / 8
            sizes[dtype] = sizes.get(dtype, 0.0) + size
    for dtype, size in sizes.items():
        yield Collective(
            kind="reduce-scatter" if _scattered(one, len(group), live, users) else kind,
            dtype=dtype,
            bytes=size * (len(group) if kind == "all-gather" else 1),
            group=len(group),
            axes=spanned(group, mesh),
            count=times,
            source=source[1] if source else "",
        )


def _group(one: _Instruction, kind: str, mesh: Mapping[str, int]) -> Group:
    if kind == "collective-permute":
        pairs = re.search(r"source_target_pairs=(\{\{.*?\}\})", one.rest)
        moved = re.findall(r"\{(\d+),(\d+)\}", pairs[1] if pairs else "")
        apart = [(int(a), int(b)) for a, b in moved if a != b]
        return apart[0] if apart else (0,)
    return devices_of(one.rest, mesh)


def _scattered(
    one: _Instruction, group: int, live: _Computation, users: Mapping[str, list[_Instruction]]
) -> bool:
    """Whether of an all-reduce each device keeps a slice of 1 / group alone."""
    if one.op != "all-reduce" or one.type.startswith("("):
        return False
    slices = list(_final_users(one, users))
    return bool(slices) and all(
        user.op == "dynamic-slice" and _elements(user.type) * group == _elements(one.type)
        for user in slices
    )


def _final_users(
    one: _Instruction, users: Mapping[str, list[_Instruction]]
) -> Iterator[_Instruction]:
    """What uses an instruction, looking through those that only arrange elements anew."""
    for user in users.get(one.name, []):
        if user.op in _THROUGH:
            yield from _final_users(user, users)
        else:
            yield user


def _live(computation: _Computation) -> _Computation:
    """Those instructions that the result depends on, in their order."""
    reached: set[str] = set()
    waiting = [one.name for one in computation.values() if one.root]
    while waiting:
        name = waiting.pop()
        if name not in reached and name in computation:
            reached.add(name)
            waiting += computation[name].operands
    return {name: one for name, one in computation.items() if name in reached}


def _users(computation: _Computation) -> dict[str, list[_Instruction]]:
    users: dict[str, list[_Instruction]] = {}
    for one in computation.values():
        for operand in one.operands:
            users.setdefault(operand, []).append(one)
    return users


def _runs(loop: _Instruction, computations: Mapping[str, _Computation]) -> int:
    """How often a loop runs: as XLA says, or as its condition `i < constant` does, i from 0 on."""
    known = re.search(r'known_trip_count"?:\s*\{"n":"(\d+)"\}', loop.rest)
    if known:
        return int(known[1])
    condition = computations[str(loop.attribute("condition"))]
    root = next(one for one in condition.values() if one.root)
    if root.op == "compare" and "direction=LT" in root.rest and len(root.operands) == 2:
        limit = condition.get(root.operands[1])
        if limit is not None and limit.op == "constant" and limit.operands[0].isdigit():
            return int(limit.operands[0])
    raise ValueError(f"the program does not say how often the loop {loop.name} runs")


def _elements(type_: str) -> int:
    return sum(
        math.prod(map(int, filter(None, shape.split(",")))) for _, shape in _ARRAY.findall(type_)
    )


def _bits(dtype: str) -> int:
    """Bits of an element: the number in the name of its type, as in `bf16`, `s32` or `f8e4m3fn`."""
    if dtype in _BITS:
        return _BITS[dtype]
    digits = re.match(r"[a-z]+(\d+)", dtype)
    if digits is None:
        raise ValueError(f"unknown element type {dtype!r} in the program")
    return int(digits[1])
