"""The command line of ablations: `python -m experiments.ablations.NAME`, `python -m lmjax report`.

Exit codes are those of training: 0 done, 2 bad input, 75 stopped early with checkpoints, 1 anything
else. A failed cell is a result, not an error.
"""

from __future__ import annotations

import contextlib
import dataclasses
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, NoReturn

from lmjax.ablation import grid
from lmjax.ablation.grid import MOST_SEEDS, Ablation, Cell
from lmjax.ablation.report import write_report
from lmjax.ablation.report_data import gather, summary
from lmjax.ablation.report_text import verdicts
from lmjax.ablation.runner import AblationError, run, with_added_seeds
from lmjax.ablation.runs import ablation_of
from lmjax.ablation.words import significant
from lmjax.checks import at_least, validate
from lmjax.cli.common import DONE, FAILED, STOPPED, UserPath, guarded, print_json
from lmjax.cli.flags import parsed, program
from lmjax.console.tables import Column, print_table
from lmjax.files.filenames import printable
from lmjax.files.locks import lock
from lmjax.train import InputError


@dataclass(frozen=True)
class AblationFlags:
    """Flags of an ablation: directory, length of its runs, and execution."""

    workdir: UserPath
    """The ablation's directory; the same command again resumes what is in it."""
    processes: Annotated[int, at_least(1)] = 1
    """Concurrent runs, each in its own process."""
    threads: Annotated[int, at_least(1)] = 1
    """XLA threads of each process on CPU; one is fastest for small models."""
    seeds: str | None = None
    """The seeds, such as 0,1,2; by default those of the module."""
    max_seeds: Annotated[int, at_least(1, MOST_SEEDS)] | None = None
    """Add seeds where a question is undecided, until it is settled or an arm has this many."""
    steps: Annotated[int, at_least(1)] | None = None
    """Planned length of the runs; arms with a length other than the base keep their proportion."""
    retry_failed: bool = False
    """Rerun failed cells."""
    slurm: bool = False
    """Submit the processes as an array of Slurm jobs; needs lmjax[slurm]."""
    slurm_options: tuple[str, ...] = ()
    """Parameters of submitit, as NAME=VALUE, such as slurm_partition=gpu timeout_min=240."""
    dry_run: bool = False
    """Print the arms and the status of their cells; run nothing."""

    def __post_init__(self) -> None:
        """Rejects values out of range."""
        validate(self)


def run_ablation(ablation: Callable[[], Ablation]) -> NoReturn:
    """Runs the started module, an ablation, from the command line and exits.

    Args:
      ablation: the module's `ablation`.
    """
    module, command = program()
    sys.exit(guarded(lambda: _run_ablation(module, ablation, sys.argv[1:], command)))


def _run_ablation(
    module: str,
    ablation: Callable[[], Ablation],
    arguments: Sequence[str],
    command: str = "",
) -> int:
    default = AblationFlags(workdir=Path("runs") / module.rpartition(".")[2])
    command = command or f"python -m {module}"
    launch = parsed(AblationFlags, arguments, default=default, command=command)
    options = _slurm_options(launch)
    chosen = _chosen(ablation(), launch)
    print(f"{chosen.question}\n")
    _print_differences(chosen)
    print()
    if launch.dry_run:
        chosen = with_added_seeds(chosen, launch.workdir)
        _print_cells(chosen, grid.read_cells(chosen, launch.workdir))
        return DONE
    try:
        outcome = run(
            chosen,
            launch.workdir,
            processes=launch.processes,
            threads=launch.threads,
            retry_failed=launch.retry_failed,
            slurm=options,
        )
    except AblationError as error:
        print(f"error: {error}; run the same command again to resume", file=sys.stderr)
        return FAILED
    _print_cells(outcome.ablation, outcome.cells)
    if outcome.stopped_by is not None:
        print(
            f"stopped by {outcome.stopped_by}; run the same command again to resume",
            file=sys.stderr,
        )
        return STOPPED
    _print_report(outcome.ablation, outcome.cells, launch.workdir)
    return DONE


def report_on(directory: Path, *, json: bool = False) -> None:
    """Writes and prints the report of an ablation's directory, complete or not.

    Args:
      directory: where the ablation was run.
      json: print JSON instead of tables.

    Raises:
      InputError: no ablation was run there.
    """
    ablation = grid.read_ablation(directory / grid.DEFINITION)
    _report(ablation, grid.read_cells(ablation, directory), directory, json=json)


