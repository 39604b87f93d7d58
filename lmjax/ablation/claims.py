"""Replays published claims: a paper's statement, a small version of it, and the findings.

A claim is a module of `experiments/ablations` with a function `claim()`. It gives its source, the
runs that test it (an `Ablation`, unless arithmetic suffices), and how they are judged: a list of
findings, each a sentence with one of three outcomes.

    confirmed    the interval excludes everything that would contradict the sentence
    refuted      the interval lies entirely in what contradicts it, or an exact statement is false
    undecided    neither: more seeds are needed

A claim is confirmed if all its findings are; each may be wrong with probability 5%, and so may then
the whole (an intersection-union test). One refuted finding refutes it.

Knows grids and evidence; nothing of how runs are launched or shown.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from lmjax.ablation.evidence import Evidence, Finding, Ruling
from lmjax.ablation.grid import Ablation


class PaperRow(NamedTuple):
    """One result as it was published.

    Attributes:
      setting: what was measured, and under which name.
      result: what came out.
      here: what findings about the same are about (`Finding.about`); empty: it is not measured.
    """

    setting: str
    result: str
    here: tuple[str, ...] = ()


@dataclass(frozen=True)
class Claim:
    """A paper's statement about precision and a way to test it here.

    Attributes:
      number: in the catalogue, such as `A1`; a claim can also be asked for by it.
      name: of the module.
      title: a few words.
      statement: what is claimed, in a sentence.
      source: authors, year, arXiv number, table or section.
      paper: results as published, to be shown beside ours; those alone that were read in the
        source or are marked as quoted by a summary.
      scope: what the small version says nothing about, as the end of a sentence.
      judge: findings, from the runs of `ablation`; without one it measures arithmetic itself.
      ablation: the small version; None where no training is needed.
      large: the same arms at the size of the paper, or the nearest that this model can be; not run
        here, but it traces.
      hardware: what `large` needs.
      quick: part of `reproduce --quick`.
      needs: the command that installs what its runs lack here; empty: nothing is missing.
    """

    number: str
    name: str
    title: str
    statement: str
    source: str
    paper: tuple[PaperRow, ...]
    scope: str
    judge: Callable[[Evidence], Iterable[Finding]]
    ablation: Ablation | None
    large: Ablation
    hardware: str
    quick: bool = False
    needs: str = ""

    def __post_init__(self) -> None:
        """Refuses an ablation of another name, whose files would be somewhere else."""
        for ablation in (self.ablation, self.large):
            if ablation is not None and ablation.name != self.name:
                raise ValueError(
                    f"claim {self.name} has an ablation named {ablation.name}; give both one name"
                )


class Judgement(NamedTuple):
    """A claim and its findings."""

    claim: Claim
    findings: Sequence[Finding]

    @property
    def outcome(self) -> Ruling:
        """Of all findings together."""
        return together(finding.outcome for finding in self.findings)


def together(outcomes: Iterable[Ruling]) -> Ruling:
    """Refuted if one is, else undecided if one is, else confirmed."""
    found = set(outcomes)
    return "refuted" if "refuted" in found else "undecided" if "undecided" in found else "confirmed"


def judge(claim: Claim, evidence: Evidence) -> Judgement:
    """Judges a claim.

    Raises:
      ValueError: there are no findings, a sentence occurs twice, a margin has no reason, or a row
        of the paper refers to a missing finding.
    """
    findings = list(claim.judge(evidence))
    sentences = [finding.statement for finding in findings]
    if not findings or len(set(sentences)) < len(sentences):
        raise ValueError(f"claim {claim.name} has findings {sentences}; give each its own sentence")
    for finding in findings:
        if finding.asked and not finding.why:
            raise ValueError(f"claim {claim.name}: say why {finding.statement!r} has this margin")
    unknown = {name for row in claim.paper for name in row.here} - {f.about for f in findings}
    if unknown:
        raise ValueError(f"claim {claim.name}: no finding is about {', '.join(sorted(unknown))}")
    return Judgement(claim, findings)


def load_claims(package: str) -> dict[str, Claim]:
    """Loads the claims of a package by module name, in the order of their numbers."""
    path = importlib.import_module(package).__path__
    modules = (
        importlib.import_module(f"{package}.{info.name}") for info in pkgutil.iter_modules(path)
    )
    claims = [module.claim() for module in modules if hasattr(module, "claim")]
    return {claim.name: claim for claim in sorted(claims, key=lambda claim: order(claim.number))}


def order(number: str) -> tuple[str, int]:
    """Sort key of claim numbers: A2 comes before A10."""
    return number[:1], int("".join(c for c in number if c.isdigit()) or 0)
