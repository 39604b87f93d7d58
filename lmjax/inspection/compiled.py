"""Reads compiled programs: a `Fact` for each instruction that rounds, and what became of roundings.

Instructions are paired with the equations that they were made for by their names (`key_of`).

Knows the format of HLO text, and layouts of sites.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Final

from lmjax.hlo import operations
from lmjax.hlo.collectives import Collective, collectives
from lmjax.hlo.module import (
    Computation,
    Instruction,
    Module,
    executed,
    parse,
    shapes,
    users_of,
    word_set,
)
from lmjax.hlo.scopes import Scope, located
from lmjax.inspection.facts import (
    Fact,
    OperationKind,
    format_name,
    format_of,
    is_float,
    key_of,
    narrower,
    rounding_of,
)
from lmjax.inspection.kernels import PRODUCT_TARGETS, YNN, documented
from lmjax.precision.sites import Layout

EXPONENTIALS: Final = word_set(
    """
    exponential exponential-minus-one log log-plus-one logistic tanh erf power sine cosine tan
    sqrt rsqrt cbrt
    """
)
SUMS: Final = word_set("reduce reduce-window scatter select-and-scatter")
ARITHMETIC: Final = word_set("add subtract multiply divide remainder atan2")
_THROUGH: Final = word_set(
    """
    bitcast copy reshape transpose broadcast slice dynamic-slice reverse concatenate select negate
    abs maximum minimum copy-start copy-done get-tuple-element optimization-barrier dynamic-
    update-slice pad gather
    """
)
_DEEPEST: Final = 12
_NEAR: Final = 5
"""Steps to the nearest instruction that a scope names."""


@dataclass(frozen=True)
class LostRounding:
    """A rounding that the traced program has and the compiled one has not.

    Attributes:
      fact: the instruction that keeps more than was traced.
      traced: the format that its numbers should have.
    """

    fact: Fact
    traced: str


class CompiledProgram:
    """A compiled program.

    Args:
      text: that of its HLO module.
      layout, parts: what its scopes may name.
      mesh: sizes of the mesh axes that it was partitioned for.
    """

    def __init__(
        self, text: str, layout: Layout, parts: Collection[str], mesh: Mapping[str, int]
    ) -> None:
        self._layout, self._parts = layout, parts
        self.collectives: list[Collective] = collectives(text, mesh) if _divided(mesh) else []
        self.module: Module = parse(text)
        self._pairs = [
            (one, self._fact(one, running, times))
            for running, times, _ in executed(self.module)
            for one in running.values()
        ]
        self.facts: list[Fact] = [fact for _, fact in self._pairs if fact is not None]

    def results(self) -> dict[str, set[str]]:
        """The formats of everything that was made for an operation, by its key."""
        found: dict[str, set[str]] = {}
        for one, _ in self._pairs:
            dtypes = {format_name(dtype) for dtype, _ in shapes(one.type)}
            found.setdefault(key_of(one.source), set()).update(dtypes)
        return found

    def roundings(self) -> Counter[tuple[Scope, str]]:
        """How many instructions round to each emulated format, by site."""
        found: Counter[tuple[Scope, str]] = Counter()
        for one, _ in self._pairs:
            scope, words = located(one.source, self._layout, self._parts)
            if scope is not None and (rounding := rounding_of(words)):
                found[scope, rounding] += 1
        return found

    def kernels(self) -> dict[str, str]:
        """Kernels whose inside no text shows, and what their makers document; by name."""
        found = (one for one, _ in self._pairs if one.op == "custom-call")
        names = dict.fromkeys(_target(one) for one in found)
        return {name: documented(name) for name in names if documented(name)}

    def unrounded_reductions(self) -> Iterator[tuple[Scope, str]]:
        """Yields roundings that YNNPACK leaves out, before a reduction: site, format."""
        for running, _, fusion in executed(self.module):
            if fusion is None or YNN not in fusion.rest:
                continue
            users = users_of(running)
            for one in running.values():
                before = running.get(one.operands[0]) if one.op == "convert" else None
                if before is None:
                    continue
                rounded, wide = (format_name(shapes(o.type)[0][0]) for o in (one, before))
                scope = self.scope(self._source(one))
                if narrower(rounded, wide) and _is_reduced(one, users) and scope is not None:
                    yield scope, rounded

    def scope(self, source: str) -> Scope | None:
        """The site or part of a step that an instruction's source names."""
        return located(source, self._layout, self._parts)[0]

    def lost(self, traced: Mapping[str, Collection[str]]) -> Iterator[LostRounding]:
        """Yields the roundings that were dropped.

        Args:
          traced: the formats of the results of traced operations, by their key.
        """
        for one, fact in self._pairs:
            if fact is None or fact.kind not in (
                OperationKind.ARITHMETIC,
                OperationKind.EXPONENTIAL,
            ):
                continue
            asked = [format_of(name) for name in traced.get(fact.key, ())]
            own = format_of(fact.result)
            if not asked or own is None or any(one is None for one in asked):
                continue
            widest = max((one for one in asked if one is not None), key=lambda f: f.mantissa_bits)
            if widest.mantissa_bits >= own.mantissa_bits:
                continue
            if not self._rounded(one, widest.mantissa_bits, fact.key, 0):
                yield LostRounding(fact, widest.name)

    def _fact(self, one: Instruction, running: Computation, times: int) -> Fact | None:
        kind, results = _kind(one), shapes(one.type)
        if kind is None or not results or (kind is OperationKind.SUM and not self._adds(one)):
            return None
        result, shape = format_name(results[0][0]), results[0][1]
        operands = tuple(
            format_name(dtype)
            for name in one.operands
            if name in running
            for dtype, _ in shapes(running[name].type)[:1]
            if is_float(format_name(dtype)) or (kind is OperationKind.PRODUCT and dtype == "s8")
        )
        whole = kind is OperationKind.PRODUCT and result in ("s32", "int32")
        if not (is_float(result) or whole) or (
            kind is OperationKind.CAST and operands in ((), (result,))
        ):
            return None
        source = self._source(one)
        scope, words = located(source, self._layout, self._parts)
        name = _target(one) if one.op == "custom-call" else one.op
        return Fact(
            kind, name, scope, words[:-1], operands, result, shape,
            precision=_precision(one) if kind is OperationKind.PRODUCT else "",
            flops=times * operations.flops_of(one, running),
            key=key_of(source),
            makers=self._makers(one) if kind is OperationKind.PRODUCT else frozenset(),
        )  # fmt: skip

    def _makers(self, one: Instruction) -> frozenset[str]:
        """The nearest sites or parts that the operands of an instruction come from."""
        found, waiting, seen = set(), [one], {one.name}
        while waiting:
            for source in self._sources(waiting.pop()):
                if source.name in seen:
                    continue
                seen.add(source.name)
                scope = self.scope(source.source)
                if scope is None or source.op == "parameter":
                    waiting.append(source)
                else:
                    found.add(scope.path)
        return frozenset(found)

    def _sources(self, one: Instruction) -> list[Instruction]:
        """What an instruction reads; of a parameter of a fusion, what that is given."""
        home = self._home[one.name]
        if one.op != "parameter":
            return [home[name] for name in one.operands if name in home]
        caller = self._callers.get(id(home))
        if caller is None:
            return []
        return [self._home[caller.name][caller.operands[int(one.operands[0])]]]

    def _adds(self, one: Instruction) -> bool:
        """Whether a reduction rounds: a maximum does not."""
        applied = self.module.computations.get(str(one.attribute("to_apply")), {})
        return any(inner.op in ARITHMETIC for inner in applied.values())

    def _source(self, one: Instruction) -> str:
        """What an instruction was made for; without a site of its own, what the nearest one was."""
        seen, nearest = {one.name}, [one]
        for _ in range(_NEAR):
            for near in nearest:
                if self.scope(near.source) is not None:
                    return near.source
            around = [other for near in nearest for other in self._around(near)]
            nearest = [other for other in around if other.name not in seen]
            seen |= {other.name for other in nearest}
        return one.source

    def _around(self, one: Instruction) -> Iterator[Instruction]:
        """What uses an instruction, what it uses, and the fusion that it is in."""
        home = self._home[one.name]
        caller = self._callers.get(id(home))
        yield from self._users_of(one)
        yield from (home[name] for name in one.operands if name in home)
        if caller is not None:
            yield caller

    @cached_property
    def _home(self) -> dict[str, Computation]:
        """The computation of every instruction, by its name."""
        every = self.module.computations.values()
        return {name: computation for computation in every for name in computation}

    @cached_property
    def _callers(self) -> dict[int, Instruction]:
        """The fusion that each fused computation belongs to."""
        found = {}
        for computation in self.module.computations.values():
            for one in computation.values():
                called = one.attribute("calls") if one.op == "fusion" else None
                if called in self.module.computations:
                    found[id(self.module.computations[str(called)])] = one
        return found

    @cached_property
    def _users(self) -> dict[int, dict[str, list[Instruction]]]:
        return {}

    def _users_of(self, one: Instruction) -> list[Instruction]:
        home = self._home[one.name]
        if id(home) not in self._users:
            self._users[id(home)] = users_of(home)
        return self._users[id(home)].get(one.name, [])

    def _rounded(self, one: Instruction, bits: int, key: str, depth: int) -> bool:
        """Whether every use of an instruction rounds it to a mantissa of `bits`, or cannot tell."""
        if depth > _DEEPEST:
            return True
        caller = self._callers.get(id(self._home[one.name]))
        outside = [caller] if one.root and caller is not None else []
        if one.root and caller is None:  # it leaves the program, or one round of a loop
            return self._home[one.name] is not self.module.computations[self.module.entry]
        uses = [self._uses_rounded(one, user, bits, key, depth) for user in self._users_of(one)]
        return all(uses) and all(self._rounded(user, bits, key, depth + 1) for user in outside)

    def _uses_rounded(
        self, one: Instruction, user: Instruction, bits: int, key: str, depth: int
    ) -> bool:
        result = shapes(user.type)
        if user.op == "tuple" and user.root:
            return self._leaves_rounded(one, user, bits, key, depth)
        found = format_of(format_name(result[0][0])) if result else None
        if user.op in ("convert", "reduce-precision"):
            return found is None or found.mantissa_bits <= bits or user.op == "reduce-precision"
        if key_of(user.source) == key or found is None:
            return True
        if user.op in _THROUGH:  # the numbers are the same
            return self._rounded(user, bits, key, depth + 1)
        if user.op == "fusion":
            called = self.module.computations.get(str(user.attribute("calls")), {})
            inside = [
                parameter
                for parameter in called.values()
                if parameter.op == "parameter"
                and one.name == user.operands[int(parameter.operands[0])]
            ]
            return all(self._rounded(parameter, bits, key, depth + 1) for parameter in inside)
        return user.op not in (*ARITHMETIC, *EXPONENTIALS, "reduce", "dot", "convolution")

    def _leaves_rounded(
        self, one: Instruction, root: Instruction, bits: int, key: str, depth: int
    ) -> bool:
        """The same of an instruction that is one of several results of its computation."""
        home = self._home[one.name]
        caller = self._callers.get(id(home))
        if caller is None:
            return home is not self.module.computations[self.module.entry]
        places = {str(i) for i, name in enumerate(root.operands) if name == one.name}
        taken = [u for u in self._users_of(caller) if u.attribute("index") in places]
        return all(self._rounded(user, bits, key, depth + 1) for user in taken)


