"""Attribution: which sites and tensors cost how much of the loss between two policies.

The difference is bisected over the modules of the model: a group of sites is switched from the
reference to the policy, all others staying, and the loss on the same batches is compared. Groups
that change it most are halved first, down to single sites, and those are taken apart by tensor.
What two halves cost together beyond the sum of both is their interaction. At the end the sites that
were found are switched back in the whole policy: what remains of the difference was not found.

Losses of the same batch under two policies differ by rounding alone, so any difference is an
effect; intervals say how it varies between batches.

Knows runs, phases and evaluation.
"""

from __future__ import annotations

import dataclasses
import heapq
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from scipy import stats

from lmjax.diagnosis.opened import OpenRun
from lmjax.diagnosis.tapped import phase_under
from lmjax.model import Sites, resolve_sites
from lmjax.precision import exact
from lmjax.precision.grammar import parse_policy
from lmjax.precision.policy import SitePolicy
from lmjax.runs.resolved import Phase
from lmjax.runs.state import change_phase
from lmjax.train.step import evaluated, evaluation, make_train_step, scaling_within

RESOLUTION = 2.0**-20
"""Changes of the loss below this share of it are no finding: f32 has 2^-23."""

FORWARD = ("c", "o", "w", "x", "a", "m")
BACKWARD = ("g", "wb", "xb")
"""Keys of a policy that name tensors, and those that act on cotangents, so only in training."""


@dataclass(frozen=True)
class Cost:
    """By how much the loss changes if something is switched from the reference to the policy.

    Attributes:
      where: sites, or a site and the key of one of its tensors, such as `blocks/0/mlp/up: w=e5m2`.
      difference: mean change of the loss over batches, in nats per token.
      low, high: 95% confidence interval of the mean (Student's t); infinite with one batch.
      change: root mean square over batches, which is not 0 where changes of both signs cancel.
    """

    where: str
    difference: float
    low: float
    high: float
    change: float


@dataclass(frozen=True)
class Attribution:
    """Where a difference in loss comes from.

    Attributes:
      precision, reference: the policies.
      step: steps done before.
      batches: how many were compared.
      steps: training steps under each policy before the comparison.
      loss, reference_loss: nats per token under each.
      total: the whole difference.
      sites: of single sites, the largest change first.
      tensors: of single tensors of these sites, where several differ.
      classes: of each kind of tensor, at all sites.
      interactions: of two groups, what both cost beyond the sum of each alone.
      remaining: what remains when the sites found are switched back; None if none was found.
      evaluations: how many policies were tried.
    """

    precision: str
    reference: str
    step: int
    batches: int
    steps: int
    loss: float
    reference_loss: float
    total: Cost
    sites: tuple[Cost, ...]
    tensors: tuple[Cost, ...]
    classes: tuple[Cost, ...]
    interactions: tuple[Cost, ...]
    remaining: Cost | None
    evaluations: int


def attribute(
    run: OpenRun,
    *,
    precision: str | None = None,
    reference: str = "f32",
    batches: int = 8,
    steps: int = 0,
    evaluations: int = 48,
) -> Attribution:
    """Attributes the difference in loss between two policies to sites and tensors.

    Parameters and moments stay stored as the run stores them.

    Args:
      run: a run at a checkpoint.
      precision: the policy, if not that of the run's next step.
      reference: the policy to compare with.
      batches: of the run's next text to compare the loss on.
      steps: train so many steps under each policy first, on the text before those batches; without
        any, cotangents have no effect.
      evaluations: how many mixtures of the two policies to try in the search for sites.

    Raises:
      ValueError: a policy does not fit the model.
    """
    ours = run.phase if precision is None else phase_under(run.phase, precision)
    theirs = phase_under(run.phase, reference)
    trial = _Trial(run, batches, steps)
    baseline, whole = trial.losses(theirs.sites), trial.losses(ours.sites)
    total = _cost("all sites", whole - baseline)
    floor = RESOLUTION * float(np.mean(np.abs(baseline)))
    differing = [path for path in ours.sites if _differ(ours.sites[path], theirs.sites[path])]
    search = _Search(trial, ours.sites, theirs.sites, baseline, floor)
    sites: list[Cost] = []
    if total.change > floor or len(differing) > 1:
        sites = search.sites(differing, whole - baseline, evaluations)
    found = [cost.where for cost in sites]
    remaining = None
    if found:
        mixed = {p: theirs.sites[p] if p in found else s for p, s in ours.sites.items()}
        remaining = _cost("what remains", trial.losses(mixed) - baseline)
    keys = FORWARD + (BACKWARD if steps else ())
    tensors = [cost for path in found[:4] for cost in search.tensors([path], keys, theirs)]
    classes = search.tensors(differing, keys, theirs) if len(differing) > 1 else []
    return Attribution(
        precision=ours.config.precision,
        reference=theirs.config.precision,
        step=run.step,
        batches=batches,
        steps=steps,
        loss=float(np.mean(whole)),
        reference_loss=float(np.mean(baseline)),
        total=total,
        sites=tuple(sites),
        tensors=tuple(tensors),
        classes=tuple(classes) if found else (),
        interactions=tuple(search.interactions),
        remaining=remaining,
        evaluations=trial.count,
    )


