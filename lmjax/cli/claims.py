"""Implements `python -m lmjax reproduce`: lists and runs published claims, prints the results.

Knows claims, how ablations are run and reported, and how to print to a terminal.
"""

from __future__ import annotations

import contextlib
import dataclasses
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.padding import Padding
from rich.text import Text

from lmjax import strict_json
from lmjax.ablation.account import Account, account, markdown
from lmjax.ablation.account import read as read_account
from lmjax.ablation.claims import Claim, Judgement, judge, load_claims, together
from lmjax.ablation.evidence import Evidence, Ruling
from lmjax.ablation.grid import Ablation, Cell
from lmjax.ablation.report import write_report
from lmjax.ablation.runner import AblationError, run_each
from lmjax.ablation.runner import AblationOutcome as Ended
from lmjax.ablation.setting import read_environment
from lmjax.cli.ablation import parse_seeds
from lmjax.cli.common import print_json
from lmjax.console.tables import Column, print_table
from lmjax.console.wording import counted
from lmjax.runs.metrics import replace_text
from lmjax.runs.run_directory import environment
from lmjax.train import InputError, TrainingFailed

CLAIMS = "experiments.ablations"
RECORD, TABLE = "claim.json", "claims.md"


def choose(asked: Sequence[str], *, everything: bool = False, quick: bool = False) -> list[Claim]:
    """The claims with these names or numbers, without duplicates, or all, or the quick ones.

    Raises:
      InputError: there is no such claim, or more than one way of choosing was used.
    """
    if everything + quick + bool(asked) > 1:
        raise InputError("give either names of claims, or --all, or --quick")
    known = load_claims(CLAIMS)
    if everything or quick:
        chosen = [claim for claim in known.values() if everything or claim.quick]
        for lacking in filter(lambda claim: claim.needs, chosen):
            print(f"left out: {lacking.name}, which needs: {lacking.needs}", file=sys.stderr)
        return [claim for claim in chosen if not claim.needs]
    by_number = {claim.number.lower(): claim for claim in known.values()}
    found = {}
    for name in asked:
        claim = known.get(name) or by_number.get(name.lower())
        if claim is None:
            raise InputError(f"no claim is called {name!r}; there are {', '.join(known)}")
        if claim.needs:
            raise InputError(f"{claim.name} needs what is not installed: {claim.needs}")
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
) -> Ruling | None:
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
      The combined outcome; None if a signal stopped it.

    Raises:
      InputError: `seeds` is not a list of numbers; nothing was run.
      TrainingFailed: a run failed for a reason that is not a result.
    """
    planned = [(claim, _ablation(claim, large, seeds)) for claim in claims]
    ablations = [ablation for _, ablation in planned if ablation is not None]
    outcomes = run_each(ablations, workdir / "runs", processes=processes)
    judgements, records = [], []
    with contextlib.closing(outcomes):
        for claim, ablation in planned:
            ended = None if ablation is None else _ended(outcomes)
            if ended is not None and ended.stopped_by is not None:
                return None
            judgement = judge(claim, Evidence(*_runs(ended)))
            told = _account(judgement, ended)
            page = _write(claim, told, ended, workdir)
            judgements.append(judgement)
            records.append(_record(claim, told))
            if not json:
                _print(told, page)
    if json:
        print_json(records)
    elif len(judgements) > 1:
        _print_summary(judgements)
    return together(judgement.outcome for judgement in judgements)


def _ablation(claim: Claim, large: bool, seeds: str | None) -> Ablation | None:
    """The ablation to run for a claim; None if arithmetic is enough."""
    ablation = claim.large if large else claim.ablation
    if seeds is None:
        return ablation
    numbers = parse_seeds(seeds)
    try:
        return ablation and dataclasses.replace(ablation, seeds=numbers)
    except ValueError as error:
        raise InputError(str(error)) from error


def _ended(outcomes: Iterator[Ended]) -> Ended:
    """The next ablation, with all its runs done or stopped by a signal."""
    try:
        return next(outcomes)
    except AblationError as error:
        raise TrainingFailed(f"{error}; run the same command again to resume") from error


def _runs(ended: Ended | None) -> tuple[Ablation | None, tuple[Cell, ...]]:
    return (None, ()) if ended is None else (ended.ablation, ended.cells)


def _account(judgement: Judgement, ended: Ended | None) -> Account:
    ablation, cells = _runs(ended)
    there = [environment()] if ended is None else [read_environment(c.directory) for c in cells]
    return account(judgement, ablation, there)


def list_claims(*, json: bool = False) -> None:
    """Prints the claims that can be replayed, and their sources."""
    claims = load_claims(CLAIMS).values()
    if json:
        print_json([_about(claim) for claim in claims])
        return
    columns = Column("name", "key"), Column("number"), Column("runs"), Column("quick")
    rows = (
        (claim.name, claim.number, _size(claim), "yes" * claim.quick, claim.title, claim.source)
        for claim in claims
    )
    print_table((*columns, Column("claim", "text"), Column("source", "text")), rows)
    print("python -m lmjax reproduce NAME replays one, --all all of them")


def _size(claim: Claim) -> str:
    if claim.ablation is None:
        return "none"
    arms, seeds = claim.ablation.arms, claim.ablation.seeds
    return f"{counted(len(arms), 'arm')} x {counted(len(seeds), 'seed')}"


def _print(told: Account, page: Path) -> None:
    """The claim, each finding, the paper's numbers beside ours, what was run, and the scope."""
    # Wrap lines in a terminal, never in a file or a pipe.
    console = Console(highlight=False, emoji=False, width=None if sys.stdout.isatty() else 100_000)

    def say(text: str, indent: int = 0) -> None:
        console.print(Padding(Text(text), (0, 0, 0, indent), expand=False))

    console.print()
    say(f"{told.number} {told.name}: {told.outcome}")
    say(f"{told.statement} ({told.source})")
    for outcome, statement, found, judged in told.finding_rows():
        say(f"{outcome}: {statement}", 2)
        say(f"found: {found}", 4)
        say(judged, 4)
    for setting, result, here in told.paper_rows():
        say(f"as published: {setting}{': ' * bool(result)}{result}", 2)
        if here:
            say(f"here: {here}", 4)
    for name, value in told.ran.items():
        say(f"{name}: {value}", 2)
    say(f"scope: {told.scope}", 2)
    say(f"the report is {page}", 2)


