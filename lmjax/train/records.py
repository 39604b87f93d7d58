"""What a run leaves in its directory: rows, checkpoints, the result, the curves.

The parts of the loop that know files. They take a `Run` with its state; nothing here knows how
steps are computed.
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
from lmjax.train.log import StepLog
from lmjax.train.start import Run


@contextmanager
def failing_storage_explained(workdir: str | Path) -> Iterator[None]:
    """Raises `StorageFailed` for what the operating system refuses in the block."""
    try:
        yield
    except OSError as error:
        raise StorageFailed(
            f"{error.filename or workdir}: {error.strerror or error}; the newest complete "
            "checkpoint is intact. Once that is mended, the same command goes on from there"
        ) from error


def record_start(run: Run) -> None:
    """Writes where the steps to come are computed, unless there are none, and the tokenizer."""
    if run.step < run.config.steps and is_first():
        record_environment(run.workdir, run.config)
        run.corpus.tokenizer.save(run.workdir / "tokenizer.json")


def writer_of(run: Run, *, telemetry: bool = False) -> MetricsWriter:
    """What writes the rows of the steps after the run's last one."""
    if is_first():
        sinks = open_sinks(run.config.metrics, run.workdir, to_json(run.config), run.note)
        return MetricsWriter(run.workdir, run.step, telemetry=telemetry, sinks=sinks)
    return SilentWriter()


def pause(run: Run) -> None:
    """Waits for the last step; the time until the clock is resumed does not count."""
    jax.block_until_ready(run.state.params)
    run.clock.pause()


def save(run: Run, log: StepLog) -> None:
    """Writes a checkpoint in the background, once the rows up to it are written."""
    # Saving waits for the step anyway; waiting first gives the step's time to the run.
    pause(run)
    if not log.writer.flush():
        log.report.note("warning: rows of metrics.jsonl wait for a file system that hangs")
    progress = {
        "train_seconds": run.clock.seconds,
        "corpus": run.corpus.fingerprint,
        "rewinds": run.rewinds,
    }
    # While steps are being skipped, the checkpoints from before are those to rewind to.
    good = int(run.state.opt_state.consecutive_skips) == 0
    prune = good or run.config.faults.non_finite != "rewind"
    run.checkpoints.save(run.step, run.state, run.data.get_state(), progress, prune=prune)


def record_result(run: Run, loss: float) -> dict[str, Any]:
    """Writes the last row and `result.json` of a run that has done its steps.

    The row may be there already, from a process killed before the result was.

    Args:
      run: as the last step left it.
      loss: held out, over the whole validation split.

    Returns:
      The result, as it stands in the file.
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
    }
    text = strict_json.dumps(result, indent=2)
    if is_first():
        replace_text(run.workdir / "result.json", text + "\n")
    return strict_json.loads(text)


def draw(run: Run) -> None:
    """Draws the curves of a run, and what its telemetry has counted, if anything."""
    rows = read_rows(run.workdir / "metrics.jsonl")
    title = printable(f"{run.workdir.name}   {run.config.precision}")
    telemetry = read_rows(run.workdir / "telemetry.jsonl")
    with warnings.catch_warnings():
        # A font without some glyph is nothing that the reader could mend.
        warnings.simplefilter("ignore")
        if rows:
            with decoration("curves.png", run.note):
                draw_curves(rows, title, run.workdir / "curves.png")
        if telemetry:
            with decoration("telemetry.png", run.note):
                draw_telemetry(telemetry, title, run.workdir)
