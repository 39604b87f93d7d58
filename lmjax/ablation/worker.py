"""A worker process that runs the cells of ablations until none is left.

    python -m lmjax.ablation.worker DIRECTORY THREADS DEFINITION...

Any number of workers can share a directory: each locks the cell that it works on, and the operating
system releases the lock however the worker ends. The parent process holds the worker's standard
input open; when it is closed, by request or because the parent died, the worker saves a checkpoint
and exits.

Knows how runs are trained; nothing of who starts workers, or where.
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
from collections.abc import Collection, Sequence
from pathlib import Path

import jax

from lmjax.ablation import grid
from lmjax.ablation.grid import Ablation
from lmjax.ablation.keys import arm_and_seed
from lmjax.console.signals import StopRequest
from lmjax.data import DataError
from lmjax.files.locks import lock
from lmjax.train import Config, InputError, TrainingFailed, train
from lmjax.train.memory import keep_freed_memory
from lmjax.train.programs import Programs

DONE, FAILED, BAD_INPUT, STOPPED = 0, 1, 2, 75
SECONDS_BETWEEN_LOOKS = 0.2


def work(
    directory: Path,
    ablations: Sequence[Ablation],
    stop: StopRequest,
    *,
    patient: bool = True,
) -> None:
    """Runs unfinished cells until all are done or a stop is requested.

    Args:
      directory: directory of the cells.
      ablations: the ablations, in the order in which to run them.
      stop: watched for requests to stop.
      patient: wait for cells that other workers hold, in case those workers die.
    """
    left = {key: config for each in ablations for key, config in grid.plan(each).items()}
    programs, compiled = Programs(), set[str]()
    while left and not stop.received:
        ahead, count = list(left), len(left)
        while ahead:
            key = _first(ahead, compiled)
            ahead.remove(key)
            if _run_if_free(directory, key, left[key], stop, programs):
                compiled.add(arm_and_seed(key)[0])
                del left[key]
        if len(left) == count:
            if not patient:
                return
            time.sleep(SECONDS_BETWEEN_LOOKS)


def _first(ahead: Sequence[str], compiled: Collection[str]) -> str:
    """The next cell: of the first seed, preferably of an arm that this process has compiled.

    Seeds are run in order, so that finished cells form pairs early.
    """
    _, seed = arm_and_seed(ahead[0])
    for key in ahead:
        arm, its_seed = arm_and_seed(key)
        if its_seed == seed and arm in compiled:
            return key
    return ahead[0]


def _run_if_free(
    directory: Path, key: str, config: Config, stop: StopRequest, programs: Programs
) -> bool:
    """Runs a cell unless it is done; False if another worker holds it or work has stopped."""
    if stop.received:
        return False
    with cell_lock(directory, key) as mine:
        run = grid.cells_directory(directory) / key
        if mine and not grid.is_done(run):
            try:
                train(config, run, progress=False, stop=stop, programs=programs)
            except TrainingFailed as error:
                grid.record_failure(run, str(error))
        return mine


def cell_lock(directory: Path, key: str) -> contextlib.AbstractContextManager[bool]:
    """Locks a cell for the duration of the block; yields whether this process has the lock."""
    return lock(directory / "locks" / key, wait=False)


def discard_failed(directory: Path, ablation: Ablation) -> None:
    """Removes failed cells, except those that a worker holds, so that they are rerun."""
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


def main(directory: Path, definitions: Sequence[Path], threads: int) -> int:
    """A worker whose standard input says how long it is wanted; returns its exit code."""
    prepare_process(directory, threads)
    with StopRequest() as stop:
        threading.Thread(target=_stop_at_end_of_input, args=(stop,), daemon=True).start()
        try:
            ablations = [grid.read_ablation(definition) for definition in definitions]
            work(directory, ablations, stop)
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
    sys.exit(main(Path(folder), [Path(argument) for argument in rest], int(threads)))