class _Trial:
    """The loss of a run's parameters on some batches under mixtures of policies."""

    def __init__(self, run: OpenRun, batches: int, steps: int):
        self._run, self.count = run, 0
        self._training = [run.next_batch() for _ in range(steps)]
        held = [run.next_batch() for _ in range(batches)]
        ones = lambda batch: jnp.ones(batch["inputs"].shape, jnp.float32)
        self._batches = [batch | {"weights": ones(batch)} for batch in held]
        self._state = run.state
        if run.phases.after(run.step) != run.phase:
            self._state = change_phase(run.state, run.phases.after(run.step), run.phase, run.mesh)

    def losses(self, sites: Sites) -> np.ndarray:
        """f64[batches]: nats per token."""
        self.count += 1
        phase = dataclasses.replace(self._run.phase, sites=sites)
        state = self._trained(phase)
        scaling = scaling_within(state.scaling, self._run.phase, phase)
        params = evaluated(state.params, scaling, phase)
        program = exact.jit(evaluation(phase, self._run.mesh))
        found = jax.device_get([program(params, batch) for batch in self._batches])
        return np.array([float(nats) / float(tokens) for nats, tokens in found])

    def _trained(self, phase: Phase) -> Any:
        if not self._training:
            return self._state
        step = make_train_step(phase, self._run.mesh)
        state = jax.tree.map(jnp.copy, self._state)
        for batch in self._training:
            state, _ = step(state, batch)
        return state


class _Search:
    """Looks for the sites that change the loss."""

    def __init__(
        self, trial: _Trial, ours: Sites, theirs: Sites, baseline: np.ndarray, floor: float
    ):
        self._trial, self._ours, self._theirs = trial, ours, theirs
        self._baseline, self._floor = baseline, floor
        self.interactions: list[Cost] = []

    def _changes(self, changed: Mapping[str, SitePolicy]) -> np.ndarray:
        """By how much the loss of each batch changes if some sites are switched."""
        return self._trial.losses({**self._theirs, **changed}) - self._baseline

    def sites(self, paths: Sequence[str], whole: np.ndarray, budget: int) -> list[Cost]:
        """Costs of single sites, the largest first."""
        number = itertools.count()
        entry = lambda group, changes: (-_size(changes), next(number), group, changes)
        waiting = [entry(tuple(paths), whole)]
        found: list[Cost] = []
        while waiting and self._trial.count < budget:
            _, _, group, changes = heapq.heappop(waiting)
            if len(group) == 1:
                found.append(_cost(group[0], changes))
                continue
            halves = [(half, self._alone(half)) for half in _halves(group)]
            together = changes - sum(alone for _, alone in halves)
            names = " and ".join(_name(half) for half, _ in halves)
            self._note(_cost(names, together), _size(whole))
            for half, alone in halves:
                if _size(alone) > self._floor:
                    heapq.heappush(waiting, entry(half, alone))
        found += [_cost(g[0], changes) for _, _, g, changes in waiting if len(g) == 1]
        return sorted(found, key=lambda cost: -cost.change)

    def _alone(self, group: Sequence[str]) -> np.ndarray:
        return self._changes({path: self._ours[path] for path in group})

    def _note(self, cost: Cost, whole: float) -> None:
        """Keeps an interaction that is not within its interval, and not negligible."""
        certain = not cost.low <= 0 <= cost.high
        if certain and cost.change > max(self._floor, 0.02 * whole):
            self.interactions.append(cost)

    def tensors(self, paths: Sequence[str], keys: Sequence[str], reference: Phase) -> list[Cost]:
        """Costs of each kind of tensor alone, at some sites together; none if only one differs."""
        found: list[Cost] = []
        values = {
            key: {p: self._value(p, key) for p in paths if self._value(p, key)} for key in keys
        }
        differing = {key: by_path for key, by_path in values.items() if by_path}
        if len(differing) < 2:
            return []
        for key, by_path in differing.items():
            rules = "".join(f"; {path}: {key}={value}" for path, value in by_path.items())
            text = reference.config.precision + rules
            mixed = resolve_sites(reference.config.model, parse_policy(text))
            changes = self._changes({path: mixed[path] for path in by_path})
            kinds = sorted(set(by_path.values()))
            name = (
                f"{paths[0]}: {key}={kinds[0]}" if len(paths) == 1 else f"{key}={'|'.join(kinds)}"
            )
            found.append(_cost(name, changes))
        return sorted(found, key=lambda cost: -cost.change)

    def _value(self, path: str, key: str) -> str:
        """The policy's value of a key at a site, if it has that key and the reference another."""
        ours, theirs = (sites[path].rows()[key] for sites in (self._ours, self._theirs))
        product = self._ours[path].site.is_product
        return ours if ours != theirs and (product or key in ("c", "o")) else ""


def _differ(ours: SitePolicy, theirs: SitePolicy) -> bool:
    """Whether two policies compute differently at a site, however its parameters are stored."""
    stored = dataclasses.replace(theirs, stored=ours.stored, mu=ours.mu, nu=ours.nu)
    return ours != stored


def _halves(group: Sequence[str]) -> Iterator[tuple[str, ...]]:
    """Cuts sites in two where their paths part: at a block, a module, a site."""
    depth = next(d for d in itertools.count() if len({_head(path, d) for path in group}) > 1)
    heads = list(dict.fromkeys(_head(path, depth) for path in group))
    first = set(heads[: len(heads) // 2])
    yield tuple(path for path in group if _head(path, depth) in first)
    yield tuple(path for path in group if _head(path, depth) not in first)


def _head(path: str, depth: int) -> tuple[str, ...]:
    return tuple(path.split("/")[: depth + 1])


def _name(group: Sequence[str]) -> str:
    return group[0] if len(group) == 1 else f"{group[0]} ... {group[-1]}"


def _size(changes: np.ndarray) -> float:
    size = float(np.sqrt(np.mean(np.square(changes))))
    return size if math.isfinite(size) else math.inf


def _cost(where: str, changes: np.ndarray) -> Cost:
    count, mean = len(changes), float(np.mean(changes))
    half = math.inf
    if count > 1:
        half = float(stats.t.ppf(0.975, count - 1) * np.std(changes, ddof=1) / math.sqrt(count))
    return Cost(where, mean, mean - half, mean + half, _size(changes))
