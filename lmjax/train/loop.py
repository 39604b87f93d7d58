"""Running an experiment: everything around the train step.

`train` checks its input before it writes anything, finds or makes the run directory, restores the
newest checkpoint, and calls the step until the planned length is reached or somebody asks it to
stop. What a step computes is decided in step.py alone; where the policy changes with the step, the
loop moves the state from one phase to the next and compiles that one's step.
"""

from __future__ import annotations

import json
import time
from contextlib import closing, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax

from lmjax import sharding
from lmjax.data import TokenizedCorpus, tokenized_corpus, train_iterator
from lmjax.model import parameter_count
from lmjax.numerics.telemetry import draw_telemetry, telemetry_row
from lmjax.precision import exact
from lmjax.train.advice import warnings
from lmjax.train.checkpoint import Checkpoints
from lmjax.train.config import Config
from lmjax.train.evaluate import held_out_loss
from lmjax.train.metrics import (
    MetricsWriter,
    draw_curves,
    read_rows,
    replace_text,
    strict_json,
)
from lmjax.train.progress import Reporter
from lmjax.train.run_directory import (
    InputError,
    open_run,
    parameters_sha256,
    record_environment,
)
from lmjax.train.signals import StopRequest
from lmjax.train.state import TrainState, abstract_state, change_phase, create_state
from lmjax.train.step import make_eval_step, make_train_step


class TrainingFailed(RuntimeError):
    """The run cannot go on: its gradients stay non-finite."""


@dataclass(frozen=True)
class Outcome:
    """How a call of `train` ended.

    Attributes:
      workdir: the run directory.
      step: the last step done.
      result: content of `result.json`; None when the run was stopped before its planned length.
    """

    workdir: Path
    step: int
    result: dict[str, Any] | None


@dataclass
class _Run:
    """What the functions below share: fixed parts of a run, and the three that move with it."""

    config: Config
    corpus: TokenizedCorpus
    mesh: sharding.Mesh
    workdir: Path
    checkpoints: Checkpoints
    data: Any
    state: TrainState
    train_seconds: float

    @property
    def step(self) -> int:
        return int(self.state.step)


def train(
    config: Config,
    workdir: str | Path,
    *,
    stop_after: int | None = None,
    progress: bool = True,
    stop: StopRequest | None = None,
) -> Outcome:
    """Trains, or goes on training, until the planned number of steps is done.

    Args:
      config: what to compute.
      workdir: the run directory; one that holds a started run of the same config is resumed.
      stop_after: stop with a checkpoint after this many steps of this call. The schedule stays
        that of `config.steps`.
      progress: show a progress bar, or lines where the output is no terminal.
      stop: a request that the caller watches for, over several runs; by default this run takes
        over the signals itself.

    Returns:
      How it ended; `result` is None if it was stopped by `stop_after`, SIGINT or SIGTERM.

    Raises:
      InputError: the config, the data or the directory cannot be used; nothing was written there.
      TrainingFailed: too many steps in a row had non-finite gradients.
      ExcessPrecisionError: the backend drops roundings.
    """
    if stop_after is not None and stop_after < 1:
        raise InputError(f"stop_after is {stop_after}; it must be at least 1")
    workdir = Path(workdir)
    config, corpus, mesh = _checked(config, progress)
    exact.check_canary(jax.default_backend())
    open_run(workdir, config)
    with (
        closing(Checkpoints(workdir / "checkpoints", config.checkpoint.keep)) as checkpoints,
        StopRequest() if stop is None else nullcontext(stop) as stop,
    ):
        run = _start(config, corpus, mesh, workdir, checkpoints)
        if run.step < config.steps:
            record_environment(workdir, config)
            corpus.tokenizer.save(workdir / "tokenizer.json")
        finished = _loop(run, stop, stop_after, progress)
        result = _finish(run) if finished else None
    _draw(run)
    return Outcome(workdir, run.step, result)


