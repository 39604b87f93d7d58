"""A process that runs the cells of an ablation, one after another, until none is left.

    python -m lmjax.ablation.worker DIRECTORY DEFINITION THREADS

Any number of workers share a directory: each takes a lock on the cell that it is working on, which
the operating system releases when the worker ends, however it ends. The process that started it
holds its standard input open; when that is closed, because the other process asks for it or is
dead, the worker saves a checkpoint and ends.

Knows how one run is trained; nothing of who starts workers, and where.
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
from pathlib import Path

import jax

from lmjax.ablation import grid
from lmjax.ablation.grid import Ablation
from lmjax.data import DataError
from lmjax.train import Config, InputError, TrainingFailed, train
from lmjax.train.locks import lock
from lmjax.train.memory import keep_freed_memory
from lmjax.train.signals import StopRequest

DONE, FAILED, BAD_INPUT, STOPPED = 0, 1, 2, 75
SECONDS_BETWEEN_LOOKS = 0.2


def work(directory: Path, ablation: Ablation, stop: StopRequest, *, patient: bool = True) -> None:
    """Runs every cell that is not done, until all are or somebody asks to stop.

    Args:
      directory: where the cells are.
      ablation: what they are.
      stop: is watched for requests to stop.
      patient: wait for cells that other workers are at, in case these workers die.
    """
    left = grid.plan(ablation)
    while left and not stop.received:
        taken = [key for key, config in left.items() if _run_if_free(directory, key, config, stop)]
        for key in taken:
            del left[key]
        if not taken:
            if not patient:
                return
            time.sleep(SECONDS_BETWEEN_LOOKS)


def _run_if_free(directory: Path, key: str, config: Config, stop: StopRequest) -> bool:
    """Runs a cell unless that is done; False when another worker is at it or work has stopped."""
    if stop.received:
        return False
    run = grid.cells_directory(directory) / key
    with cell_lock(directory, key) as mine:
        if mine and not grid.is_done(run):
            try:
                train(config, run, progress=False, stop=stop)
            except TrainingFailed as error:
                grid.record_failure(run, str(error))
        return mine


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


def main(directory: Path, definition: Path, threads: int) -> int:
    """A worker whose standard input says how long it is wanted; returns its exit code."""
    prepare_process(directory, threads)
    with StopRequest() as stop:
        threading.Thread(target=_stop_at_end_of_input, args=(stop,), daemon=True).start()
        try:
            work(directory, grid.read_ablation(definition), stop)
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
    sys.exit(main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])))
