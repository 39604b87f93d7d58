"""Several seeds of one config, trained in one program.

The step is that of step.py under `jax.vmap`: states and batches have an axis for the seeds in
front. Each seed starts from the parameters and reads the batches that it would alone, and computes
the same but for rounding, for XLA may sum in another order. Its run directory is that of a run by
itself, checkpoints included; `environment.json` names the seeds that were trained with it. Times
are those of all seeds, divided by their number, so that they add up to what was spent.

A seed that fails does not disturb the others: every choice in a step, such as skipping it, is one
`where` for each seed. What is computed for it from then on is dropped.

Seeds go on from where they are, those whose newest checkpoints are of the same step together: a
process that is killed while they are being written leaves two such groups at most.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from lmjax.precision import exact
from lmjax.train.checkpoint import Checkpoints
from lmjax.train.config import Config
from lmjax.train.errors import CannotVmap, NonFiniteGradients, TrainingFailed
from lmjax.train.evaluate import held_out_losses
from lmjax.train.log import Clock, StepLog
from lmjax.train.loop import Outcome
from lmjax.train.memory import free_bytes
from lmjax.train.metrics import MetricsWriter
from lmjax.train.progress import Reporter, say
from lmjax.train.records import (
    draw,
    failing_storage_explained,
    record_result,
    record_start,
    save,
)
from lmjax.train.run_directory import hold_run
from lmjax.train.signals import StopRequest
from lmjax.train.start import Run, checked_input, start_run
from lmjax.train.state import TrainState, abstract_state
from lmjax.train.step import Batch, evaluation, train_step

Outcomes = dict[int, Outcome | TrainingFailed]


def train_seeds(config: Config, workdirs: Mapping[int, Path], *, stop: StopRequest) -> Outcomes:
    """Trains, or goes on training, some seeds of a config at once, as `train` would one by one.

    Args:
      config: what to compute; its seed does not count.
      workdirs: the run directory of each seed.
      stop: a request that the caller watches for; all seeds meet it after the same step.

    Returns:
      How each seed ended, or why it cannot go on.

    Raises:
      CannotVmap: they have to be trained one after another. Nothing was written yet, or what was
        written is what `train` goes on from.
      InputError, CheckpointError, StorageFailed, ExcessPrecisionError: see `train`.
    """
    if why := reason_against(config):
        raise CannotVmap(why)
    config, corpus, mesh = checked_input(config, False)
    if mesh.size > 1:
        raise CannotVmap(f"each is divided among {mesh.size} devices")
    exact.check_canary(jax.default_backend())
    note = partial(say, enabled=False)
    outcomes: Outcomes = {}
    with _exhausted_memory_explained(), ExitStack() as stack:
        groups: dict[int, list[Run]] = {}
        for seed, workdir in workdirs.items():
            own = dataclasses.replace(config, seed=seed)
            stack.enter_context(failing_storage_explained(workdir))
            stack.enter_context(hold_run(workdir, own, note))
            folder, keep = workdir / "checkpoints", config.checkpoint.keep
            checkpoints = stack.enter_context(Checkpoints(folder, keep, note))
            run = start_run(own, corpus, mesh, workdir, checkpoints, note)
            groups.setdefault(run.step, []).append(run)
        for runs in groups.values():
            outcomes |= _train_group(runs, stop)
    return outcomes


def reason_against(config: Config) -> str | None:
    """Why seeds of a config cannot be trained in one program, as far as the config decides it."""
    if len(config.phases) > 1:
        return "the policy changes with the step"
    if config.telemetry.every:
        return "telemetry watches one run"
    if config.faults.non_finite == "rewind":
        return "each may rewind to a step of its own"
    if config.deterministic_reductions:
        return "deterministic_reductions fixes the order of sums of one run"
    return None


def make_vmapped_step(config: Config, mesh: Mesh) -> jax.stages.Wrapped:
    """The compiled train step of several seeds on a mesh of one device.

    Returns:
      `step(state, batch) -> state, metrics` as that of `make_train_step`, with an axis for the
      seeds in front of every array. It donates the state it is given.
    """
    step = jax.vmap(train_step(config, mesh))
    return exact.jit(step, donate_argnums=0, out_shardings=(_whole(mesh), None))


def stacked(states: Sequence[TrainState], mesh: Mesh) -> TrainState:
    """One state of many, which are given up: there need not be memory for two of each."""
    stack = lambda *leaves: jnp.stack(leaves)
    together = lambda states: jax.tree.map(stack, *states)
    state = exact.jit(together, out_shardings=_whole(mesh))(states)
    jax.tree.map(lambda leaf: leaf.delete(), states)
    return state


def _whole(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())


@contextmanager
def _exhausted_memory_explained() -> Iterator[None]:
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise CannotVmap("the memory of the device is too small for all of them") from error


class _Group:
    """Runs that differ in the seed alone and step as one.

    Attributes:
      runs: each with its own directory, data and clock; their states are in `state`.
      config: that of the first.
      step: the last step done.
      state: their states: every array has an axis for the runs in front.
      failures: why runs cannot go on, by their place.
    """

    def __init__(self, runs: Sequence[Run]):
        self.runs, self.config, self.step = runs, runs[0].config, runs[0].step
        self._mesh = runs[0].mesh
        self.state = stacked([run.state for run in runs], self._mesh)
        self.failures: dict[int, TrainingFailed] = {}
        self._evaluate = exact.jit(jax.vmap(evaluation(self.config, self._mesh), (0, None)))
        of_one = jax.tree.map(lambda leaf: leaf.sharding, abstract_state(self.config, self._mesh))
        self._take = exact.jit(
            lambda state, place: jax.tree.map(lambda leaf: leaf[place], state),
            out_shardings=of_one,
        )

    def compiled_step(self, batch: Batch) -> Any:
        """The train step of all runs.

        Raises:
          CannotVmap: it needs more memory than is left.
        """
        step = make_vmapped_step(self.config, self._mesh)
        program = step.lower(self.state, batch).compile()
        free, plan = free_bytes(self._mesh.devices.flat[0]), program.memory_analysis()
        if free is not None and plan is not None and plan.temp_size_in_bytes > free:
            needed = f"{plan.temp_size_in_bytes:,}"
            raise CannotVmap(f"a step of all needs {needed} bytes, and {free:,} are left")
        return program

    def next_batch(self) -> Batch:
        """`int32[S, batch_size, context]` each: the next batch of every run."""
        return jax.tree.map(lambda *rows: np.stack(rows), *(next(run.data) for run in self.runs))

    def healthy(self) -> dict[int, Run]:
        """The runs that have not failed, by their place."""
        return {i: run for i, run in enumerate(self.runs) if i not in self.failures}

    def alone(self, place: int) -> Run:
        """A run with a state of its own."""
        return dataclasses.replace(self.runs[place], state=self._take(self.state, place))

    def losses(self, batches: int = 0) -> np.ndarray:
        """float64[S]: held-out losses; see `held_out_loss`."""
        run, params = self.runs[0], self.state.params
        return held_out_losses(
            self._evaluate, params, run.corpus, self.config, self._mesh, batches=batches
        )

    def pause(self) -> None:
        """Waits for the last step; the time until the clocks are resumed does not count."""
        jax.block_until_ready(self.state.params)
        for run in self.runs:
            run.clock.pause()

    def resume(self) -> None:
        """Counts the time from here on as training."""
        for run in self.runs:
            run.clock.resume()


class _Logs:
    """The logs of a group, which gets its metrics for all runs at once."""

    def __init__(self, group: _Group, stack: ExitStack):
        self._group = group
        self.of = [
            StepLog(
                stack.enter_context(MetricsWriter(run.workdir, group.step)),
                Reporter(group.step, group.config.steps, enabled=False),
                run.config,
                run.clock,
                group.step,
            )
            for run in group.runs
        ]
        self._waiting: tuple[int, dict[str, jax.Array]] | None = None

    def pending(self, step: int, metrics: dict[str, jax.Array]) -> None:
        """Remembers a step's metrics, f32[S] each; see `StepLog`."""
        self._waiting = (step, metrics)

    def flush(self) -> None:
        """Waits for the remembered metrics and writes them; notes the runs that have failed."""
        if self._waiting is None:
            return
        step, metrics = self._waiting
        self._waiting = None
        fetched = jax.device_get(metrics)
        for place in self._group.healthy():
            self.of[place].pending(step, {name: values[place] for name, values in fetched.items()})
            try:
                self.of[place].flush()
            except NonFiniteGradients as failure:
                self._group.failures[place] = failure


