"""The training loop: everything around the train step.

`train` validates its input before writing anything, finds or creates the run directory, restores
the newest intact checkpoint, and runs steps until the planned length is reached or a stop is
requested. step.py alone decides what a step computes; where the policy changes with the step, the
loop converts the state from one phase to the next and compiles the new phase's step.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax

from lmjax import strict_json
from lmjax.console import stages
from lmjax.console.progress import Reporter, say
from lmjax.console.signals import StopRequest
from lmjax.errors import InputError, NonFiniteGradients, TrainingFailed
from lmjax.model import parameter_count
from lmjax.parallel import sharding
from lmjax.parallel.agreement import AgreedStop, from_first, is_first, refuse_unequal
from lmjax.precision import exact
from lmjax.runs.checkpoint import Checkpoints
from lmjax.runs.config import Config
from lmjax.runs.profile import Profiler
from lmjax.runs.resolved import Phase
from lmjax.runs.run_directory import RESULT, finished_result, hold_run
from lmjax.runs.state import change_phase
from lmjax.runs.store.object_store import as_url
from lmjax.runs.store.remote import local_path, staged
from lmjax.train.audited import audit_beside, finish_audits
from lmjax.train.cautions import warnings
from lmjax.train.classes import held_out_classes
from lmjax.train.evaluate import held_out_loss
from lmjax.train.exhaustion import exhaustion_explained, refuse_oversized
from lmjax.train.log import StepLog
from lmjax.train.memory import return_freed_memory
from lmjax.train.programs import PhasePrograms, Programs
from lmjax.train.records import (
    draw,
    failing_storage_explained,
    pause,
    record_result,
    record_start,
    save,
    writer_of,
)
from lmjax.train.rewind import rewind
from lmjax.train.start import Run, checked_input, start_run
from lmjax.train.step import Batch, evaluated
from lmjax.train.utilisation import Peak, peak_of


@dataclass(frozen=True)
class Outcome:
    """How a call of `train` ended.

    Attributes:
      workdir: the run directory; for a run in an object store, the copy on this machine.
      step: the last completed step.
      result: content of `result.json`; None if the run stopped before its planned length.
    """

    workdir: Path
    step: int
    result: dict[str, Any] | None


def train(
    config: Config,
    workdir: str | Path,
    *,
    stop_after: int | None = None,
    progress: bool = True,
    stop: StopRequest | None = None,
    programs: Programs | None = None,
) -> Outcome:
    """Trains, or resumes training, until the planned number of steps is done.

    Args:
      config: what to compute.
      workdir: the run directory; a started run of the same config there is resumed. A string such
        as `s3://BUCKET/RUN` names a place in an object store; see remote.py.
      stop_after: stop with a checkpoint after this many steps of this call; same schedule.
      progress: show a progress bar, or lines if the output is not a terminal.
      stop: watched by the caller, over several runs; by default this run handles signals itself.
      programs: a cache of compiled programs, shared by runs of one process.

    Returns:
      The outcome; `result` is None if `stop_after`, SIGINT or SIGTERM stopped the run.

    Raises:
      InputError: the config, the data or the directory cannot be used; nothing was written there.
      TrainingFailed: too many consecutive steps had non-finite gradients.
      CheckpointError: no checkpoint is intact, or the newest does not match the run.
      OutOfMemory: a device or the machine has less memory than the run needs.
      StorageFailed: a file or object cannot be written. Files completed before stay intact.
      ExcessPrecisionError: the backend drops roundings.
    """
    if stop_after is not None and stop_after < 1:
        raise InputError(f"stop_after is {stop_after}; it must be at least 1")
    progress = progress and is_first()
    local = None if as_url(workdir) else local_path(workdir)
    resolved, corpus, mesh = checked_input(config, progress, local)
    config = resolved.config
    refuse_unequal("flags", f"stop_after={stop_after}")
    with stages.stage("checking how the backend rounds"):
        exact.check_canary(jax.default_backend())
    note, programs = partial(say, enabled=progress), programs or Programs()
    with (
        exhaustion_explained(config),
        failing_storage_explained(workdir),
        staged(workdir, config.data.cache_path, note) as (workdir, mirror),
        hold_run(workdir, config, note),
        Checkpoints(workdir / "checkpoints", config.checkpoint.keep, note, mirror) as checkpoints,
        StopRequest() if stop is None else nullcontext(stop) as stop,
    ):
        run = start_run(resolved, corpus, mesh, workdir, checkpoints, note)
        record_start(run)
        last = min(config.steps, run.step + stop_after) if stop_after else config.steps
        result = None
        if _finished(run, programs, stop, last, progress):
            stop.promise = "finishing the evaluation; all steps are done and saved"
            result = _finish(run, programs)
        finish_audits()
        _draw(run)
    return Outcome(workdir, run.step, result)


def _finished(run: Run, programs: Programs, stop: StopRequest, last: int, progress: bool) -> bool:
    """`_loop`, entered again after each rewind; draws the curves of a run that diverges."""
    try:
        while (finished := _loop_or_rewind(run, programs, stop, last, progress)) is None:
            pass
    except TrainingFailed:
        _draw(run)
        raise
    return finished


def _draw(run: Run) -> None:
    """Draws the curves, in one process."""
    if is_first():
        with stages.stage("drawing the curves"):
            draw(run)


def _loop_or_rewind(
    run: Run, programs: Programs, stop: StopRequest, last: int, progress: bool
) -> bool | None:
    """`_loop`; None if the run was rewound and the loop must be entered again."""
    try:
        return _loop(run, programs, stop, last, progress)
    except NonFiniteGradients as failure:
        if run.config.faults.non_finite != "rewind":
            raise
        rewind(run, failure)
        return None


def _loop(run: Run, programs: Programs, stop: StopRequest, last: int, progress: bool) -> bool:
    """Runs steps until the run is done (True) or stopped with a checkpoint (False) by `last`.

    A stop request that arrived earlier, during compilation, takes effect after one step.
    """
    config, phases, first = run.config, run.resolved, run.step
    if first >= last:
        return first >= config.steps
    batch = _next_batch(run, first + 1)
    run.note(_introduction(run))
    if not run.step:
        run.note(_held_out_note(run))
    with stages.stage("compiling the train step"):
        steps = _enter_phase(run, batch, programs)
    with stages.stage("measuring what products take"):
        peak = peak_of(phases.at(first), run.mesh)
    agreed = AgreedStop(stop, run.mesh)
    boundaries = {phase.start for phase in phases.phases if phase.start > first}
    with (
        writer_of(run, telemetry=config.telemetry.every > 0) as writer,
        Reporter(first, config.steps, enabled=progress) as report,
        stop.acknowledged_by(report.note),
        Profiler(config.profile.range, run.workdir, report.note) as profiler,
    ):
        _announce(run, peak, report)
        run.clock.resume()
        log = StepLog(writer, report, phases, run.clock, first)
        log.peak = peak
        for step in range(first + 1, last + 1):
            if step - 1 in boundaries:
                log.flush()
                steps = _next_phase(run, batch, programs, log)
            train_step = steps.watched if config.is_watched(step) else steps.train
            with _profiled(run, step, profiler, report):
                run.state, metrics = train_step(run.state, batch)
            report.dispatched(step, metrics["loss"])
            # Fetching the previous step's metrics after dispatching this one keeps the device
            # busy.
            log.flush()
            if config.is_logged(step):
                log.pending(step, metrics)
            if config.is_evaluated(step):
                log.flush()
                with report.stage("evaluating"):
                    _evaluate(run, programs, log)
            asked = agreed.after_step()
            stopping = asked is not None or step == last
            if stopping or config.is_saved(step):
                log.flush()
                save(run, log)
            if stopping:
                break
            batch = _next_batch(run, step + 1)
        run.checkpoints.wait()
        if step < config.steps:
            why = asked or "--stop-after"
            report.note(f"stopped by {why} at step {step}; run the same command again to resume")
    return step >= config.steps


def _announce(run: Run, peak: Peak | None, report: Reporter) -> None:
    """Shows what the reader of the steps to come should know."""
    phases, first = run.resolved, run.step
    if peak is not None:
        report.note(f"MFU is the share of {peak} that model FLOP take")
    if phases.at(first) != phases.after(first):
        report.note(_phase_note(phases.at(first), first))
    for warning in warnings(phases):
        report.note(f"warning: {warning}")


@contextmanager
def _profiled(run: Run, step: int, profiler: Profiler, report: Reporter) -> Iterator[None]:
    """Computes a step, traced if it is asked for; the clock does not count the profiler's time."""
    if profiler.begins(step):
        pause(run)
        profiler.begin()
        run.clock.resume()
    with profiler.step(step):
        yield
    if profiler.ends(step):
        pause(run)
        with report.stage("writing the trace"):
            profiler.end()
        run.clock.resume()


