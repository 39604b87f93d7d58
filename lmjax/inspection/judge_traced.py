"""Compares a traced program with its policy.

Knows the rules of `asked.py` and what `traced.py` reads.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from typing import Final

from lmjax.hlo.scopes import Scope
from lmjax.inspection.asked import Asked, AskedProduct, asked_of, same
from lmjax.inspection.facts import Fact, OperationKind, is_float, narrower
from lmjax.inspection.rows import TRACED, AuditRow, AuditTable, AuditVerdict, Direction
from lmjax.inspection.traced import Equation, RoundedTo, TracedProgram
from lmjax.precision.asides import ASIDES
from lmjax.precision.policy import SitePolicy
from lmjax.precision.sites import Layout

TENSORS: Final = {
    OperationKind.ARITHMETIC: "arithmetic",
    OperationKind.EXPONENTIAL: "exponentials",
    OperationKind.SUM: "sums",
    OperationKind.CAST: "casts",
    OperationKind.KERNEL: "kernel",
    OperationKind.PRODUCT: "products",
}
_F32_PRODUCTS: Final = ("HIGHEST", "F32_F32_F32", "F64_F64_F64", "DOT_F32_F32_F32")
FREE: Final = "measuring"
"""The part of a step whose formats are its own affair."""
_COTANGENTS: Final = "add_any"
"""JAX's sum of the cotangents of a tensor that is used more than once, in its own dtype."""