def _train_group(runs: Sequence[Run], stop: StopRequest) -> Outcomes:
    """Trains runs whose last step is the same, until they are done or asked to stop."""
    seeds = [run.config.seed for run in runs]
    for run in runs:
        record_start(run, seeds)
        run.clock = Clock(run.clock.seconds, len(runs))
    group = _Group(runs)
    if group.step < group.config.steps:
        _loop(group, stop)
    done = group.step == group.config.steps
    losses = group.losses() if done and group.healthy() else None
    outcomes: Outcomes = {seeds[place]: failure for place, failure in group.failures.items()}
    for place, run in group.healthy().items():
        result = None if losses is None else record_result(group.alone(place), float(losses[place]))
        draw(run)
        outcomes[seeds[place]] = Outcome(run.workdir, group.step, result)
    return outcomes


def _loop(group: _Group, stop: StopRequest) -> None:
    """Steps until the runs are done, or one more step after a request to stop."""
    config, batch = group.config, group.next_batch()
    program = group.compiled_step(batch)
    with ExitStack() as stack:
        logs = _Logs(group, stack)
        group.resume()
        while True:
            group.state, metrics = program(group.state, batch)
            group.step += 1
            logs.flush()
            if config.is_logged(group.step):
                logs.pending(group.step, metrics)
            if config.is_evaluated(group.step):
                logs.flush()
                _evaluate(group, logs)
            stopping = stop.received is not None or group.step == config.steps
            if stopping or config.is_saved(group.step):
                logs.flush()
                for place in group.healthy():
                    save(group.alone(place), logs.of[place])
            if stopping or not group.healthy():
                break
            batch = group.next_batch()
        for run in group.runs:
            run.checkpoints.wait()


def _evaluate(group: _Group, logs: _Logs) -> None:
    group.pause()
    losses = group.losses(group.config.evaluation.batches)
    for place in group.healthy():
        logs.of[place].evaluated(group.step, float(losses[place]))
    group.resume()