def _next_phase(run: Run, batch: Batch, programs: Programs, log: StepLog) -> PhasePrograms:
    """Enters a phase between two steps, off the clock."""
    pause(run)
    with log.report.stage("compiling the train step"):
        steps = _enter_phase(run, batch, programs)
    phase = run.resolved.at(run.step)
    log.peak = peak_of(phase, run.mesh)
    log.report.note(_phase_note(phase, run.step))
    run.clock.resume()
    return steps


def _enter_phase(run: Run, batch: Batch, programs: Programs) -> PhasePrograms:
    """The programs of the next step's phase.

    The state is converted to that phase's formats here, not after the previous phase's last step,
    so a checkpoint, an evaluation or the end of a run there holds what the previous phase made.
    """
    left, entered = run.resolved.after(run.step), run.resolved.at(run.step)
    if left != entered:
        run.state = change_phase(run.state, left, entered, run.mesh)
    steps = programs.phase(entered, run.mesh, run.state, batch)
    for step in filter(None, (steps.train, steps.watched)):
        refuse_oversized(step, entered.config)
    return_freed_memory()
    if run.config.audit:
        audit_beside(entered, run.mesh, steps.jaxpr, steps.train, run.workdir)
    return steps


def _phase_note(phase: Phase, step: int) -> str:
    return f"step {step}  from here on {phase.config.precision}"


