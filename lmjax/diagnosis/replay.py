"""Replay: steps of a recorded run, computed again from the nearest checkpoint with the same data.

Under the run's own policy the steps are those of the run bit for bit, which is checked wherever the
run left something to compare with: rows of `metrics.jsonl` and later checkpoints. The first step
whose gradients are not finite is then taken apart: which operation was the first to produce such a
number. If all are finite, the largest outlier among the tensors of these steps is named instead.

Knows runs, their steps and tapped tensors.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lmjax.console import stages
from lmjax.diagnosis.opened import OpenRun, checkpoints_after
from lmjax.diagnosis.tapped import Outlines, in_order, is_value, outline_of, step_inputs, tapped
from lmjax.parallel.sharding import Mesh
from lmjax.precision import exact, paths
from lmjax.precision.probes import Maximum
from lmjax.precision.taps import Extreme
from lmjax.runs.metrics import read_rows
from lmjax.runs.resolved import Phase, resolve
from lmjax.runs.run_directory import parameters_sha256
from lmjax.runs.state import TrainState, change_phase
from lmjax.train.programs import Programs
from lmjax.train.step import Batch


@dataclass(frozen=True)
class Element:
    """One element of a tensor of a step.

    Attributes:
      step: the step, counted from 1.
      micro_batch: which part of the batch, from 0.
      site: path; of the site of the parameter, for a parameter.
      direction: `forward`, `backward`, `before` the step or in the `update` after it.
      operation: what the site computes.
      tensor: the role, such as `y` or `dx`, or the path of a parameter or of its gradient.
      index: of the element.
      value: the element.
      outlier: its magnitude over the root mean square of the finite elements.
      operands: largest magnitude of what the operation read, by role.
    """

    step: int
    micro_batch: int
    site: str
    direction: str
    operation: str
    tensor: str
    index: tuple[int, ...]
    value: float
    outlier: float
    operands: dict[str, float]


@dataclass(frozen=True)
class Replayed:
    """A step computed again.

    Attributes:
      step: counted from 1.
      loss: nats per token.
      grad_norm: before clipping.
      loss_scale: as the step used it.
      skipped: whether its gradients were not finite, so that it changed nothing.
      recorded: the loss in `metrics.jsonl`; None if it has no such row.
      same: whether loss, gradient norm and loss scale are the recorded ones; None likewise.
    """

    step: int
    loss: float
    grad_norm: float
    loss_scale: float
    skipped: bool
    recorded: float | None
    same: bool | None

    @property
    def is_finite(self) -> bool:
        """Whether loss and gradients are."""
        return not self.skipped and math.isfinite(self.loss) and math.isfinite(self.grad_norm)


@dataclass(frozen=True)
class Replay:
    """Some steps of a run, computed again.

    Attributes:
      start: the step of the checkpoint that it started from; 0: the initial parameters.
      precision: the policy.
      own: whether that is the run's.
      steps: what came out.
      checkpoints: by step, whether the parameters are those of the checkpoint bit for bit.
      non_finite: the first element that is not finite; None if all are.
      outlier: the largest outlier, if all are finite.
    """

    start: int
    precision: str
    own: bool
    steps: tuple[Replayed, ...]
    checkpoints: dict[int, bool]
    non_finite: Element | None
    outlier: Element | None

    @property
    def identical(self) -> bool | None:
        """Whether all that could be compared is the same; None if there was nothing."""
        same = [step.same for step in self.steps if step.same is not None]
        found = [*same, *self.checkpoints.values()]
        return all(found) if found else None


def replay(run: OpenRun, first: int, last: int, *, precision: str | None = None) -> Replay:
    """Computes steps of a run again.

    Args:
      run: opened before step `first`; it is moved on to step `last`.
      first, last: the steps to look at, counted from 1.
      precision: a policy instead of the run's, to which the state is rounded at the start.

    Raises:
      ValueError: there are no such steps, or the policy does not fit the model.
    """
    if not run.step < first <= last <= run.config.steps:
        raise ValueError(
            f"steps {first} to {last} are not in the run, which has 1 to {run.config.steps}, or "
            f"not after step {run.step}, where it was opened"
        )
    start, own = run.step, precision is None
    phases = run.phases
    if precision is not None:
        phases = resolve(dataclasses.replace(run.config, precision=precision))
    rows = {row["step"]: row for row in _metrics(run) if "loss" in row}
    kept = checkpoints_after(run, last) if own else {}
    programs, steps, checkpoints = Programs(), [], {}
    inspected, held = _Inspection(run), run.phases.after(start)
    while run.step < last:
        phase = phases.at(run.step)
        if phase != held:
            run.state, held = change_phase(run.state, held, phase, run.mesh), phase
        batch, number = run.next_batch(), run.step + 1
        if number >= first and inspected.found is None:
            inspected.look(phase, batch)
        with stages.stage(f"replaying step {number}"):
            both = programs.phase(phase, run.mesh, run.state, batch)
            program = both.watched if run.config.is_watched(number) else both.train
            run.state, metrics = program(run.state, batch)
        run.step = number
        if number in kept:
            checkpoints[number] = parameters_sha256(run.state.params) == kept[number]
        if number >= first:
            steps.append(_replayed(number, jax.device_get(metrics), rows.get(number)))
            inspected.judge(steps[-1], phase)
    text = phases.config.precision
    found, outlier = inspected.found, inspected.outlier
    return Replay(start, text, own, tuple(steps), checkpoints, found, None if found else outlier)


def _metrics(run: OpenRun) -> list[dict[str, Any]]:
    path = run.workdir / "metrics.jsonl"
    return read_rows(path) if path.exists() else []


def _replayed(step: int, metrics: Mapping[str, Any], row: Mapping[str, Any] | None) -> Replayed:
    numbers = {name: float(metrics[name]) for name in ("loss", "grad_norm", "loss_scale")}
    # Compared as f32, in which they were computed; NaN is the same as NaN.
    same = row and all(
        np.array_equal(np.float32(number), np.float32(row[name]), equal_nan=True)
        for name, number in numbers.items()
    )
    recorded = None if row is None else float(row["loss"])
    return Replayed(
        step=step,
        **numbers,
        skipped=int(metrics["consecutive_skips"]) > 0,
        recorded=recorded,
        same=None if row is None else bool(same),
    )


class _Inspection:
    """Looks at the tensors of steps until one is not finite."""

    def __init__(self, run: OpenRun):
        self._run = run
        self._programs: dict[Phase, tuple[Outlines, Any]] = {}
        self.found: Element | None = None
        self.outlier: Element | None = None

    def look(self, phase: Phase, batch: Batch) -> None:
        """Looks at the tensors of the next step, before the state is given to it."""
        elements = list(_of_parameters(self._run, phase, "before"))
        count = phase.config.micro_batches
        for part in range(count if not elements else 0):
            rows = {name: whole[part::count] for name, whole in batch.items()}
            elements += self._of_micro_batch(phase, rows, part)
        worst = max(elements, key=lambda e: e.outlier if math.isfinite(e.value) else -1)
        if self.outlier is None or worst.outlier > self.outlier.outlier:
            self.outlier = worst
        self._first = next((e for e in elements if not math.isfinite(e.value)), None)

    def judge(self, step: Replayed, phase: Phase) -> None:
        """Keeps what was found if the step came out as not finite."""
        if self.found is not None:
            return
        self.found = self._first
        if self.found is None:
            after = _of_parameters(self._run, phase, "update", step.step)
            self.found = next(after, None)

    def _of_micro_batch(self, phase: Phase, rows: Batch, part: int) -> Iterator[Element]:
        run = self._run
        params, key, scale, factors = step_inputs(run, phase.layout, part)
        if phase not in self._programs:
            outlines = outline_of(phase, run.mesh, params, rows, key, scale)
            self._programs[phase] = outlines, _program(phase, run.mesh, outlines)
        outlines, program = self._programs[phase]
        with stages.stage(f"looking at the tensors of step {run.step + 1}"):
            found, gradients = jax.device_get(program(params, key, scale, factors, rows))
        stack = phase.layout.stack
        for path, index in in_order(list(outlines), phase.layout):
            extreme = jax.tree.map(lambda leaf, i=index: leaf[i], found[path])
            member = stack.member(index[0], path) if index else path
            site, _, role = member.rpartition("/")
            yield Element(
                step=run.step + 1,
                micro_batch=part,
                site=site,
                direction="forward" if is_value(path) else "backward",
                operation=phase.sites[site].site.kind.value,
                tensor=role,
                operands=_operands(phase, found, path, index),
                **_where(extreme, outlines[path].shape[len(index) :]),
            )
        for path, extreme in gradients.items():
            shape = paths.flatten(params)[path].shape
            what = f"gradient of {path}"
            yield _of_parameter(run.step + 1, part, phase, path, what, "backward", extreme, shape)


def _where(extreme: Extreme, shape: tuple[int, ...]) -> dict[str, Any]:
    """Index, value and size of an element."""
    flat = int(extreme.position[0]) * 2**20 + int(extreme.position[1])
    value, root = float(extreme.value), math.sqrt(float(extreme.square))
    return {
        "index": tuple(int(i) for i in np.unravel_index(flat, shape)),
        "value": value,
        "outlier": abs(value) / root if root else 0.0,
    }


def _operands(
    phase: Phase, found: Mapping[str, Any], path: str, index: tuple[int, ...]
) -> dict[str, float]:
    """Largest magnitudes of what made a tensor: inputs, and backwards the cotangent."""
    place, _, role = path.rpartition("/")
    reads = phase.layout.place(place).site.operands
    if is_value(path):
        reads = tuple(name for name in reads if name != "g")
    elif role != "dy":
        reads = (*reads, "dy")
    values = {name: found.get(f"{place}/{name}") for name in reads}
    largest = lambda slot: slot.maximum if isinstance(slot, Maximum) else abs(slot.value)
    return {name: float(largest(s)[index]) for name, s in values.items() if s is not None}


def _program(phase: Phase, mesh: Mesh, outlines: Outlines) -> Any:
    """The compiled `(params, key, scale, factors, rows) -> extremes of tensors and gradients`."""
    stack = phase.layout.stack
    slots: dict[str, Any] = {path: Extreme.empty() for path in outlines}
    for place in phase.layout.places:
        slots |= {f"{place.path}/{role}": Maximum.empty() for role in place.site.operands}
    repeated = lambda leaf: jnp.stack([leaf] * stack.size)
    slots = {p: jax.tree.map(repeated, s) if stack.holds(p) else s for p, s in slots.items()}

    def program(params: Any, key: Any, scale: Any, factors: Any, rows: Batch) -> Any:
        gradients, found, _ = tapped(phase, mesh, slots, params, rows, key, scale, factors)
        flat = paths.flatten(gradients)
        return found, {path: Extreme.empty().of(_Held(leaf)) for path, leaf in flat.items()}

    return exact.jit(program)


class _Held(NamedTuple):
    values: jax.Array


def _of_parameters(
    run: OpenRun, phase: Phase, direction: str, step: int | None = None
) -> Iterator[Element]:
    """Elements of the state that are not finite: parameters, moments, residuals."""
    state: TrainState = run.state
    parts = {"": state.params, "optimizer ": state.opt_state, "residual ": state.residuals}
    for name, tree in parts.items():
        for path, leaf in paths.flatten(tree).items():
            values = np.asarray(jnp.asarray(leaf, jnp.float32)) if _floating(leaf) else np.zeros(0)
            if np.isfinite(values).all():
                continue
            extreme = jax.device_get(Extreme.empty().of(_Held(jnp.asarray(values))))
            owner = path if not name else ""
            number = run.step + 1 if step is None else step
            yield _of_parameter(
                number, 0, phase, owner, name + path, direction, extreme, values.shape
            )


def _floating(leaf: Any) -> bool:
    return jnp.issubdtype(leaf.dtype, jnp.floating)


def _of_parameter(
    step: int,
    part: int,
    phase: Phase,
    path: str,
    tensor: str,
    direction: str,
    extreme: Extreme,
    shape: tuple[int, ...],
) -> Element:
    site = phase.layout.place_of_parameter(path) if path else None
    return Element(
        step=step,
        micro_batch=part,
        site="" if site is None else str(site),
        direction=direction,
        operation="" if site is None else site.site.kind.value,
        tensor=tensor,
        operands={},
        **_where(extreme, shape),
    )
