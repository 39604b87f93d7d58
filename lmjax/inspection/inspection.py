"""One program, traced and compiled for any number of targets, compared with its policy.

Knows everything else in this room.
"""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Final

from lmjax.inspection.compiled import CompiledProgram
from lmjax.inspection.facts import Fact
from lmjax.inspection.judge_compiled import CompiledFor, CompiledJudge
from lmjax.inspection.judge_state import read_compiled_state, read_state
from lmjax.inspection.judge_traced import TracedJudge
from lmjax.inspection.rows import AuditFinding, AuditRow, AuditVerdict
from lmjax.inspection.traced import TracedProgram
from lmjax.precision.policy import SitePolicy
from lmjax.precision.sites import Layout

LEAST_ATTRIBUTED: Final = 0.999
"""Share of the floating-point operations of a program that must be known by site or part."""

COMPILER: Final = "compiler"
ATTENTION: Final = "attention"
"""The tensor in rows that say how an attention is computed."""
_OFF: Final = ("false", "0", False)
_DANGEROUS: Final = {
    "xla_allow_excess_precision": "roundings may be dropped",
    "xla_cpu_enable_fast_math": "fast-math: NaN, infinity, signed zeros and order are ignored",
    "xla_cpu_enable_fast_min_max": "fast-math: NaN may be lost in a minimum or maximum",
    "xla_gpu_enable_fast_min_max": "fast-math: NaN may be lost in a minimum or maximum",
    "xla_gpu_enable_cublaslt_fast_accum": "fp8 sums keep fewer bits than f32",
    "xla_tpu_enable_bf16_fast_math": "f32 operations may be done in bf16",
}
"""XLA's flags that change what numbers mean, if they are on."""


@dataclass(frozen=True)
class Share:
    """How many of a program's floating-point operations are known by site or part.

    Attributes:
      total: operations of a step on one device.
      attributed: share of them that a scope names.
      rest: the largest of the others: the operation, what it was made for, operations.
    """

    total: float
    attributed: float
    rest: tuple[tuple[str, str, float], ...]


@dataclass
class Inspection:
    """What was found of one program.

    Attributes:
      name: of the program: `train`, `evaluate`, `decode`.
      rows: one for each site and tensor, in the order of the model.
      shares: what is attributed, by target.
      targets: names of the columns of compiled programs.
    """

    name: str
    rows: list[AuditRow]
    shares: dict[str, Share] = field(default_factory=dict)
    targets: tuple[str, ...] = ()

    @property
    def verdict(self) -> AuditVerdict:
        """The worst of all rows."""
        return AuditVerdict.worst(row.verdict for row in self.rows)

    @property
    def findings(self) -> list[tuple[AuditRow, AuditFinding]]:
        """Everything that fails, with its row."""
        return [(r, f) for r in self.rows for f in r.findings if f.verdict is AuditVerdict.FAIL]

    def to_json(self) -> dict[str, Any]:
        """Strings and numbers alone."""
        return {
            "program": self.name,
            "verdict": self.verdict.value,
            "targets": list(self.targets),
            "attributed": {
                target: {
                    "operations": share.total,
                    "share": share.attributed,
                    "rest": [list(one) for one in share.rest],
                }
                for target, share in self.shares.items()
            },
            "rows": [row.to_json() for row in self.rows],
        }


def inspect(
    name: str,
    jaxpr: Any,
    compiled: Sequence[tuple[CompiledFor, str]],
    layout: Layout,
    sites: Mapping[str, SitePolicy],
    parts: Collection[str],
    options: Mapping[str, Any],
    forms: Mapping[str, object] = MappingProxyType({}),
) -> Inspection:
    """Compares a program with a policy.

    Args:
      name: of the program.
      jaxpr: the traced program, a `ClosedJaxpr`.
      compiled: text of the optimised HLO for each target.
      layout: the sites of the model.
      sites: the policy of every site.
      parts: names of scopes that are not sites.
      options: compiler options that it was compiled with.
      forms: how each attention is computed, and why so, as text, by the path of its softmax.
    """
    on_gpus = {target.platform for target, _ in compiled} == {"gpu"}
    judge = TracedJudge(layout, sites, on_gpus=on_gpus)
    program = TracedProgram(jaxpr, layout, parts)
    judge.read(program)
    read_state(judge, program)
    shares = {}
    for target, text in compiled:
        read = CompiledProgram(text, layout, parts, target.mesh)
        CompiledJudge(judge, program, read, target).read()
        read_compiled_state(judge, read.module, target.name)
        shares[target.name] = _share(read.facts)
        _enough(judge, shares[target.name], target.name)
    _flags(judge, options)
    for site, form in layout.merged({path: forms.get(path) for path in layout.paths}).items():
        if form is not None:
            judge.table.row(site, "", ATTENTION).traced = str(form)
    rows = judge.table.ordered(_order(layout, judge))
    return Inspection(name, rows, shares, tuple(target.name for target, _ in compiled))