def _introduction(run: Run) -> str:
    """Describes the run about to start in one line."""
    start = f"resuming {run.workdir} at step {run.step}" if run.step else f"starting {run.workdir}"
    devices = jax.devices()
    return (
        f"{start}: {parameter_count(run.config.model):,} parameters, {len(run.corpus.train):,} "
        f"training tokens, {len(devices)} x {devices[0].device_kind}; policy "
        f"{run.config.precision}, loss scale {run.config.loss_scale.kind}"
    )


def _held_out_note(run: Run) -> str:
    """Describes the text of the held-out loss, and how to choose another."""
    data, corpus = run.config.data, run.corpus
    files = ["--data.validation-files"] if data.dataset == "text_files" else []
    fraction = [] if data.validation_files else ["--data.validation-fraction"]
    text = corpus.held_out or f"{corpus.validation_documents:,} documents"
    return (
        f"held out: {text} ({corpus.validation.size:,} tokens); "
        f"choose with {' or '.join(files + fraction)}"
    )


def _next_batch(run: Run, step: int) -> Batch:
    run.positions.note(step, run.data)
    return sharding.global_batch(run.mesh, next(run.data), sharding.batch_share(run.mesh)[1])


def _evaluate(run: Run, programs: Programs, log: StepLog) -> None:
    pause(run)
    loss = _held_out(run, programs, batches=run.config.evaluation.batches)
    log.evaluated(run.step, loss)
    run.clock.resume()


def _finish(run: Run, programs: Programs) -> dict[str, Any]:
    """Evaluates the whole validation split and writes `result.json`, unless already done."""
    if from_first(finished_result(run.workdir, run.config) is not None):
        return strict_json.read(run.workdir / RESULT)
    with stages.stage("evaluating on the whole validation split"):
        if run.config.model.classes:
            phase = run.resolved.after(run.step)
            params = evaluated(run.state.params, run.state.scaling, phase)
            found = held_out_classes(phase, params, run.corpus, run.mesh)
            return record_result(run, *found)
        return record_result(run, _held_out(run, programs))


def _held_out(run: Run, programs: Programs, *, batches: int = 0) -> float:
    """The held-out loss of the parameters, computed in the phase that produced them."""
    phase = run.resolved.after(run.step)
    eval_step = programs.evaluation(phase, run.mesh)
    params = evaluated(run.state.params, run.state.scaling, phase)
    return held_out_loss(eval_step, params, run.corpus, run.config, run.mesh, batches=batches)