def _print_summary(judgements: Sequence[Judgement]) -> None:
    print()
    counts = (Column(outcome, "number") for outcome in _OUTCOMES)
    print_table(
        (Column("name", "key"), Column("outcome"), *counts, Column("claim", "text")),
        (
            (j.claim.name, j.outcome, *(str(_count(j, o)) for o in _OUTCOMES), j.claim.title)
            for j in judgements
        ),
    )


_OUTCOMES = ("confirmed", "refuted", "undecided")


def _count(judgement: Judgement, outcome: str) -> int:
    return sum(finding.outcome == outcome for finding in judgement.findings)


def _write(claim: Claim, told: Account, ended: Ended | None, workdir: Path) -> Path:
    """Records an account, writes its report and the table of all accounts in the directory.

    Returns:
      The path of the report.
    """
    directory = workdir / told.name
    page = write_report(*_runs(ended), directory, account=told)
    text = strict_json.dumps(_record(claim, told), indent=2, ensure_ascii=False)
    replace_text(directory / RECORD, text + "\n")
    paths = list(workdir.glob(f"*/{RECORD}"))
    records = [read_account(strict_json.loads(path.read_text("utf-8"))) for path in paths]
    reported = [path.parent.name for path in paths if (path.parent / "report.html").exists()]
    replace_text(workdir / TABLE, markdown(records, reported))
    return page


def _record(claim: Claim, told: Account) -> dict[str, Any]:
    return {**_about(claim), **told.as_json()}


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