def _divided(mesh: Mapping[str, int]) -> bool:
    return math.prod(mesh.values()) > 1


def _is_reduced(one: Instruction, users: Mapping[str, list[Instruction]]) -> bool:
    """Whether a reduction reads an instruction, or what elementwise operations make of it."""
    return any(
        user.op == "reduce" or (user.op != "dot" and _is_reduced(user, users))
        for user in users.get(one.name, ())
    )


def _kind(one: Instruction) -> OperationKind | None:
    if one.op in ("dot", "convolution"):
        return OperationKind.PRODUCT
    if one.op == "custom-call":
        target = _target(one)
        if target in PRODUCT_TARGETS:
            return OperationKind.PRODUCT
        return OperationKind.KERNEL if documented(target) else None
    if one.op in ARITHMETIC:
        return OperationKind.ARITHMETIC
    if one.op in EXPONENTIALS:
        return OperationKind.EXPONENTIAL
    if one.op in SUMS:
        return OperationKind.SUM
    return OperationKind.CAST if one.op in ("convert", "reduce-precision") else None


def _target(one: Instruction) -> str:
    found = re.search(r'custom_call_target="([^"]*)"', one.rest)
    return found[1] if found else ""


def _precision(one: Instruction) -> str:
    """What the instruction says of the precision of its product; `DEFAULT` if nothing."""
    algorithm = re.search(r"\balgorithm=(\w+)|\"algorithm\":\"(ALG_DOT_\w+)\"", one.rest)
    if algorithm:
        return (algorithm[1] or algorithm[2]).removeprefix("ALG_").upper()
    plain = re.search(r"operand_precision=\{(\w+)", one.rest)
    json = re.search(r'"operand_precision":\["(\w+)"', one.rest)
    found = plain or json
    return found[1].upper() if found else "DEFAULT"
