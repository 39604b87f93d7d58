"""The account of a claim: everything a reviewer needs, in one object for all renderings.

The terminal, `claims.md`, `claim.json` and the HTML report render an `Account` and compute nothing
themselves, so that they cannot disagree.

Knows claims and what was run; nothing of terminals or pages.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from lmjax.ablation.claims import Judgement, order
from lmjax.ablation.evidence import Finding, Ruling
from lmjax.ablation.grid import Ablation
from lmjax.ablation.setting import Environment, subject, what_was_run
from lmjax.ablation.words import markdown_link, markdown_table

NOT_HERE = "not measured here"
NO_ROWS = "no number of the source could be checked, and none is quoted from memory"
REASONING = (
    "Every finding is tested by itself at 5%, without correction: the claim needs all of them. "
    "Intervals are the 90% t intervals that the tests rest on, of differences paired by seed. The "
    "smallest detectable effect is found four times in five with so many seeds of this spread."
)


class Published(NamedTuple):
    """A published result and the corresponding finding here."""

    setting: str
    result: str
    here: str


@dataclass(frozen=True)
class Account:
    """What was claimed, run and found, and the limits of that.

    Attributes:
      number, name, title, statement, source: of the claim.
      outcome: of all findings together.
      ran: what was run, by a word for it.
      paper: the published results, each beside what was found here.
      findings: each with its interval, margin, the reason for the margin, and power.
      scope: a sentence about what this says nothing about.
    """

    number: str
    name: str
    title: str
    statement: str
    source: str
    outcome: Ruling
    ran: Mapping[str, str]
    paper: Sequence[Published]
    findings: Sequence[Finding]
    scope: str

    def as_json(self) -> dict[str, Any]:
        """For `claim.json`; `read` is the inverse."""
        paper = [row._asdict() for row in self.paper]
        findings = [finding._asdict() for finding in self.findings]
        return {**dataclasses.asdict(self), "paper": paper, "findings": findings}

    def finding_rows(self) -> list[tuple[str, str, str, str]]:
        """Outcome, sentence, what was found, and by what it was judged, in words."""
        return [(f.outcome, f.statement, f.found, _judged(f)) for f in self.findings]

    def paper_rows(self) -> Sequence[Published]:
        """The published results; a row that says so where there are none."""
        return self.paper or [Published(NO_ROWS, "", "")]

    def markdown(self) -> str:
        """The whole account under a heading."""
        lines = [
            f"## {self.number} {self.title}: {self.outcome}",
            "",
            f"{self.statement} ({self.source})",
            "",
            *markdown_table(("", "here", "found", "judged by"), self.finding_rows()),
            "",
            *markdown_table(("as published", "result", "here"), self.paper_rows()),
            "",
            *(f"- {name}: {value}" for name, value in self.ran.items()),
            "",
            f"Scope: {self.scope}",
            "",
        ]
        return "\n".join(lines)


def _judged(finding: Finding) -> str:
    if finding.asked:
        return "; ".join(
            part
            for part in (f"asked: {finding.asked}, because {finding.why}", finding.power)
            if part
        )
    return f"exact; why this bound: {finding.why}" if finding.why else "exact"


def account(
    judgement: Judgement, ablation: Ablation | None, environments: Iterable[Environment]
) -> Account:
    """Returns the account of a judged claim.

    Args:
      judgement: the claim and its findings.
      ablation: what was run for it; None for arithmetic.
      environments: of the runs, or of the process that computed.
    """
    claim = judgement.claim
    return Account(
        number=claim.number,
        name=claim.name,
        title=claim.title,
        statement=claim.statement,
        source=claim.source,
        outcome=judgement.outcome,
        ran=what_was_run(ablation, environments),
        paper=[
            Published(row.setting, row.result, _here(row.here, judgement.findings))
            for row in claim.paper
        ],
        findings=judgement.findings,
        scope=f"{subject(ablation)} says nothing about {claim.scope}.",
    )


def _here(about: Sequence[str], findings: Sequence[Finding]) -> str:
    """What the first finding about each name found."""
    first = {finding.about: finding.found for finding in reversed(findings)}
    if len(about) == 1:
        return first[about[0]]
    return "; ".join(f"{name} {first[name]}" for name in about) or NOT_HERE


def read(record: Mapping[str, Any]) -> Account:
    """An account from `claim.json`, also of a version that recorded less."""
    values = {field.name: record.get(field.name, "") for field in dataclasses.fields(Account)}
    values["ran"] = record.get("ran", {})
    values["paper"] = [Published(**{"here": NOT_HERE} | row) for row in record["paper"]]
    values["findings"] = [Finding(**finding) for finding in record["findings"]]
    return Account(**values)


def markdown(accounts: Iterable[Account], reported: Iterable[str]) -> str:
    """All accounts: a table of outcomes, then each in full.

    Args:
      accounts: in any order.
      reported: names of the claims that have `NAME/report.html` beside this file.
    """
    accounts, linked = sorted(accounts, key=lambda a: order(a.number)), set(reported)
    title = lambda a: (
        markdown_link(a.title, f"{a.name}/report.html") if a.name in linked else a.title
    )
    rows = [(a.number, title(a), a.outcome) for a in accounts]
    lines = ["# Published claims, replayed", "", *markdown_table(("", "claim", "outcome"), rows)]
    lines += ["", REASONING, ""]
    return "\n".join([*lines, *(each.markdown() for each in accounts)])
