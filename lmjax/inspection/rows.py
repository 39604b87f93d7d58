"""The table of an audit: one row for each site and tensor, and what was found about it.

Knows nothing of programs.
"""

from __future__ import annotations

import enum
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, Final, Literal

Direction = Literal["", "forward", "backward"]


TRACED: Final = "traced"
"""The column of findings about a traced program."""


def traced_for(target: str) -> str:
    """The column of findings about what was traced for one of several targets alone."""
    return f"{target} {TRACED}"


class AuditVerdict(enum.Enum):
    """What is known of a row or of a whole program."""

    PASS = "pass"
    OPAQUE = "opaque"
    FAIL = "fail"

    @classmethod
    def worst(cls, verdicts: Iterable[AuditVerdict]) -> AuditVerdict:
        """A failure before anything opaque before a pass."""
        order = list(cls)
        return max(verdicts, key=order.index, default=cls.PASS)


@dataclass(frozen=True)
class AuditFinding:
    """Something to say about a row.

    Attributes:
      kind: what it is, in two or three words: `silent upcast`.
      text: what was found where what was asked.
      column: `traced`, or the target whose compiled program shows it; see `traced_for`.
      verdict: of the row because of it; PASS for a remark.
    """

    kind: str
    text: str
    column: str
    verdict: AuditVerdict = AuditVerdict.FAIL


@dataclass
class AuditRow:
    """One tensor or kind of operation of one site.

    Attributes:
      site: path of the site, of the blocks that share it: `blocks/0-3/mlp/up`; or a part of a step.
      direction: which pass; empty for what is stored.
      tensor: what it is about: `y`, `dx`, `sums`, `result`, ...
      asked: what the policy asks for.
      traced: what the traced program does.
      compiled: what the compiled program of each target does.
      findings: what there is to say about it.
    """

    site: str
    direction: Direction
    tensor: str
    asked: str = ""
    traced: str = ""
    compiled: dict[str, str] = field(default_factory=dict)
    findings: list[AuditFinding] = field(default_factory=list)

    @property
    def verdict(self) -> AuditVerdict:
        """The worst of what was found."""
        return AuditVerdict.worst(finding.verdict for finding in self.findings)

    def verdict_for(self, target: str) -> AuditVerdict:
        """That of one target of several: what was compiled for it, and what was traced."""
        own = (target, TRACED, traced_for(target))
        return AuditVerdict.worst(one.verdict for one in self.findings if one.column in own)

    def note(
        self, kind: str, text: str, column: str, verdict: AuditVerdict = AuditVerdict.FAIL
    ) -> None:
        """Adds a finding once."""
        finding = AuditFinding(kind, text, column, verdict)
        if finding not in self.findings:
            self.findings.append(finding)

    def to_json(self) -> dict[str, Any]:
        """Strings alone."""
        return {
            "site": self.site,
            "direction": self.direction,
            "tensor": self.tensor,
            "asked": self.asked,
            "traced": self.traced,
            "compiled": self.compiled,
            "verdict": self.verdict.value,
            "findings": [
                {"kind": f.kind, "text": f.text, "column": f.column, "verdict": f.verdict.value}
                for f in self.findings
            ],
        }


class AuditTable:
    """Rows by site, pass and tensor, in the order in which they were first asked for."""

    def __init__(self) -> None:
        self._rows: dict[tuple[str, str, str], AuditRow] = {}

    def __iter__(self) -> Iterator[AuditRow]:
        return iter(self._rows.values())

    def row(self, site: str, direction: Direction, tensor: str) -> AuditRow:
        """The row, made if it is missing."""
        return self._rows.setdefault((site, direction, tensor), AuditRow(site, direction, tensor))

    def ordered(self, order: Iterable[str]) -> list[AuditRow]:
        """The rows, sites in a given order, what a site hands on after what it computes."""
        place = {path: index for index, path in enumerate(order)}

        def rank(row: AuditRow) -> tuple[int, int, bool]:
            passes = ("forward", "backward", "").index(row.direction)
            return place.get(row.site, len(place)), passes, row.tensor == "result"

        return sorted(self, key=rank)
