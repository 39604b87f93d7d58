"""Parses HLO text: computations, their instructions, and how often each of them runs.

The text is that of `compiled.as_text()` or of a dump after a pass.

Knows only the format of HLO text.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Final, NamedTuple

_BITS: Final = {"pred": 8, "c64": 64, "c128": 128}
_TUPLE = r"\((?:[^()]|\((?:[^()]|\((?:[^()]|\([^()]*\))*\))*\))*\)"
_TYPE = rf"{_TUPLE}|[\w\[\],{{}}:*()]+"
_INSTRUCTION = re.compile(
    rf"^\s+(?P<root>ROOT )?%(?P<name>[\w.\-]+) = (?P<type>{_TYPE}) (?P<op>[a-z][\w\-]*)"
    r"\((?P<operands>[^()]*)\)(?P<rest>.*)$"
)
_COMPUTATION = re.compile(r"^(?P<entry>ENTRY )?%?(?P<name>[\w.\-]+) \(.*\{$")
_ARRAY = re.compile(r"([a-z]\w*)\[([\d,]*)\]")


def word_set(text: str) -> frozenset[str]:
    """The words of a text, as names of operations."""
    return frozenset(text.split())


@dataclass(frozen=True)
class Instruction:
    """One instruction.

    Attributes:
      name: its name, without `%`.
      op: opcode, such as `dot` or `all-reduce-start`.
      type: type of its result: `f32[8,4]{1,0}`, or a tuple of such types.
      operands: names of instructions; for constants and parameters, the text in the parentheses.
      rest: the text after the operands: attributes and metadata.
      root: whether it is the result of its computation.
    """

    name: str
    op: str
    type: str
    operands: tuple[str, ...]
    rest: str
    root: bool

    @property
    def source(self) -> str:
        """JAX's name of the operation that it was generated for; empty if there is none."""
        found = re.search(r'op_name="([^"]*)"', self.rest)
        return found[1] if found else ""

    def quoted(self, name: str) -> str:
        """The value of an attribute in quotes, also of those in `backend_config`; or empty."""
        found = re.search(rf'\b{name}"?[=:] ?"([^"]*)"', self.rest)
        return found[1] if found else ""

    def attribute(self, name: str) -> str | None:
        """The value of an attribute that is a word or a list of numbers."""
        found = re.search(rf"\b{name}=%?([\w.\-]+|\{{[\d,]*\}})", self.rest)
        return found[1] if found else None


Computation = dict[str, Instruction]
"""Instructions by name, in the order of the text."""


@dataclass(frozen=True)
class Module:
    """The computations of a program by name, and the name of its entry computation."""

    computations: Mapping[str, Computation]
    entry: str


class Running(NamedTuple):
    """A computation that a program executes, without dead code.

    Attributes:
      computation: its instructions.
      times: how often it runs.
      fusion: the outermost fusion that it is part of, if any.
    """

    computation: Computation
    times: int
    fusion: Instruction | None


def executed(module: Module) -> Iterator[Running]:
    """Yields every computation that a program executes.

    Follows fusions, calls, branches and loops, but not the functions that a reduction or a sort
    applies to pairs of elements.

    Raises:
      ValueError: the text does not give the trip count of a loop.
    """
    yield from _executed(module.computations, module.entry, 1, None)


def _executed(
    computations: Mapping[str, Computation], name: str, times: int, fusion: Instruction | None
) -> Iterator[Running]:
    running = _live(computations[name])
    yield Running(running, times, fusion)
    for one in running.values():
        if one.op == "while":
            body = str(one.attribute("body"))
            yield from _executed(computations, body, times * _runs(one, computations), fusion)
        else:
            inside = fusion or (one if one.op == "fusion" else None)
            for called in _called(one):
                yield from _executed(computations, called, times, inside)


def parse(text: str) -> Module:
    """Parses the text of a module.

    Raises:
      ValueError: it has no entry computation.
    """
    text = re.sub(r"kernel_metadata=\{\n.*?\n\}", "kernel_metadata={}", text, flags=re.DOTALL)
    computations: dict[str, Computation] = {}
    current: Computation = {}
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
            current[found["name"]] = Instruction(
                found["name"], found["op"], found["type"], operands, found["rest"],
                bool(found["root"]),
            )  # fmt: skip
    if not entry:
        raise ValueError("not an HLO module: it has no ENTRY computation")
    return Module(computations, entry)


def _called(one: Instruction) -> list[str]:
    """Computations that an instruction runs once; for a conditional, all of its branches."""
    if one.op == "conditional":
        branches = re.search(r"branch_computations=\{([^}]*)\}", one.rest)
        names = re.findall(r"%([\w.\-]+)", branches[1]) if branches else []
        both = (one.attribute("true_computation"), one.attribute("false_computation"))
        return names + [name for name in both if name]
    called = {"call": "to_apply", "fusion": "calls", "async-start": "calls"}.get(one.op)
    name = one.attribute(called) if called else None
    return [name] if name else []


def _live(computation: Computation) -> Computation:
    """The instructions that the result depends on, in the order of the text."""
    reached: set[str] = set()
    waiting = [one.name for one in computation.values() if one.root]
    while waiting:
        name = waiting.pop()
        if name not in reached and name in computation:
            reached.add(name)
            waiting += computation[name].operands
    return {name: one for name, one in computation.items() if name in reached}


def users_of(computation: Computation) -> dict[str, list[Instruction]]:
    """The instructions that use each instruction, by its name."""
    users: dict[str, list[Instruction]] = {}
    for one in computation.values():
        for operand in one.operands:
            users.setdefault(operand, []).append(one)
    return users


def _runs(loop: Instruction, computations: Mapping[str, Computation]) -> int:
    """Trip count of a loop: XLA's, or that of its condition `i < constant` with i from 0."""
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


def shapes(type_: str) -> list[tuple[str, tuple[int, ...]]]:
    """Element type and shape of every array in a type: `[("f32", (8, 4))]`."""
    return [
        (dtype, tuple(map(int, filter(None, shape.split(",")))))
        for dtype, shape in _ARRAY.findall(type_)
    ]


def elements(type_: str) -> int:
    """Number of elements of all arrays in a type."""
    return sum(math.prod(shape) for _, shape in shapes(type_))


def bits(dtype: str) -> int:
    """Bits of an element: the number in the name of its type, as in `bf16`, `s32` or `f8e4m3fn`."""
    if dtype in _BITS:
        return _BITS[dtype]
    digits = re.match(r"[a-z]+(\d+)", dtype)
    if digits is None:
        raise ValueError(f"unknown element type {dtype!r} in the program")
    return int(digits[1])
