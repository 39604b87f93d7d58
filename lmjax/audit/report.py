"""An audit as a value: its programs, their verdicts, and the same as JSON.

Knows inspections of single programs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from lmjax.inspection.inspection import Inspection
from lmjax.inspection.rows import AuditFinding, AuditRow, AuditVerdict


@dataclass(frozen=True)
class AuditReport:
    """What was found of all programs of a run.

    Attributes:
      precision: the policy.
      devices: what it was traced and compiled for on this machine: `cpu:8`.
      inspections: one for each program and phase.
      untrained: why the program that trains is not among them; empty otherwise.
    """

    precision: str
    devices: str
    inspections: tuple[Inspection, ...]
    untrained: str = ""

    @property
    def verdict(self) -> AuditVerdict:
        """The worst of all programs."""
        return AuditVerdict.worst(one.verdict for one in self.inspections)

    @property
    def targets(self) -> tuple[str, ...]:
        """Everything that a program was compiled for."""
        return tuple(dict.fromkeys(target for one in self.inspections for target in one.targets))

    @property
    def failures(self) -> list[tuple[Inspection, AuditRow, AuditFinding]]:
        """Everything that fails."""
        return [(one, row, finding) for one in self.inspections for row, finding in one.findings]

    def to_json(self) -> dict[str, Any]:
        """Strings and numbers alone, as in `audit.json`."""
        return {
            "verdict": self.verdict.value,
            "precision": self.precision,
            "devices": self.devices,
            "untrained": self.untrained,
            "programs": [one.to_json() for one in self.inspections],
        }


def module_of(site: str) -> str:
    """The part of a model that a row belongs to, by which tables fold: `blocks/0-3/mlp`."""
    return site.rpartition("/")[0] or site


def counted_verdicts(rows: list[AuditRow]) -> dict[AuditVerdict, int]:
    """How many rows there are of each verdict."""
    return {verdict: sum(row.verdict is verdict for row in rows) for verdict in AuditVerdict}
