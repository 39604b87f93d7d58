"""A process that runs the cells of ablations until none is left.

    python -m lmjax.ablation.worker DIRECTORY THREADS [--vmap-seeds] DEFINITION...

It runs them one after another, or the seeds of an arm at once where that is asked for and possible.

Any number of workers share a directory: each takes a lock on the cell that it is working on, which
the operating system releases when the worker ends, however it ends. The process that started it
holds its standard input open; when that is closed, because the other process asks for it or is
dead, the worker saves a checkpoint and ends.

Knows how runs are trained; nothing of who starts workers, and where.
"""

from __future__ import annotations

import contextlib
import os
import platform
import shutil
import sys
import threading
import time
import traceback
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

import jax

from lmjax.ablation import grid
from lmjax.ablation.grid import Ablation
from lmjax.data import DataError
from lmjax.train import CannotVmap, Config, InputError, TrainingFailed, train, train_seeds
from lmjax.train.locks import lock
from lmjax.train.memory import keep_freed_memory
from lmjax.train.programs import Programs
from lmjax.train.seeds import reason_against
from lmjax.train.signals import StopRequest

DONE, FAILED, BAD_INPUT, STOPPED = 0, 1, 2, 75
SECONDS_BETWEEN_LOOKS = 0.2
VMAP_SEEDS = "--vmap-seeds"


def work(
    directory: Path,
    ablations: Sequence[Ablation],
    stop: StopRequest,
    *,
    patient: bool = True,
    vmap_seeds: bool = False,
) -> None:
    """Runs every cell that is not done, until all are or somebody asks to stop.

    Args:
      directory: where the cells are.
      ablations: what they are; those of the first come first.
      stop: is watched for requests to stop.
      patient: wait for cells that other workers are at, in case these workers die.
      vmap_seeds: train the seeds of an arm in one program; see `lmjax/train/seeds.py`.
    """
    left = {key: config for each in ablations for key, config in grid.plan(each).items()}
    together = jobs(left, vmap_seeds=vmap_seeds)
    programs, compiled = Programs(), set[str]()
    while left and not stop.received:
        taken, ahead = [], list(together)
        while ahead:
            job = _first(ahead, compiled)
            ahead.remove(job)
            cells = {key: left[key] for key in job if key in left}
            ran = _run_free(directory, cells, stop, programs)
            compiled |= {grid.arm_and_seed(key)[0] for key in ran}
            taken += ran
        for key in taken:
            del left[key]
        if not taken:
            if not patient:
                return
            time.sleep(SECONDS_BETWEEN_LOOKS)


def jobs(cells: Mapping[str, Config], *, vmap_seeds: bool) -> list[list[str]]:
    """The keys of cells, those together that one worker runs at once, memory permitting."""
    if not vmap_seeds:
        return [[key] for key in cells]
    found = []
    for arm in grid.arms(cells):
        apart = reason_against(cells[arm[0]]) is not None
        found += [[key] for key in arm] if apart else [arm]
    return found


def _first(ahead: Sequence[list[str]], compiled: Collection[str]) -> list[str]:
    """The job to do first: of the first seed, and there of an arm that this process has compiled.

    Seeds stay in turn, so that what is there is paired early.
    """
    of_seed = lambda job: grid.arm_and_seed(job[0])[1]
    in_turn = [job for job in ahead if of_seed(job) == of_seed(ahead[0])]
    known = (job for job in in_turn if grid.arm_and_seed(job[0])[0] in compiled)
    return next(known, ahead[0])