def report_on_runs(runs: Sequence[Path], out: Path | None = None, *, json: bool = False) -> None:
    """Writes and prints a report that compares individually trained runs.

    Args:
      runs: their directories; the others are compared with the config of the first.
      out: where the report goes, a directory or a page `*.html`; by default into the directory of
        the only run, or beside the first of several.
      json: print JSON instead of tables.

    Raises:
      InputError: a directory holds no run, or two hold the same.
    """
    ablation, cells = ablation_of(runs)
    first = runs[0].absolute()
    _report(ablation, cells, out or (first if len(runs) == 1 else first.parent), json=json)


def _report(ablation: Ablation, cells: Sequence[Cell], out: Path, *, json: bool) -> None:
    if json:
        path = _write_report(ablation, cells, out)
        print(f"the report is {printable(path)}", file=sys.stderr)
        print_json(summary(gather(ablation, cells, ablation.monitoring)))
        return
    print(f"{ablation.question}\n")
    _print_cells(ablation, cells)
    _print_report(ablation, cells, out)


def _chosen(ablation: Ablation, launch: AblationFlags) -> Ablation:
    try:
        if launch.steps is not None:
            ablation = grid.with_steps(ablation, launch.steps)
        if launch.seeds is not None:
            ablation = dataclasses.replace(ablation, seeds=parse_seeds(launch.seeds))
        if launch.max_seeds is not None:
            ablation = dataclasses.replace(ablation, max_seeds=launch.max_seeds)
    except ValueError as error:
        raise InputError(str(error)) from error
    return ablation


def parse_seeds(text: str) -> tuple[int, ...]:
    """Parses a list of numbers such as `0,1,2`.

    Raises:
      InputError: it is not such a list.
    """
    try:
        return tuple(int(number) for number in text.split(","))
    except ValueError as error:
        raise InputError(f"--seeds {text!r} is not a list of numbers such as 0,1,2") from error


def _slurm_options(launch: AblationFlags) -> dict[str, Any] | None:
    """The parameters of submitit, with integers converted; None without --slurm."""
    if not launch.slurm:
        if launch.slurm_options:
            raise InputError("--slurm-options is for --slurm, which is missing")
        return None
    pairs = [option.partition("=") for option in launch.slurm_options]
    for name, equals, _ in pairs:
        if not name or not equals:
            raise InputError(f"--slurm-options {name!r} is not of the form NAME=VALUE")
    return {name: int(value) if value.isdecimal() else value for name, _, value in pairs}


def _print_differences(ablation: Ablation) -> None:
    """The fields in which arms differ, one column each; derived ones in brackets."""
    fields = grid.arm_differences(ablation)
    titles = (f"({field.field})" if field.follows else field.field for field in fields)
    print_table(
        (Column("arm", "key"), *map(Column, titles)),
        ((arm, *(str(field.values[arm]) for field in fields)) for arm in ablation.arms),
    )


def _print_cells(ablation: Ablation, cells: Iterable[Cell]) -> None:
    """Prints the metric of every cell, arms x seeds, and the reasons of failures."""
    cells = list(cells)
    words = {
        (c.arm, c.seed): significant(c.value) if c.status == "finished" else c.status for c in cells
    }
    seeds = ablation.all_seeds
    print_table(
        (Column(ablation.metric, "key"), *(Column(f"seed {seed}", "number") for seed in seeds)),
        ((arm, *(words.get((arm, seed), "") for seed in seeds)) for arm in ablation.arms),
    )
    for cell in cells:
        if cell.status == "failed":
            print(f"{cell.arm} seed {cell.seed} failed: {cell.reason}")


def _print_report(ablation: Ablation, cells: Sequence[Cell], out: Path) -> None:
    """Writes the report, prints its verdicts and says where it is."""
    path = _write_report(ablation, cells, out)
    if len(ablation.arms) > 1:
        print()
        (_, *titles, last), rows = verdicts(gather(ablation, cells, ablation.monitoring))
        print_table((Column("arm", "key"), *map(Column, titles), Column(last, "text")), rows)
    print(f"\nthe report is {printable(path)}")


def _write_report(ablation: Ablation, cells: Sequence[Cell], out: Path) -> Path:
    locks = out / "locks"
    try:
        # Commands that share an ablation's directory may end at the same moment.
        with lock(locks / "report") if locks.is_dir() else contextlib.nullcontext():
            return write_report(ablation, cells, out, monitoring=ablation.monitoring)
    except OSError as error:
        raise InputError(f"cannot write the report to {out}: {error.strerror}") from error
