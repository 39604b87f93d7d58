"""Compares a compiled program with the traced one and with the policy.

Knows the rules of `asked.py`, and what `traced.py` and `compiled.py` read.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Final

from lmjax.hlo.collectives import Collective
from lmjax.hlo.scopes import Scope
from lmjax.inspection.asked import same
from lmjax.inspection.compiled import CompiledProgram
from lmjax.inspection.facts import Fact, OperationKind, format_name, is_float, narrower
from lmjax.inspection.judge_traced import FREE, TENSORS, TracedJudge
from lmjax.inspection.kernels import YNN, documented
from lmjax.inspection.rows import AuditRow, AuditVerdict
from lmjax.inspection.traced import TracedProgram

SUMMING: Final = ("all-reduce", "reduce-scatter")
_EXACT_F32: Final = ("HIGHEST", "DOT_F32_F32_F32", "DOT_BF16_BF16_F32_X9", "DOT_F64_F64_F64")
_IN_PASSES: Final = {"tpu": "one bf16 pass", "gpu": "TF32"}


@dataclass(frozen=True)
class CompiledFor:
    """What a program was compiled for.

    Attributes:
      name: in the table: `cpu`, `h100:8`.
      platform: JAX's name: `cpu`, `gpu`, `tpu`.
      mesh: sizes of its mesh axes.
    """

    name: str
    platform: str
    mesh: Mapping[str, int]


class CompiledJudge:
    """Adds the column of one target to a table.

    Args:
      judge: holds the table, with what was asked and traced.
      program: the traced program.
      compiled: the compiled one.
      target: what for.
    """

    def __init__(
        self,
        judge: TracedJudge,
        program: TracedProgram,
        compiled: CompiledProgram,
        target: CompiledFor,
    ) -> None:
        self._judge, self._compiled, self._target = judge, compiled, target
        self._traced = program.facts
        self._facts = [fact for _, fact in program.facts]
        self._seen: dict[int, tuple[AuditRow, dict[str, None]]] = {}

    @cached_property
    def _results(self) -> dict[str, set[str]]:
        """The formats of the results of traced operations, by their key."""
        found: defaultdict[str, set[str]] = defaultdict(set)
        for fact in self._facts:
            found[fact.key].add(fact.result)
        return found

    @cached_property
    def _operands(self) -> dict[str, set[str]]:
        """The formats of the operands of traced products, by their key."""
        found: defaultdict[str, set[str]] = defaultdict(set)
        for fact in self._facts:
            if fact.kind is OperationKind.PRODUCT:
                found[fact.key] |= set(fact.operands)
        return found

    def read(self) -> None:
        """Compares all of the compiled program."""
        for fact in self._compiled.facts:
            if fact.scope is None:
                self._outside(fact)
            elif fact.aside and fact.scope.path != FREE:
                self._say(self._judge.row(fact.scope, f"aside: {fact.aside}"), fact.result)
            elif not fact.rounding and fact.scope.path != FREE:
                self._fact(fact, fact.scope)
        self._lost()
        self._roundings()
        self._missing()
        for scope, rounded in self._compiled.unrounded_reductions():
            row, text = self._judge.row(scope, "casts"), f"to {rounded} before a reduction"
            self._note(row, "elided rounding", f"{text}; {documented(YNN)}")
        for collective in self._compiled.collectives:
            self._collective(collective)
        for row, seen in self._seen.values():
            row.compiled[self._target.name] = "; ".join(seen)

    def _say(self, row: AuditRow, text: str) -> None:
        self._seen.setdefault(id(row), (row, {}))[1].setdefault(text)

    def _note(
        self, row: AuditRow, kind: str, text: str, verdict: AuditVerdict = AuditVerdict.FAIL
    ) -> None:
        row.note(kind, text, self._target.name, verdict)

    def _outside(self, fact: Fact) -> None:
        if fact.kind is OperationKind.PRODUCT:
            row = self._judge.table.row("outside of sites", "", "products")
            self._say(row, f"{' x '.join(fact.operands)} to {fact.result}")
            self._note(row, "product outside a site", fact.name)

    def _fact(self, fact: Fact, scope: Scope) -> None:
        tensor = (
            fact.role if fact.kind is OperationKind.PRODUCT and fact.role else TENSORS[fact.kind]
        )
        row = self._judge.row(scope, tensor)
        if fact.kind is OperationKind.KERNEL:
            self._say(row, fact.name)
            self._note(row, "kernel", f"{fact.name}: {documented(fact.name)}", AuditVerdict.OPAQUE)
        elif fact.kind is OperationKind.PRODUCT:
            text = f"{fact.name} {' x '.join(fact.operands)} to {fact.result}"
            if (merged := self._merged(fact)) is not None and merged.scope is not None:
                say = f"its operand is a product of {merged.scope.path}, and both are one: {text}"
                self._note(row, "merged", say, AuditVerdict.PASS)
                row = self._judge.row(merged.scope, merged.role or tensor)
                fact = replace(fact, key=merged.key)
            self._say(row, text)
            self._product(row, fact, scope)
        elif fact.kind is OperationKind.CAST:
            self._say(row, f"{fact.operands[0] if fact.operands else ''} to {fact.result}".strip())
        elif fact.key in self._operands:  # a product without a dot: multiplied and summed
            row = self._judge.row(scope, fact.role or TENSORS[OperationKind.PRODUCT])
            self._say(row, f"{fact.name} in {fact.result}")
        else:
            self._say(row, self._in_words(fact))
            self._narrowed(row, fact)

    def _merged(self, fact: Fact) -> Fact | None:
        """The traced product that this one is, if the compiler merged it with one that reads it.

        A product with ones is a sum, which XLA makes part of the product that is summed. That one
        is then missing; this has its operands, and sums in no fewer bits.
        """
        traced = self._operands.get(fact.key, set())
        if not traced or not all(narrower(o, t) for o in fact.operands for t in traced):
            return None
        there = {one.key for one in self._compiled.facts if one.kind is OperationKind.PRODUCT}
        for one in self._facts:
            alike = one.operands == fact.operands and not narrower(fact.result, one.result)
            missing = one.kind is OperationKind.PRODUCT and one.key not in there
            if missing and alike and one.scope is not None and one.scope.path in fact.makers:
                return one
        return None

    def _in_words(self, fact: Fact) -> str:
        """Its format; and where that is wider than what was traced, that it is rounded after."""
        traced = self._results.get(fact.key, {fact.result})
        wide = all(narrower(one, fact.result) for one in traced)
        return f"{fact.result}, rounded to {', '.join(sorted(traced))}" if wide else fact.result

    def _narrowed(self, row: AuditRow, fact: Fact) -> None:
        traced = self._results.get(fact.key)
        if traced and all(narrower(fact.result, one) for one in traced):
            text = f"{fact.name} in {fact.result} where {', '.join(sorted(traced))} was traced"
            allowed = fact.result in row.asked.split(" or ")
            verdict = AuditVerdict.PASS if allowed else AuditVerdict.FAIL
            self._note(row, "narrowed by the compiler", text, verdict)

    def _product(self, row: AuditRow, fact: Fact, scope: Scope) -> None:
        traced = self._operands.get(fact.key, set())
        narrow = {one for one in fact.operands if traced and all(narrower(one, t) for t in traced)}
        if narrow and is_float(next(iter(narrow))):
            text = f"multiplies {', '.join(narrow)} where {', '.join(sorted(traced))} was traced"
            self._note(row, "narrowed by the compiler", text)
        wide = [one for one in fact.operands if one not in traced and traced]
        if wide and not narrow:
            text = f"{', '.join(sorted(traced))} multiplied as {', '.join(dict.fromkeys(wide))}"
            self._note(row, "emulated", text, AuditVerdict.PASS)
        asked = self._judge.asked(scope)
        exact = asked is None or asked.site.matmul != "default"
        passes = _IN_PASSES.get(self._target.platform)
        f32 = fact.operands and set(fact.operands) == {"f32"}
        if f32 and passes and exact and fact.precision not in _EXACT_F32:
            text = f"f32 operands are multiplied in {passes}: the program says {fact.precision}"
            self._note(row, "tf32" if passes == "TF32" else "one-pass bf16", text)
        if documented(fact.name):
            self._note(row, "kernel", f"{fact.name}: {documented(fact.name)}", AuditVerdict.PASS)

    def _lost(self) -> None:
        for loss in self._compiled.lost(self._results):
            fact = loss.fact
            if fact.scope is None or fact.rounding or fact.aside or fact.scope.path == FREE:
                continue
            text = f"{fact.name} keeps {fact.result}; its rounding to {loss.traced} was dropped"
            self._note(self._judge.row(fact.scope, TENSORS[fact.kind]), "elided rounding", text)

    def _roundings(self) -> None:
        """Emulated roundings of which nothing is left."""
        there = self._compiled.roundings()
        for row in self._judge.table:
            kind, _, rounding = row.tensor.partition("rounded to ")
            if kind or not rounding:
                continue
            count = sum(
                times
                for (scope, found), times in there.items()
                if found == rounding and self._judge.label(scope) == row.site
            )
            row.compiled[self._target.name] = f"{count} instructions" if count else "none"
            if not count:
                self._note(row, "elided rounding", f"nothing of the rounding to {rounding} is left")

    def _missing(self) -> None:
        """Casts to narrower formats that the compiled program has nowhere."""
        there: defaultdict[str, set[str]] = defaultdict(set)
        for key, formats in self._compiled.results().items():
            there[key.rpartition("/")[0]] |= formats
        is_there = lambda fact: fact.result in there[fact.key.rpartition("/")[0]]
        casts = [
            fact
            for equation, fact in self._traced
            if fact.kind is OperationKind.CAST and fact.scope is not None
            if fact.operands and narrower(fact.result, fact.operands[0])
            if not (fact.rounding or fact.aside or equation.changes_nothing(fact.scope.path))
        ]
        # Weights that both passes round are rounded once.
        alike = lambda fact: (replace(fact.scope, backward=False), fact.result, fact.shape)
        done = {alike(fact) for fact in casts if is_there(fact)}
        for fact in casts:
            if not is_there(fact) and alike(fact) not in done and fact.scope is not None:
                text = f"the cast of {fact.operands[0]} to {fact.result} was dropped"
                self._note(self._judge.row(fact.scope, "casts"), "elided rounding", text)

    def _collective(self, one: Collective) -> None:
        scope, dtype = self._compiled.scope(one.source), format_name(one.dtype)
        if not is_float(dtype):
            return
        where = scope or Scope("outside of sites")
        row = self._judge.row(where, one.kind)
        self._say(row, f"{one.count} x {dtype}, {size(one.bytes)} over {' x '.join(one.axes)}")
        if one.kind not in SUMMING:
            row.asked = row.asked or "moves numbers"
            return
        allowed = self._summed(scope)
        row.asked = ", ".join(sorted(allowed))
        if not any(same(dtype, a) or narrower(a, dtype) for a in allowed):
            text = f"sums {dtype} over devices where {row.asked} was asked"
            self._note(row, "narrow all-reduce", text)

    def _summed(self, scope: Scope | None) -> set[str]:
        """The formats in which devices may sum what a scope computes."""
        asked = self._judge.asked(scope) if scope is not None else None
        if asked is None:
            parts = scope is not None and scope.path == "reduction"
            return {s.reduce.name for s in self._judge.sites.values()} if parts else {"f32"}
        site = asked.site
        return {site.reduce.name} if scope is not None and scope.backward else {asked.wide}


def size(count: float) -> str:
    """Bytes, in three digits."""
    for unit in ("B", "kB", "MB"):
        if count < 999.5:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} GB"
