"""Runs ablations: prepares data, starts workers and watches the cells.

`run` prepares the texts, writes the definition into the directory, starts workers and watches the
files of the cells until every cell has ended; if seeds are added as needed, it adds them and
continues. `run_each` does the same for several ablations without pausing workers in between. Both
are stateless: the directory records what is done, and the added seeds follow from that, so the same
call resumes after any interruption.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lmjax.ablation import grid
from lmjax.ablation.display import Display
from lmjax.ablation.grid import Ablation, Cell, State
from lmjax.ablation.pools import LocalPool, Pool, SlurmPool
from lmjax.ablation.report_data import compare_cells
from lmjax.ablation.verdict import seeds_to_add
from lmjax.ablation.worker import discard_failed
from lmjax.console import stages
from lmjax.console.signals import StopRequest
from lmjax.data import tokenized_corpus
from lmjax.runs.config import Config
from lmjax.runs.run_directory import InputError
from lmjax.runs.store.object_store import refuse_collapsed

SECONDS_BETWEEN_LOOKS = 0.5


class AblationError(RuntimeError):
    """A cell could not be run, for a reason other than its result."""


@dataclass(frozen=True)
class AblationOutcome:
    """How a call of `run` ended.

    Attributes:
      ablation: the ablation, including added seeds.
      cells: its cells, arm by arm.
      stopped_by: the signal that stopped it before all cells had ended; else None.
    """

    ablation: Ablation
    cells: tuple[Cell, ...]
    stopped_by: str | None


def run(
    ablation: Ablation,
    directory: str | Path,
    *,
    processes: int = 1,
    threads: int = 1,
    retry_failed: bool = False,
    slurm: Mapping[str, Any] | None = None,
    progress: bool = True,
) -> AblationOutcome:
    """Runs the unfinished cells of an ablation.

    Args:
      ablation: what to run.
      directory: directory of the cells. Cells of other ablations in it are left alone, and common
        cells are shared.
      processes: number of worker processes.
      threads: XLA threads per process on CPU. With one, results do not depend on `processes`.
      retry_failed: rerun failed cells.
      slurm: parameters of submitit; the processes are then jobs of a Slurm array.
      progress: show a table of the cells, or lines if the output is not a terminal.

    Returns:
      The outcome. SIGINT and SIGTERM stop the runs with checkpoints; the same call resumes them.

    Raises:
      InputError, DataError: bad input; see `lmjax.train.train`.
      AblationError: a worker failed. The others have saved checkpoints.
    """
    directory = Path(directory)
    workers = _Workers(directory, processes, threads, slurm)
    _prepare([ablation], directory, progress)
    if retry_failed:
        discard_failed(directory, with_added_seeds(ablation, directory))
    ablation = with_added_seeds(ablation, directory)
    while True:
        ((cells, signal),) = _run_cells([ablation], workers, progress)
        outcome = _outcome(ablation, cells, signal, directory)
        grown = with_added_seeds(ablation, directory)
        if outcome.stopped_by is not None or grown == ablation:
            return outcome
        if signal is not None:
            return AblationOutcome(ablation, cells, signal)
        ablation = grown


def run_each(
    ablations: Sequence[Ablation],
    directory: str | Path,
    *,
    processes: int = 1,
    threads: int = 1,
    progress: bool = True,
) -> Generator[AblationOutcome, None, None]:
    """Runs the unfinished cells of several ablations; see `run`. Adds no seeds.

    All ablations share the workers, which keep running while the caller handles an outcome. They
    are killed if the iterator is closed before its end.

    Yields:
      The outcome of each ablation when its cells have ended. An outcome that was stopped is last.

    Raises:
      As `run` does.
    """
    directory = Path(directory)
    workers = _Workers(directory, processes, threads, None)
    _prepare(ablations, directory, progress)
    with contextlib.closing(_run_cells(ablations, workers, progress)) as ended:
        for ablation, (cells, signal) in zip(ablations, ended, strict=True):
            outcome = _outcome(ablation, cells, signal, directory)
            yield outcome
            if outcome.stopped_by is not None:
                return


def with_added_seeds(ablation: Ablation, directory: Path) -> Ablation:
    """Returns the ablation with the seeds that its results so far require.

    Returns the ablation itself if a cell has not ended yet, every question is settled, or
    `max_seeds` is reached or not given.
    """
    while ablation.max_seeds is not None:
        cells = grid.read_cells(ablation, directory)
        if any(cell.status == "missing" for cell in cells):
            break
        adding = seeds_to_add(compare_cells(ablation, cells, "anytime"), ablation.max_seeds)
        if not adding:
            break
        ablation = grid.add_seeds(ablation, adding)
    return ablation


@dataclass(frozen=True)
class _Workers:
    """How the cells of a directory are run; see `run` for the fields."""

    directory: Path
    processes: int
    threads: int
    slurm: Mapping[str, Any] | None

    def __post_init__(self) -> None:
        """Refuses counts below one."""
        for name in ("processes", "threads"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} is {getattr(self, name)}; it must be at least 1")

    def start(self, definitions: Sequence[Path], left: Mapping[str, Config]) -> Pool:
        """Starts as many workers as there is work for."""
        count = min(self.processes, len(left))
        if self.slurm is None:
            return LocalPool(self.directory, definitions, count, self.threads)
        return SlurmPool(self.directory, definitions, count, self.threads, self.slurm)


def _run_cells(
    ablations: Sequence[Ablation], workers: _Workers, progress: bool
) -> Generator[tuple[tuple[Cell, ...], str | None], None, None]:
    """Runs the unfinished cells of ablations.

    Yields:
      For each ablation, once its cells have ended, the cells and the signal received, if any.
    """
    directory = workers.directory
    definitions = [grid.write_ablation(ablation, directory) for ablation in ablations]
    left_of = [_left(ablation, directory) for ablation in ablations]
    left = {key: config for cells in left_of for key, config in cells.items()}
    pool: Pool | None = None
    kill = lambda: pool.kill() if pool is not None else None
    with StopRequest("the runs stop after their next steps, with checkpoints", kill) as stop:
        pool = workers.start(definitions, left) if left else None
        try:
            for ablation, unfinished in zip(ablations, left_of, strict=True):
                if pool is not None and unfinished:
                    with (
                        Display(ablation, enabled=progress) as display,
                        stop.acknowledged_by(display.note),
                    ):
                        if ablation.seed_counts:
                            display.note(_added(ablation))
                        _watch(pool, stop, display, ablation, directory)
                if pool is not None and ablation is ablations[-1]:
                    _await_end(pool)
                yield tuple(grid.read_cells(ablation, directory)), stop.received
        finally:
            if pool is not None:
                pool.kill()


def _left(ablation: Ablation, directory: Path) -> dict[str, Config]:
    """The cells that have not ended, by key."""
    cells = grid.read_cells(ablation, directory)
    missing = {cell.directory.name for cell in cells if cell.status == "missing"}
    return {key: config for key, config in grid.plan(ablation).items() if key in missing}


def _outcome(
    ablation: Ablation, cells: tuple[Cell, ...], signal: str | None, directory: Path
) -> AblationOutcome:
    """Returns the outcome of an ablation whose workers have ended or moved on.

    Raises:
      AblationError: cells have not ended, although no stop was requested.
    """
    missing = any(cell.status == "missing" for cell in cells)
    if missing and signal is None:
        raise AblationError(f"the workers ended before the cells did; see {directory / 'logs'}")
    return AblationOutcome(ablation, cells, signal if missing else None)


def _added(ablation: Ablation) -> str:
    given = ablation.seed_counts
    counts = (f"{arm} has {given[arm]}" for arm in ablation.arms if arm in given)
    return f"seeds were added where a question is open: {', '.join(counts)}"


def _prepare(ablations: Sequence[Ablation], directory: Path, progress: bool) -> None:
    """Tokenizes each text once, before several workers would try to; opens the directory."""
    refuse_collapsed(directory)
    arms = [arm for ablation in ablations for arm in ablation.arms.values()]
    try:
        for data, context in {(arm.data, arm.context) for arm in arms}:
            with stages.stage("reading the text"):
                tokenized_corpus(data, window=context + 1, progress=progress)
    except ValueError as error:
        raise InputError(str(error)) from error
    _open(directory)


def _open(directory: Path) -> None:
    """Creates the directory, or accepts that of an ablation."""
    try:
        inside = {path.name for path in directory.iterdir()} if directory.is_dir() else set()
        if inside and not inside & {grid.DEFINITION, "locks"}:
            raise InputError(
                f"{directory} is not empty and holds no ablation; choose another --workdir or "
                "empty it"
            )
        (directory / "locks").mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(
            f"cannot write the directory {directory}: {error.strerror}; choose another --workdir"
        ) from error


def _watch(
    pool: Pool, stop: StopRequest, display: Display, ablation: Ablation, directory: Path
) -> None:
    """Shows the cells until all have ended or no worker is left.

    Stops all workers and waits for them if one fails or a stop is requested.

    Raises:
      InputError, AblationError: a worker failed.
    """
    keys = tuple(grid.plan(ablation))
    states = _read_states(keys, ablation.metric, directory, {})
    display.show(states)
    stopping = False
    while (stopping or _any_missing(states)) and pool.alive():
        if not stopping and (stop.received or pool.failure()):
            stopping = True
            pool.stop()
            if not stop.received:
                display.note("a worker has failed; the others stop, with checkpoints")
        time.sleep(SECONDS_BETWEEN_LOOKS)
        states = _read_states(keys, ablation.metric, directory, states)
        display.show(states)
    failure = None if stop.received or not _any_missing(states) else pool.failure()
    if failure is not None:
        raise (InputError if failure.bad_input else AblationError)(failure.reason)


def _any_missing(states: Mapping[str, State]) -> bool:
    return any(state.status == "missing" for state in states.values())


def _await_end(pool: Pool) -> None:
    """Waits for workers to exit: the last plots are drawn after the last result is written."""
    while pool.alive():
        time.sleep(SECONDS_BETWEEN_LOOKS)


def _read_states(
    keys: Sequence[str], metric: str, directory: Path, known: Mapping[str, State]
) -> dict[str, State]:
    """Reads the states of cells, except those known to have ended."""
    cells = grid.cells_directory(directory)
    return {
        key: known[key]
        if key in known and known[key].status != "missing"
        else grid.read_state(cells / key, metric)
        for key in keys
    }