class TracedJudge:
    """Fills a table with what was asked and traced.

    Attributes:
      table: the rows.
    """

    def __init__(self, layout: Layout, sites: Mapping[str, SitePolicy], *, on_gpus: bool = False):
        self._on_gpus = on_gpus
        self.layout, self.sites, self.table = layout, sites, AuditTable()
        self._asked: dict[str, Asked] = {}
        self._rounded: dict[tuple[str, str], set[str]] = defaultdict(set)
        self._seen: dict[tuple[str, str, str], dict[str, None]] = defaultdict(dict)

    def label(self, scope: Scope) -> str:
        """The site as rows name it: `blocks/0-3/mlp/up`."""
        if not scope.members:
            return scope.path
        return self.layout.stack.member(scope.members, scope.path)

    def asked(self, scope: Scope) -> Asked | None:
        """What is asked of a site; None for parts of a step."""
        if not self.layout.has(scope.path):
            return None
        first = scope.members.partition("-")[0]
        path = self.layout.stack.member(first, scope.path) if first else scope.path
        if path not in self._asked:
            self._asked[path] = asked_of(self.layout, self.sites, path)
        return self._asked[path]

    def row(self, scope: Scope, tensor: str) -> AuditRow:
        """A row of a site, with what is asked of it."""
        return self.table.row(self.label(scope), direction_of(scope), tensor)

    def read(self, program: TracedProgram) -> None:
        """Compares all of a traced program."""
        self._roundings(program)
        for equation, fact in program.facts:
            if fact.scope is None:
                self._outside(fact)
            elif fact.scope.path == FREE or equation.constant:
                continue
            elif fact.aside:
                self._aside(fact, fact.scope)
            elif not fact.rounding:
                self._fact(equation, fact, fact.scope)
        self._handed_on(program)
        for key, seen in self._seen.items():
            self.table.row(key[0], key[1], key[2]).traced = "; ".join(seen)  # type: ignore[arg-type]

    def _say(self, row: AuditRow, text: str) -> None:
        self._seen[row.site, row.direction, row.tensor].setdefault(text)

    def _outside(self, fact: Fact) -> None:
        if fact.kind in (OperationKind.PRODUCT, OperationKind.KERNEL):
            row = self.table.row("outside of sites", "", "products")
            self._say(row, _product_text(fact))
            row.note("product outside a site", f"{fact.name} {at(fact)}", TRACED)

    def _roundings(self, program: TracedProgram) -> None:
        """Formats that are emulated: what is rounded, and whether anything asked for it."""
        for scope, role, rounding in program.roundings():
            if scope is None or scope.path == FREE:
                continue
            self._rounded[self.label(scope), role].add(rounding)
            asked = self.asked(scope)
            allowed = asked.roundings if asked else self._stored(scope)
            row = self.table.row(self.label(scope), "", f"rounded to {rounding}")
            row.asked, row.traced = rounding, role or "yes"
            if not any(same(rounding, one) for one in allowed):
                row.asked = ""
                text = f"rounds to {rounding}, which nothing asks for"
                row.note("unasked rounding", text, TRACED)

    def _stored(self, scope: Scope) -> set[str]:
        """Every format that a part of a step may round to: those of parameters and moments."""
        found: set[str] = set()
        for site in self.sites.values():
            found |= {site.params.name, site.reduce.name, str(site.mu), str(site.nu)}
            found |= {site.mu.format.name, site.nu.format.name, site.compute.name}
            found |= {site.mu.scale.name, site.nu.scale.name}
        return found

    def _aside(self, fact: Fact, scope: Scope) -> None:
        row = self.row(scope, f"aside: {fact.aside}")
        row.asked = ASIDES[fact.aside]
        self._say(row, fact.result)

    def _fact(self, equation: Equation, fact: Fact, scope: Scope) -> None:
        asked = self.asked(scope)
        if fact.weak:
            text = f"an array of a weak type becomes {fact.result} {at(fact)}"
            self.row(scope, "casts").note("weak-type promotion", text, TRACED)
        if fact.kind is OperationKind.KERNEL:
            row = self.row(scope, "kernel")
            self._say(row, f"{fact.name} of {', '.join(dict.fromkeys(fact.operands))}")
            row.note(
                "kernel", f"{fact.name}: no text shows its inside", TRACED, AuditVerdict.OPAQUE
            )
        elif asked is None:
            self._part(fact, scope)
        elif fact.kind is OperationKind.PRODUCT:
            self._product(equation, fact, scope, asked)
        elif fact.kind is OperationKind.CAST:
            self._cast(fact, scope, asked)
        else:
            self._elementwise(fact, scope, asked)

    # --- products

    def _product(self, equation: Equation, fact: Fact, scope: Scope, asked: Asked) -> None:
        site = asked.site.site
        row = self.row(scope, fact.role or "products")
        self._say(row, _product_text(fact))
        if not site.is_product:
            text = f"{fact.name} at a site declared as {site.kind.value} {at(fact)}"
            row.note("product outside a site", text, TRACED)
            return
        roles = [fact.role] if fact.role else ["y", "dx", "dw"]
        wanted = [asked.product(role) for role in roles]
        row.asked = " or ".join(dict.fromkeys(map(str, wanted)))
        origins = [equation.origin(index, scope.path) for index in range(2)]
        wrong = [self._mismatches(origins, one) for one in wanted]
        best = min(wrong, key=len)
        for kind, text in best:
            row.note(kind, f"{text} {at(fact)}", TRACED)
        self._sums(row, fact, wanted[wrong.index(best)], origins)

    def _mismatches(
        self, origins: list[RoundedTo | None], wanted: AskedProduct
    ) -> list[tuple[str, str]]:
        """What is wrong with the operands, in the better of the two orders."""
        orders = (wanted.operands, wanted.operands[::-1])
        found = [
            [wrong for pair in zip(origins, order, strict=True) if (wrong := _mismatch(*pair))]
            for order in orders
        ]
        return min(found, key=len)

    def _sums(
        self, row: AuditRow, fact: Fact, wanted: AskedProduct, origins: list[RoundedTo | None]
    ) -> None:
        as_operands = self._on_gpus and not wanted.exact and fact.result in fact.operands
        if as_operands and narrower(fact.result, wanted.sums):
            text = f"with m=default, parts of a sum may be rounded to {fact.result} {at(fact)}"
            row.note("parts rounded", text, TRACED, AuditVerdict.PASS)
        elif narrower(fact.result, wanted.sums):
            text = f"sums in {fact.result} where {wanted.sums} was asked {at(fact)}"
            row.note("narrow accumulation", text, TRACED)
        rounded = {wanted.sums, *self._rounded[row.site, fact.role]}
        if wanted.accumulator not in rounded:
            text = f"no sum is rounded to {wanted.accumulator} {at(fact)}"
            row.note("missing rounding", text, TRACED)
        # Numbers that were rounded to a narrow format are exact at any precision.
        narrow = [one is not None and narrower(one.format, "f32") for one in origins]
        wide = [dtype for dtype in fact.operands if dtype in ("f32", "f64") and not all(narrow)]
        if wide and wanted.exact and fact.precision not in _F32_PRODUCTS:
            text = f"{fact.precision} for {wide[0]} operands {at(fact)}"
            row.note("default-precision product", text, TRACED)
        elements = [name.partition("@")[0] for name in wanted.operands]
        widened = {d for d in fact.operands if not any(same(d, e) for e in elements)}
        if widened and is_float(next(iter(widened))):
            text = f"{' x '.join(wanted.operands)} multiplied as {', '.join(sorted(widened))}"
            row.note("emulated", text, TRACED, AuditVerdict.PASS)

    # --- everything else at a site

    def _elementwise(self, fact: Fact, scope: Scope, asked: Asked) -> None:
        row = self.row(scope, TENSORS[fact.kind])
        allowed = asked.sums if fact.kind is OperationKind.SUM else asked.elementwise
        row.asked = " or ".join(sorted(allowed))
        self._say(row, fact.result)
        if fact.role:
            allowed = allowed | {asked.product(fact.role).sums}
        if fact.result in allowed or fact.name == _COTANGENTS:
            return
        text = f"{fact.name} in {fact.result} where {asked.compute} was asked {at(fact)}"
        narrow = any(narrower(fact.result, one) for one in allowed)
        row.note("narrowed" if narrow else "silent upcast", text, TRACED)

    def _cast(self, fact: Fact, scope: Scope, asked: Asked) -> None:
        row = self.row(scope, "casts")
        before = fact.operands[0] if fact.operands else "integers"
        formats = (asked.site.params, asked.site.compute, asked.site.output)
        row.asked = ", ".join(sorted({f.name for f in formats} | ({asked.arrives} - {""})))
        self._say(row, f"{before} to {fact.result}")
        if not narrower(fact.result, before) or fact.role:
            return
        allowed = asked.roundings
        if scope.backward:  # a cotangent returns in the format that its tensor came in
            allowed = allowed | {site.output.name for site in self.sites.values()}
        if not any(same(fact.result, one) for one in allowed if one):
            text = f"{before} cast to {fact.result}, which nothing asks for {at(fact)}"
            row.note("narrowed", text, TRACED)

    def _part(self, fact: Fact, scope: Scope) -> None:
        """Parts of a step compute in f32, but gradients are summed as `r` says."""
        if fact.kind is OperationKind.CAST:
            return
        row = self.row(scope, TENSORS[fact.kind])
        allowed = {"f32", "f64"}
        if scope.path == "reduction":
            allowed |= {site.reduce.name for site in self.sites.values()}
        row.asked = ", ".join(sorted(allowed - {"f64"}))
        if fact.kind is not OperationKind.PRODUCT:
            self._say(row, fact.result)
            if fact.result not in allowed:
                text = f"{fact.name} in {fact.result} where f32 was asked {at(fact)}"
                row.note("narrowed", text, TRACED)
            return
        self._say(row, _product_text(fact))
        if not set(fact.operands) <= allowed:
            row.note("narrowed", f"{_product_text(fact)} {at(fact)}", TRACED)
        elif fact.precision not in _F32_PRODUCTS:
            text = f"{fact.precision} for {fact.operands[0]} operands {at(fact)}"
            row.note("default-precision product", text, TRACED)

    def _handed_on(self, program: TracedProgram) -> None:
        """What other sites read of a site, in the forward pass."""
        for scope, origin in program.handed_on():
            asked = self.asked(scope)
            if asked is None or not is_float(origin.format.partition("@")[0]):
                continue
            row = self.row(scope, "result")
            row.asked = ", ".join(sorted(asked.handed_on))
            self._say(row, origin.format)
            fits = any(
                same(origin.format, one) or (narrower(origin.format, one) and not origin.here)
                for one in asked.handed_on
            )
            if not fits:
                narrow = all(narrower(origin.format, one) for one in asked.handed_on)
                text = f"hands on {origin.format} where {row.asked} was asked"
                row.note("narrowed" if narrow else "silent upcast", text, TRACED)


def _mismatch(origin: RoundedTo | None, wanted: str) -> tuple[str, str] | None:
    """What is wrong with one operand, if anything: a kind and words."""
    if origin is None or same(origin.format, wanted):
        return None
    if narrower(origin.format, wanted) and not origin.here:
        return None
    text = f"multiplies {origin.format} numbers where {wanted} was asked"
    if narrower(wanted.partition("@")[0], origin.format):
        plain = is_float(wanted) and wanted in ("f32", "bf16", "f16", "f64")
        return ("silent upcast" if plain else "missing rounding"), text
    if narrower(origin.format, wanted):
        return "narrowed", text
    return "wrong rounding", text


def direction_of(scope: Scope) -> Direction:
    """The pass that a scope belongs to."""
    return "backward" if scope.backward else "forward"


def at(fact: Fact) -> str:
    """Where a fact comes from, in parentheses."""
    return f"({fact.where})" if fact.where else ""


def _product_text(fact: Fact) -> str:
    asks = f", {fact.precision}" if fact.precision not in ("", "DEFAULT") else ""
    return f"{' x '.join(fact.operands)} to {fact.result}{asks}"