def _share(facts: Collection[Fact]) -> Share:
    rest: dict[tuple[str, str], float] = defaultdict(float)
    for fact in facts:
        if fact.scope is None and fact.flops:
            rest[fact.name, fact.key] += fact.flops
    total = sum(fact.flops for fact in facts)
    known = 1.0 - sum(rest.values()) / total if total else 1.0
    largest = sorted(rest.items(), key=lambda item: -item[1])[:10]
    return Share(total, known, tuple((name, key, flops) for (name, key), flops in largest))


def _enough(judge: TracedJudge, share: Share, target: str) -> None:
    if share.attributed < LEAST_ATTRIBUTED:
        row = judge.table.row("outside of sites", "", "operations")
        text = f"{share.attributed:.2%} of the floating-point operations belong to a site or part"
        row.note("unattributed", text, target, AuditVerdict.OPAQUE)


def _flags(judge: TracedJudge, options: Mapping[str, Any]) -> None:
    """What the compiler, JAX and libraries were told that changes the meaning of numbers."""
    row = judge.table.row(COMPILER, "", "flags")
    row.asked = "every rounding takes place"
    words = os.environ.get("XLA_FLAGS", "").split()
    given = dict(word.lstrip("-").partition("=")[::2] for word in words) | dict(options)
    row.traced = ", ".join(f"{name}={value}" for name, value in sorted(given.items())) or "none"
    if given.get("xla_allow_excess_precision", True) not in _OFF:
        row.note("excess precision", "xla_allow_excess_precision is not off", "traced")
    for flag, meaning in _DANGEROUS.items():
        on = flag in given and given[flag] not in _OFF
        if on and flag != "xla_allow_excess_precision":
            row.note("fast-math", f"{flag}: {meaning}", "traced")
    if os.environ.get("NVIDIA_TF32_OVERRIDE") == "1":
        row.note("tf32", "NVIDIA_TF32_OVERRIDE=1: all f32 products use TF32", "traced")


def _order(layout: Layout, judge: TracedJudge) -> list[str]:
    """Names of rows in the order of the model; the members of a stack one after the other."""
    place = {path: index for index, path in enumerate(_stacked(layout))}
    names = dict.fromkeys(row.site for row in judge.table)
    inside = lambda name: layout.stack.holds(name)

    def rank(name: str) -> tuple[int, str, int]:
        """Sorts by place in the model; within a stack by member first, those in common before."""
        if inside(name):
            _, member, within = name.split("/", 2)
            path = layout.stack.path(within)
            number = member.partition("-")[0]
            first = min(index for p, index in place.items() if layout.stack.holds(p))
            single = member if member == number else ""
            key = "" if number == "*" else f"{number:>9} {single}"
            return (first, key, place.get(path, 0))
        return (place.get(name, len(place)), "", 0)

    return sorted(names, key=rank)


def _stacked(layout: Layout) -> list[str]:
    return [place.path for place in layout.places]


def default_target(mesh: Any) -> CompiledFor:
    """This machine's backend, with the axes of a mesh."""
    sizes = dict(zip(mesh.axis_names, mesh.devices.shape, strict=True))
    count = mesh.devices.size
    platform = mesh.devices.flat[0].platform
    name = platform if count == 1 else f"{platform}:{count}"
    return CompiledFor(name, platform, sizes)