def _checked(config: Config, progress: bool) -> tuple[Config, TokenizedCorpus, sharding.Mesh]:
    """The resolved config, its corpus and its mesh; refuses what does not fit together."""
    try:
        config = config.resolved()
        _refuse_f64_without_x64(config)
        mesh = sharding.make_mesh(config.mesh)
        rows = (config.batch_size // config.micro_batches, config.evaluation.batch_size)
        for batch_rows in rows:
            sharding.batch_sharding(mesh, (batch_rows, config.context))
        corpus = tokenized_corpus(config.data, window=config.context + 1, progress=progress)
    except ValueError as error:
        raise InputError(str(error)) from error
    if corpus.tokenizer.vocab_size > config.model.vocab_size:
        raise InputError(
            f"the tokenizer {corpus.tokenizer.name} has {corpus.tokenizer.vocab_size} tokens, but "
            f"the model embeds {config.model.vocab_size}; raise --model.vocab-size"
        )
    return config, corpus, mesh


def _refuse_f64_without_x64(config: Config) -> None:
    sites = [site for _, phase in config.phases for site in phase.sites.values()]
    formats = {f.name for site in sites for f in (site.params, site.compute, site.output)}
    if "f64" in formats and not jax.config.read("jax_enable_x64"):
        raise ValueError("f64 needs 64-bit JAX; set JAX_ENABLE_X64=1 in the environment")


def _start(
    config: Config,
    corpus: TokenizedCorpus,
    mesh: sharding.Mesh,
    workdir: Path,
    checkpoints: Checkpoints,
) -> _Run:
    """The run at its newest checkpoint, or at step 0."""
    data = train_iterator(
        corpus,
        length=config.context,
        batch_size=config.batch_size,
        seed=config.seed,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
    )
    latest = checkpoints.latest()
    if latest is None:
        state = create_state(config.at(0), mesh)
        return _Run(config, corpus, mesh, workdir, checkpoints, data, state, 0.0)
    restored = checkpoints.restore(latest, abstract_state(config.after(latest), mesh))
    if restored.progress["corpus"] != corpus.fingerprint:
        raise InputError(
            f"{workdir} was trained on another text: the files or the tokenizer behind "
            f"{config.data.dataset} have changed; restore them or choose another --workdir"
        )
    data.set_state(restored.data)
    seconds = restored.progress["train_seconds"]
    return _Run(config, corpus, mesh, workdir, checkpoints, data, restored.state, seconds)


def _loop(run: _Run, stop: StopRequest, stop_after: int | None, progress: bool) -> bool:
    """Steps until the run is done (True) or stopped with a checkpoint (False).

    A request to stop that came earlier, while the step was compiled, is met after one step.
    """
    config, first = run.config, run.step
    last = min(config.steps, first + stop_after) if stop_after else config.steps
    if first >= last:
        return first >= config.steps
    batch = _next_batch(run)
    programs = _enter_phase(run, batch)
    boundaries = {start for start, _ in config.phases if start > first}
    with (
        MetricsWriter(run.workdir, first, telemetry=config.telemetry.every > 0) as writer,
        Reporter(first, config.steps, enabled=progress) as report,
    ):
        report.note(_introduction(run))
        if config.at(first) != config.after(first):
            report.note(_phase_note(config, first))
        for warning in warnings(config):
            report.note(f"warning: {warning}")
        log = _Log(writer, report, run, first)
        for step in range(first + 1, last + 1):
            if step - 1 in boundaries:
                log.flush()
                _pause(run, log)
                programs = _enter_phase(run, batch)
                report.note(_phase_note(config, step - 1))
                log.resume()
            watched = config.telemetry.every and step % config.telemetry.every == 0
            train_step = programs.watched if watched else programs.train
            run.state, metrics = train_step(run.state, batch)
            report.advance(step)
            # Fetching the metrics of the step before, now that this one is on its way, keeps the
            # device busy.
            log.flush()
            if step % config.log_every == 0 or watched or step == config.steps:
                log.pending(step, metrics)
            if (
                config.evaluation.every
                and step % config.evaluation.every == 0 < config.steps - step
            ):
                log.flush()
                _evaluate(run, programs.evaluate, log, config.evaluation.batches)
            stopping = stop.received is not None or step == last
            if stopping or step % config.checkpoint.every == 0:
                log.flush()
                _save(run, log)
            if stopping:
                break
            batch = _next_batch(run)
        run.checkpoints.wait()
        if step < config.steps:
            why = stop.received or f"--stop-after {stop_after}"
            report.note(f"stopped by {why} at step {step}; run the same command again to go on")
    return step >= config.steps


class _Programs(NamedTuple):
    """The compiled steps of one phase; `watched` is the train step with telemetry, if any."""

    train: Any
    watched: Any
    evaluate: Any


def _enter_phase(run: _Run, batch: dict[str, jax.Array]) -> _Programs:
    """The programs of the phase that the next step belongs to.

    The state moves into that phase's formats now and not after its predecessor's last step, so that
    a checkpoint, an evaluation or the end of a run there holds what the predecessor has made.
    """
    left, entered = run.config.after(run.step), run.config.at(run.step)
    if left != entered:
        run.state = change_phase(run.state, left, entered, run.mesh)
    compiled = lambda step: step.lower(run.state, batch).compile()
    return _Programs(
        train=compiled(make_train_step(entered, run.mesh)),
        watched=compiled(make_train_step(entered, run.mesh, telemetry=True))
        if entered.telemetry.every
        else None,
        evaluate=make_eval_step(entered, run.mesh),
    )


def _phase_note(config: Config, step: int) -> str:
    return f"step {step}  from here on {config.at(step).precision}"


def _introduction(run: _Run) -> str:
    """What is about to be computed, in a line."""
    start = f"resuming {run.workdir} at step {run.step}" if run.step else f"starting {run.workdir}"
    devices = jax.devices()
    return (
        f"{start}: {parameter_count(run.config.model):,} parameters, {len(run.corpus.train):,} "
        f"training tokens, {len(devices)} x {devices[0].device_kind}; policy "
        f"{run.config.precision}, loss scale {run.config.loss_scale.kind}"
    )


class _Log:
    """Times the steps and writes the rows of the logged ones, one step late."""

    def __init__(self, writer: MetricsWriter, report: Reporter, run: _Run, first: int):
        self.writer, self.report, self.config = writer, report, run.config
        self.train_seconds = run.train_seconds
        self._waiting: tuple[int, dict[str, jax.Array]] | None = None
        self._since = time.perf_counter()
        self._logged_step, self._logged_seconds = first, run.train_seconds

    def pending(self, step: int, metrics: dict[str, jax.Array]) -> None:
        """Remembers a step's metrics, which the device may still be computing."""
        self._waiting = (step, metrics)

    def flush(self) -> None:
        """Waits for the remembered metrics, writes and shows them."""
        if self._waiting is None:
            return
        step, arrays = self._waiting
        self._waiting = None
        fetched = jax.device_get(arrays)
        tensors, updates = fetched.pop("telemetry", None), fetched.pop("updates", None)
        values = {name: value.item() for name, value in fetched.items()}
        self.pause()
        elapsed, steps = self.train_seconds - self._logged_seconds, step - self._logged_step
        self._logged_step, self._logged_seconds = step, self.train_seconds
        skips = values.pop("consecutive_skips")
        row = {
            "step": step,
            **values,
            "tokens_per_second": steps * self.config.batch_size * self.config.context / elapsed,
            "step_seconds": elapsed / steps,
        }
        self.writer.write(row)
        self.report.metrics(row)
        if tensors is not None:
            sites = self.config.after(step).sites
            self.writer.write_telemetry(telemetry_row(step, tensors, updates, sites))
        # A run too short for the limit has still failed when it skipped every step.
        if skips >= min(self.config.loss_scale.max_consecutive_skips, self.config.steps):
            raise TrainingFailed(
                f"the gradients of the last {skips} steps up to step {step} were not finite, at "
                f"loss scale {values['loss_scale']:g}; nothing was learned from them. Lower the "
                "learning rate, or give the parameters or the compute format more exponent bits"
            )

    def pause(self) -> None:
        """Counts the time since the last pause or resumption as training."""
        now = time.perf_counter()
        self.train_seconds, self._since = self.train_seconds + now - self._since, now

    def resume(self) -> None:
        """Does not count the time since the last pause."""
        self._since = time.perf_counter()


def _next_batch(run: _Run) -> dict[str, jax.Array]:
    return sharding.global_batch(run.mesh, next(run.data), jax.process_count())


def _evaluate(run: _Run, eval_step: Any, log: _Log, batches: int) -> None:
    _pause(run, log)
    loss = held_out_loss(
        eval_step, run.state.params, run.corpus, run.config, run.mesh, batches=batches
    )
    log.writer.write({"step": run.step, "eval_loss": loss})
    log.report.note(f"step {run.step}  held-out loss {loss:.4f}")
    log.resume()


def _pause(run: _Run, log: _Log) -> None:
    jax.block_until_ready(run.state.params)
    log.pause()


def _save(run: _Run, log: _Log) -> None:
    # Saving waits for the step anyway; waiting first gives the step's time to the run.
    _pause(run, log)
    run.train_seconds = log.train_seconds
    progress = {"train_seconds": run.train_seconds, "corpus": run.corpus.fingerprint}
    run.checkpoints.save(run.step, run.state, run.data.get_state(), progress)


def _finish(run: _Run) -> dict[str, Any]:
    """Evaluates on the whole validation split and writes `result.json`, unless that was done.

    The row of that evaluation may be there already, from a process killed before the result was.
    """
    path = run.workdir / "result.json"
    if path.exists():
        return json.loads(path.read_text(encoding="utf-8"))
    config = run.config
    eval_step = make_eval_step(config.after(config.steps), run.mesh)
    loss = held_out_loss(eval_step, run.state.params, run.corpus, config, run.mesh)
    with MetricsWriter(run.workdir, config.steps) as writer:
        row = {"step": config.steps, "eval_loss": loss}
        if json.loads(strict_json(row)) not in read_rows(run.workdir / "metrics.jsonl"):
            writer.write(row)
    result = {
        "steps": config.steps,
        "eval_loss": loss,
        "tokens": config.steps * config.batch_size * config.context,
        "train_seconds": run.train_seconds,
        "parameters_sha256": parameters_sha256(run.state.params),
    }
    text = strict_json(result, indent=2)
    replace_text(path, text + "\n")
    return json.loads(text)


def _draw(run: _Run) -> None:
    rows = read_rows(run.workdir / "metrics.jsonl")
    title = f"{run.workdir.name}   {run.config.precision}"
    if rows:
        draw_curves(rows, title, run.workdir / "curves.png")
    telemetry = read_rows(run.workdir / "telemetry.jsonl")
    if telemetry:
        draw_telemetry(telemetry, title, run.workdir)
