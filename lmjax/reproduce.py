"""Behind `python -m lmjax reproduce`: lists published claims, runs them, says what came out.

Knows claims, how ablations are run and reported, and how a terminal is written to.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json as json_format
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from lmjax.ablation.claims import Claim, Judgement, judge, load_claims, order, together
from lmjax.ablation.evidence import Evidence, Outcome
from lmjax.ablation.grid import Ablation
from lmjax.ablation.report import write_report
from lmjax.ablation.report_text import markdown_table
from lmjax.ablation.runner import AblationError, run_each
from lmjax.ablation.runner import Outcome as Ended
from lmjax.ablation_cli import parse_seeds
from lmjax.cli import print_json, print_table
from lmjax.train import InputError, TrainingFailed
from lmjax.train.metrics import replace_text

CLAIMS = "experiments.ablations"
RECORD, TABLE = "claim.json", "claims.md"


def choose(asked: Sequence[str], *, everything: bool = False, quick: bool = False) -> list[Claim]:
    """The claims with these names or numbers, each once, or all, or those that are quick.

    Raises:
      InputError: there is no such claim, or more than one way of choosing was used.
    """
    if everything + quick + bool(asked) > 1:
        raise InputError("give either names of claims, or --all, or --quick")
    known = load_claims(CLAIMS)
    if everything or quick:
        return [claim for claim in known.values() if everything or claim.quick]
    by_number = {claim.number.lower(): claim for claim in known.values()}
    found = {}
    for name in asked:
        claim = known.get(name) or by_number.get(name.lower())
        if claim is None:
            raise InputError(f"no claim is called {name!r}; there are {', '.join(known)}")
        found[claim.name] = claim
    return list(found.values())


def replay(
    claims: Sequence[Claim],
    workdir: Path,
    *,
    large: bool = False,
    processes: int = 1,
    seeds: str | None = None,
    json: bool = False,
) -> Outcome | None:
    """Runs what claims need, judges them, and prints and records the judgements.

    Args:
      claims: which ones.
      workdir: one directory for all. Runs are below `runs/`, and claims share those that they have
        in common; `NAME/` holds the report and `claim.json` of each, and `claims.md` is a table of
        every judgement so far.
      large: run their large versions.
      processes: runs at a time.
      seeds: in place of the claims' own, as `0,1,2`.
      json: print JSON.

    Returns:
      The outcome of all together; None if a signal stopped it.

    Raises:
      InputError: `seeds` are none; nothing was run then.
      TrainingFailed: a run could not be carried out, for a reason that is no result.
    """
    planned = [(claim, _ablation(claim, large, seeds)) for claim in claims]
    ablations = [ablation for _, ablation in planned if ablation is not None]
    outcomes = run_each(ablations, workdir / "runs", processes=processes)
    judgements = []
    with contextlib.closing(outcomes):
        for claim, ablation in planned:
            evidence = Evidence() if ablation is None else _evidence(outcomes, workdir)
            if evidence is None:
                return None
            judgements.append(judge(claim, evidence))
            _write(judgements[-1], workdir)
            if not json:
                _print(judgements[-1])
    if json:
        print_json([_as_json(judgement) for judgement in judgements])
    elif len(judgements) > 1:
        _print_summary(judgements)
    return together(judgement.outcome for judgement in judgements)


def _ablation(claim: Claim, large: bool, seeds: str | None) -> Ablation | None:
    """What has to be run for a claim; None where arithmetic is enough."""
    ablation = claim.large if large else claim.ablation
    if seeds is None:
        return ablation
    numbers = parse_seeds(seeds)
    try:
        return ablation and dataclasses.replace(ablation, seeds=numbers)
    except ValueError as error:
        raise InputError(str(error)) from error


def _evidence(outcomes: Iterator[Ended], workdir: Path) -> Evidence | None:
    """The runs of the next ablation, all done; None if a signal stopped them."""
    try:
        outcome = next(outcomes)
    except AblationError as error:
        raise TrainingFailed(f"{error}; run the same command again to go on") from error
    if outcome.stopped_by is not None:
        return None
    write_report(outcome.ablation, outcome.cells, workdir / outcome.ablation.name)
    return Evidence(outcome.ablation, outcome.cells)


def list_claims(*, json: bool = False) -> None:
    """Prints what can be replayed, and from where it is."""
    claims = load_claims(CLAIMS).values()
    if json:
        print_json([_about(claim) for claim in claims])
        return
    rows = (
        (claim.number, claim.name, claim.title, claim.source, _size(claim), "yes" * claim.quick)
        for claim in claims
    )
    print_table(("", "name", "claim", "source", "runs", "quick"), rows)
    print("python -m lmjax reproduce NAME replays one, --all all of them")


def _size(claim: Claim) -> str:
    if claim.ablation is None:
        return "none"
    return f"{len(claim.ablation.arms)} arms x {len(claim.ablation.seeds)} seeds"


def _print(judgement: Judgement) -> None:
    """The claim, what its paper reports, and each finding."""
    claim, console = judgement.claim, Console(highlight=False)
    say = lambda text: console.print(text, markup=False, soft_wrap=True)
    say(f"\n{claim.number} {claim.name}: {judgement.outcome}")
    say(f"{claim.statement} ({claim.source})")
    for row in claim.paper:
        say(f"  paper: {row.setting}: {row.result}")
    print_table(
        ("", "here", "found"), ((f.outcome, f.statement, f.found) for f in judgement.findings)
    )


def _print_summary(judgements: Sequence[Judgement]) -> None:
    print()
    print_table(
        ("", "claim", "outcome", "confirmed", "refuted", "undecided"),
        (
            (j.claim.number, j.claim.title, j.outcome, *(str(_count(j, o)) for o in _OUTCOMES))
            for j in judgements
        ),
    )


_OUTCOMES = ("confirmed", "refuted", "undecided")


def _count(judgement: Judgement, outcome: str) -> int:
    return sum(finding.outcome == outcome for finding in judgement.findings)


def _write(judgement: Judgement, workdir: Path) -> None:
    """Records a judgement, and writes the table of all that the directory holds."""
    directory = workdir / judgement.claim.name
    directory.mkdir(parents=True, exist_ok=True)
    text = json_format.dumps(_as_json(judgement), indent=2, ensure_ascii=False)
    replace_text(directory / RECORD, text + "\n")
    replace_text(workdir / TABLE, _markdown(workdir))


def _markdown(workdir: Path) -> str:
    """Every judgement that is recorded in a directory, as a Markdown table."""
    records = [
        json_format.loads(path.read_text(encoding="utf-8")) for path in workdir.glob(f"*/{RECORD}")
    ]
    header = ("", "claim", "outcome", "here", "as published")
    rows = (_row(record, workdir) for record in sorted(records, key=lambda r: order(r["number"])))
    return "\n".join(["# Published claims, replayed", "", *markdown_table(header, rows), ""])


def _row(record: dict[str, Any], workdir: Path) -> tuple[str, ...]:
    name, title = record["name"], record["title"]
    reported = (workdir / name / "report.html").exists()
    here = [f"{f['outcome']}: {f['statement']}: {f['found']}" for f in record["findings"]]
    paper = [f"{row['setting']}: {row['result']}" for row in record["paper"]]
    return (
        record["number"],
        f"[{title}]({name}/report.html)" if reported else title,
        record["outcome"],
        "<br>".join(here),
        "<br>".join([record["source"], *paper]),
    )


def _about(claim: Claim) -> dict[str, Any]:
    return {
        "number": claim.number,
        "name": claim.name,
        "title": claim.title,
        "statement": claim.statement,
        "source": claim.source,
        "paper": [row._asdict() for row in claim.paper],
        "hardware_for_large": claim.hardware,
        "quick": claim.quick,
    }


def _as_json(judgement: Judgement) -> dict[str, Any]:
    return {
        **_about(judgement.claim),
        "outcome": judgement.outcome,
        "findings": [finding._asdict() for finding in judgement.findings],
    }
