"""What a run leaves in its directory: rows, checkpoints, the result, the curves.

The parts of the loop that write files. They take a `Run` with its state and do not know how steps
are computed.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax

from lmjax import strict_json
from lmjax.console.decoration import decoration
from lmjax.errors import StorageFailed
from lmjax.files.filenames import printable
from lmjax.parallel.agreement import is_first
from lmjax.runs.config import to_json
from lmjax.runs.metrics import (
    MetricsWriter,
    SilentWriter,
    draw_curves,
    read_rows,
    replace_text,
)
from lmjax.runs.run_directory import parameters_sha256, record_environment
from lmjax.runs.sinks import open_sinks
from lmjax.telemetry.rows import draw_telemetry
from lmjax.train.classes import Confusion, draw_confusion
from lmjax.train.log import StepLog
from lmjax.train.start import Run


@contextmanager
def failing_storage_explained(workdir: str | Path) -> Iterator[None]:
    """Turns operating-system errors of the block into `StorageFailed`."""
    try:
        yield
    except OSError as error:
        raise StorageFailed(
            f"{error.filename or workdir}: {error.strerror or error}; the newest complete "
            "checkpoint is intact. Once that is mended, the same command resumes from there"
        ) from error


def record_start(run: Run) -> None:
    """Writes the environment of the remaining steps, if there are any, and the tokenizer."""
    if run.step < run.config.steps and is_first():
        record_environment(run.workdir, run.resolved)
        run.corpus.tokenizer.save(run.workdir / "tokenizer.json")


def writer_of(run: Run, *, telemetry: bool = False) -> MetricsWriter:
    """The writer of rows for the steps after the run's last one."""
    if is_first():
        sinks = open_sinks(run.config.metrics, run.workdir, to_json(run.config), run.note)
        return MetricsWriter(run.workdir, run.step, telemetry=telemetry, sinks=sinks)
    return SilentWriter()


def pause(run: Run) -> None:
    """Waits for the last step; stops counting time until the clock resumes."""
    jax.block_until_ready(run.state.params)
    run.clock.pause()


def save(run: Run, log: StepLog) -> None:
    """Writes a checkpoint in the background, after the rows up to it are written."""
    # Saving waits for the step anyway; waiting first counts the step's time as training.
    pause(run)
    if not log.writer.flush():
        log.report.note("warning: rows of metrics.jsonl are waiting for a file system that hangs")
    progress = {
        "train_seconds": run.clock.seconds,
        "corpus": run.corpus.fingerprint,
        "rewinds": run.rewinds,
    }
    # While steps are skipped, keep the earlier checkpoints to rewind to.
    good = int(run.state.opt_state.consecutive_skips) == 0
    prune = good or run.config.faults.non_finite != "rewind"
    run.checkpoints.save(run.step, run.state, run.data.get_state(), progress, prune=prune)


def record_result(run: Run, loss: float, classes: Confusion | None = None) -> dict[str, Any]:
    """Writes the last row and `result.json` of a finished run.

    The row may exist already, written by a process killed before it wrote the result.

    Args:
      run: as the last step left it.
      loss: held-out loss over the whole validation split.
      classes: what the model took the texts of that split for, if it tells classes apart; drawn
        too.

    Returns:
      The result, as written to the file.
    """
    config = run.config
    row = {"step": config.steps, "eval_loss": loss}
    with writer_of(run) as writer:
        if strict_json.loads(strict_json.dumps(row)) not in read_rows(
            run.workdir / "metrics.jsonl"
        ):
            writer.write(row)
    result = {
        "steps": config.steps,
        "eval_loss": loss,
        "tokens": config.steps * config.batch_size * config.context,
        "train_seconds": run.clock.seconds,
        "parameters_sha256": parameters_sha256(run.state.params),
        **(classes.as_result() if classes else {}),
    }
    text = strict_json.dumps(result, indent=2)
    if is_first():
        replace_text(run.workdir / "result.json", text + "\n")
        if classes:
            title = printable(f"{run.workdir.name}   {config.precision}")
            with decoration("confusion.png", run.note):
                draw_confusion(classes, title, run.workdir / "confusion.png")
    return strict_json.loads(text)


def draw(run: Run) -> None:
    """Draws a run's curves, and its telemetry counts if there are any."""
    rows = read_rows(run.workdir / "metrics.jsonl")
    title = printable(f"{run.workdir.name}   {run.config.precision}")
    telemetry = read_rows(run.workdir / "telemetry.jsonl")
    with warnings.catch_warnings():
        # The reader cannot fix a font that lacks a glyph.
        warnings.simplefilter("ignore")
        if rows:
            with decoration("curves.png", run.note):
                draw_curves(rows, title, run.workdir / "curves.png")
        if telemetry:
            with decoration("telemetry.png", run.note):
                draw_telemetry(telemetry, title, run.workdir)