def _run_free(
    directory: Path, cells: Mapping[str, Config], stop: StopRequest, programs: Programs
) -> list[str]:
    """Runs those of some cells that are not done, at once if they are several and can be.

    Returns:
      All of them but those that another worker is at; none when work has stopped.
    """
    if stop.received:
        return []
    with contextlib.ExitStack() as locks:
        mine = [key for key in cells if locks.enter_context(cell_lock(directory, key))]
        runs = {key: grid.cells_directory(directory) / key for key in mine}
        todo = [key for key in mine if not grid.is_done(runs[key])]
        if len(todo) > 1 and _run_at_once([cells[key] for key in todo], runs, stop):
            return mine
        for key in todo:
            if stop.received:
                break
            try:
                train(cells[key], runs[key], progress=False, stop=stop, programs=programs)
            except TrainingFailed as error:
                grid.record_failure(runs[key], str(error))
        return mine


def _run_at_once(configs: Sequence[Config], runs: Mapping[str, Path], stop: StopRequest) -> bool:
    """Runs cells that differ in the seed alone in one program; False, and a line, if none can."""
    workdirs = {config.seed: runs[grid.cell_key(config)] for config in configs}
    try:
        outcomes = train_seeds(configs[0], workdirs, stop=stop)
    except CannotVmap as error:
        names = ", ".join(path.name for path in workdirs.values())
        print(f"one after another, because {error}: {names}", file=sys.stderr)
        return False
    for seed, outcome in outcomes.items():
        if isinstance(outcome, TrainingFailed):
            grid.record_failure(workdirs[seed], str(outcome))
    return True


def cell_lock(directory: Path, key: str) -> contextlib.AbstractContextManager[bool]:
    """Whether the cell belongs to this process for the length of the block."""
    return lock(directory / "locks" / key, wait=False)


def discard_failed(directory: Path, ablation: Ablation) -> None:
    """Removes the cells that failed, except those that a worker is at, so that they run again."""
    cells = grid.cells_directory(directory)
    for leftover in cells.glob(".discarded-*"):
        shutil.rmtree(leftover)
    for key in grid.plan(ablation):
        with cell_lock(directory, key) as mine:
            if mine and grid.read_state(cells / key, ablation.metric).status == "failed":
                # A directory half removed would be no run directory any more.
                discarded = cells / f".discarded-{key}"
                (cells / key).rename(discarded)
                shutil.rmtree(discarded)


def prepare_process(directory: Path, threads: int) -> None:
    """Settings of a worker's process; they must come before anything is computed.

    Args:
      directory: of the ablation; the compiled programs are kept in it, so that a program is
        compiled once for all the cells that run it. Executables are those of one machine.
      threads: of XLA's pool on CPU. Sums are divided among them, so the last bits of a result
        depend on their number.
    """
    os.environ["PJRT_NPROC"] = str(threads)
    keep_freed_memory()
    if jax.config.values["jax_compilation_cache_dir"] is None:
        jax.config.update(
            "jax_compilation_cache_dir", str((directory / "compiled" / platform.node()).absolute())
        )
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)


def main(directory: Path, definitions: Sequence[Path], threads: int, *, vmap_seeds: bool) -> int:
    """A worker whose standard input says how long it is wanted; returns its exit code."""
    prepare_process(directory, threads)
    with StopRequest() as stop:
        threading.Thread(target=_stop_at_end_of_input, args=(stop,), daemon=True).start()
        try:
            ablations = [grid.read_ablation(definition) for definition in definitions]
            work(directory, ablations, stop, vmap_seeds=vmap_seeds)
        except (InputError, DataError) as error:
            print(error, file=sys.stderr)
            return BAD_INPUT
        except Exception:
            traceback.print_exc()
            return FAILED
        return STOPPED if stop.received else DONE


def _stop_at_end_of_input(stop: StopRequest) -> None:
    # Not sys.stdin: a thread inside its buffer keeps the interpreter from shutting down.
    while os.read(0, 1):
        pass
    stop.received = stop.received or "the end of the command"


if __name__ == "__main__":
    folder, threads, *rest = sys.argv[1:]
    paths = [Path(argument) for argument in rest if argument != VMAP_SEEDS]
    sys.exit(main(Path(folder), paths, int(threads), vmap_seeds=VMAP_SEEDS in rest))
