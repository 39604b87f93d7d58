"""Running an ablation: everything around its cells.

`run` prepares the texts, writes the definition into the directory, starts workers and watches the
files of the cells until every cell has ended; where seeds are added as needed, it then does so and
goes on. It keeps no state of its own: what is done is what the directory says, and which seeds were
added follows from that, so the same call goes on after any interruption.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lmjax.ablation import grid
from lmjax.ablation.grid import Ablation, Cell, State
from lmjax.ablation.pools import LocalPool, Pool, SlurmPool
from lmjax.ablation.progress import Display
from lmjax.ablation.report_data import compare_cells
from lmjax.ablation.verdict import seeds_to_add
from lmjax.ablation.worker import discard_failed, jobs
from lmjax.data import tokenized_corpus
from lmjax.train.config import Config
from lmjax.train.object_store import refuse_collapsed
from lmjax.train.run_directory import InputError
from lmjax.train.seeds import reason_against
from lmjax.train.signals import StopRequest

SECONDS_BETWEEN_LOOKS = 0.2


class AblationError(RuntimeError):
    """A cell could not be run, for a reason that is no result."""


@dataclass(frozen=True)
class Outcome:
    """How a call of `run` ended.

    Attributes:
      ablation: what was run, with the seeds that were added.
      cells: every cell of it, arm by arm.
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
    vmap_seeds: bool = False,
    progress: bool = True,
) -> Outcome:
    """Runs what is left of an ablation.

    Args:
      ablation: what to run.
      directory: where its cells are or will be. Cells of other ablations in it are left alone, and
        cells in common are shared.
      processes: how many work at the same time.
      threads: XLA threads of each on CPU. With one, results do not depend on `processes`.
      retry_failed: run cells again that failed.
      slurm: parameters of submitit; the processes then are jobs of a Slurm array.
      vmap_seeds: train the seeds of an arm in one program where that is possible; results agree
        with those of runs alone but for rounding.
      progress: show a table of the cells, or lines where the output is no terminal.

    Returns:
      The cells. SIGINT and SIGTERM stop the runs with checkpoints; the same call goes on then.

    Raises:
      InputError, DataError: something cannot be used; see `lmjax.train.train`.
      AblationError: a worker failed. The others have saved checkpoints.
    """
    directory = Path(directory)
    refuse_collapsed(directory)
    for name, value in (("processes", processes), ("threads", threads)):
        if value < 1:
            raise InputError(f"{name} is {value}; it must be at least 1")
    _prepare_texts(ablation, progress)
    _open(directory)
    if retry_failed:
        discard_failed(directory, with_added_seeds(ablation, directory))

    def start(definition: Path, left: Mapping[str, Config]) -> Pool:
        count = min(processes, len(jobs(left, vmap_seeds=vmap_seeds)))
        if slurm is None:
            return LocalPool(directory, definition, count, threads, vmap_seeds)
        return SlurmPool(directory, definition, count, threads, vmap_seeds, slurm)

    notes = _one_after_another(ablation) if vmap_seeds else []
    ablation = with_added_seeds(ablation, directory)
    while True:
        stopped_by = _run_cells(ablation, directory, start, notes, progress)
        cells = tuple(grid.read_cells(ablation, directory))
        if any(cell.status == "missing" for cell in cells):
            if stopped_by is None:
                raise AblationError(
                    f"the workers ended before the cells did; see {directory / 'logs'}"
                )
            return Outcome(ablation, cells, stopped_by)
        grown = with_added_seeds(ablation, directory)
        if grown == ablation:
            return Outcome(ablation, cells, None)
        if stopped_by is not None:
            return Outcome(ablation, cells, stopped_by)
        ablation = grown


def with_added_seeds(ablation: Ablation, directory: Path) -> Ablation:
    """The ablation with the seeds that its cells so far call for.

    That is the ablation itself where a cell has not ended yet, where every question is settled, and
    where `max_seeds` is reached or not given.
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


def _run_cells(
    ablation: Ablation,
    directory: Path,
    start: Callable[[Path, Mapping[str, Config]], Pool],
    notes: Sequence[str],
    progress: bool,
) -> str | None:
    """Runs what is left of the cells; returns the signal that stopped it, if one did."""
    definition = grid.write_ablation(ablation, directory)
    cells = grid.read_cells(ablation, directory)
    missing = {cell.directory.name for cell in cells if cell.status == "missing"}
    left = {key: config for key, config in grid.plan(ablation).items() if key in missing}
    if not left:
        return None
    with StopRequest() as stop:
        pool = start(definition, left)
        try:
            with Display(ablation, enabled=progress) as display:
                for note in notes:
                    display.note(note)
                if ablation.seed_counts:
                    display.note(_added(ablation))
                _watch(pool, stop, display, ablation, directory)
        finally:
            pool.kill()
    return stop.received


def _one_after_another(ablation: Ablation) -> list[str]:
    """Which arms cannot have their seeds trained at once, and why, a line each."""
    reasons = {arm: reason_against(config) for arm, config in ablation.arms.items()}
    return [
        f"{arm}: its seeds are trained one after another, because {why}"
        for arm, why in reasons.items()
        if why is not None
    ]


def _added(ablation: Ablation) -> str:
    given = ablation.seed_counts
    counts = (f"{arm} has {given[arm]}" for arm in ablation.arms if arm in given)
    return f"seeds were added where a question is open: {', '.join(counts)}"


def _prepare_texts(ablation: Ablation, progress: bool) -> None:
    """Tokenizes each text once, before several workers would set out to."""
    try:
        for data, context in {(c.data, c.context) for c in ablation.arms.values()}:
            tokenized_corpus(data, window=context + 1, progress=progress)
    except ValueError as error:
        raise InputError(str(error)) from error


def _open(directory: Path) -> None:
    """Makes the directory, or finds that of an ablation."""
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
    """Shows the cells until no worker is left; has all workers stop when one fails, or on request.

    Raises:
      InputError, AblationError: a worker failed.
    """
    keys = tuple(grid.plan(ablation))
    states = _read_states(keys, ablation.metric, directory, {})
    display.show(states)
    stopping = False
    while pool.alive():
        if not stopping and (stop.received or pool.failure()):
            stopping = True
            pool.stop()
            display.note("stopping: the runs save checkpoints")
        time.sleep(SECONDS_BETWEEN_LOOKS)
        states = _read_states(keys, ablation.metric, directory, states)
        display.show(states)
    failure = None if stop.received else pool.failure()
    if failure is not None:
        raise (InputError if failure.bad_input else AblationError)(failure.reason)


def _read_states(
    keys: Sequence[str], metric: str, directory: Path, known: Mapping[str, State]
) -> dict[str, State]:
    """The states of cells; what is known to have ended is not read again."""
    cells = grid.cells_directory(directory)
    return {
        key: known[key]
        if key in known and known[key].status != "missing"
        else grid.read_state(cells / key, metric)
        for key in keys
    }
