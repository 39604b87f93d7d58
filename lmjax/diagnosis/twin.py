"""The twin: the same parameters and the same batch under two policies, compared tensor by tensor.

One program takes the loss and its gradient three times:

    1  under the reference, whose tensors are kept
    2  under the policy: how far each tensor is from that of the reference
    3  under the policy, but each site is handed the reference's tensors, forwards and backwards:
       how far off it is by itself

The second shows what rounding did to a tensor on its whole way, the third where that happened. What
a tensor is, is declared in `lmjax/precision/sites.py`; they leave the program through taps
(`lmjax/precision/taps.py`), so a program without a twin has nothing of it. Where squares of a
tensor turn out to overflow or underflow, the program runs again and scales by what it found.

Knows sites, losses and states; no files.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lmjax.diagnosis.opened import OpenRun
from lmjax.diagnosis.tapped import (
    Outlines,
    in_order,
    outline_of,
    phase_under,
    step_inputs,
    tapped,
)
from lmjax.parallel.sharding import Mesh
from lmjax.precision import exact
from lmjax.precision.sites import Layout
from lmjax.precision.squares import scale_for_squares
from lmjax.precision.taps import Compare, Copy, Swap
from lmjax.runs.resolved import Phase
from lmjax.train.step import Batch

BOUND = 2.0**-5
"""A relative error that bf16 stays below for many layers, and that a single rounding to e5m2 or a
product of e4m3 exceeds."""


@dataclass(frozen=True)
class Difference:
    """How far one tensor is from its twin under the reference.

    Attributes:
      site: path, such as `blocks/3/mlp/up`.
      role: which of its tensors, such as `y`; see `Site.taps`.
      relative_error: norm of the difference over the norm of the reference.
      own_error: the same if the site is handed the reference's tensors: what it did by itself. NaN
        for `dy`, which a site does not compute.
      cosine: of the angle between both; NaN if a norm is not finite.
      largest_error: largest magnitude of the difference over that of the reference.
      non_finite: number of elements that are not finite, but are under the reference.
    """

    site: str
    role: str
    relative_error: float
    own_error: float
    cosine: float
    largest_error: float
    non_finite: int

    @property
    def path(self) -> str:
        """Site and role."""
        return f"{self.site}/{self.role}"

    @property
    def bits(self) -> float:
        """Signal over noise in bits, `-log2` of the relative error: infinite for equal tensors."""
        return -math.log2(self.relative_error) if self.relative_error else math.inf


@dataclass(frozen=True)
class Twin:
    """A batch under two policies.

    Attributes:
      precision: the policy.
      reference: the policy that it is compared with.
      step: steps done before.
      bound: the relative error that counts as too large.
      loss: nats per token under the policy.
      reference_loss: the same under the reference.
      differences: of every tensor, in the order of computation: values forwards, then gradients
        from the last site to the first.
    """

    precision: str
    reference: str
    step: int
    bound: float
    loss: float
    reference_loss: float
    differences: tuple[Difference, ...]

    @property
    def first(self) -> Difference | None:
        """The first tensor whose relative error exceeds the bound."""
        return next((d for d in self.differences if not d.relative_error <= self.bound), None)

    @property
    def origins(self) -> tuple[Difference, ...]:
        """The tensors that exceed the bound by what their own site does."""
        return tuple(d for d in self.differences if d.own_error > self.bound)

    @property
    def sites(self) -> tuple[str, ...]:
        """The sites of `origins`."""
        return tuple(dict.fromkeys(d.site for d in self.origins))


def twin(
    run: OpenRun,
    batch: Batch | None = None,
    *,
    precision: str | None = None,
    reference: str = "f32",
    bound: float = BOUND,
    rows: int = 0,
) -> Twin:
    """Compares a run's next step with its twin, on the first micro-batch of a batch.

    Args:
      run: a run at a checkpoint; its parameters, loss scale and random key are those of both.
      batch: as `OpenRun.next_batch` gives it; by default the next one.
      precision: the policy, if not that of the run's next step.
      reference: the policy to compare with.
      bound: the relative error that counts as too large.
      rows: of the micro-batch, for which there is memory; 0: all.

    Raises:
      ValueError: a policy does not fit the model.
    """
    phase = run.phase if precision is None else phase_under(run.phase, precision)
    other = phase_under(run.phase, reference)
    batch = run.next_batch() if batch is None else batch
    part = {
        name: whole[:: run.config.micro_batches][: rows or None] for name, whole in batch.items()
    }
    params, key, scale, factors = step_inputs(run, phase.layout)
    with _wide_enough(phase, other):
        outlines = outline_of(other, run.mesh, params, part, key, scale)
        program = twin_program(phase, other, run.mesh, outlines)
        own = [factors if p == run.phase else {} for p in (phase, other)]
        sizes = ordinary(outlines, phase.layout)
        losses, found = jax.device_get(program(params, key, scale, own, part, sizes))
        largest = {path: numbers["largest"] for path, numbers in found.items()}
        if not _squares_fit(largest):
            losses, found = jax.device_get(program(params, key, scale, own, part, largest))
    differences = _differences({path: found[path] for path in outlines}, phase.layout)
    loss, reference_loss = map(float, losses)
    return Twin(
        phase.config.precision,
        other.config.precision,
        run.step,
        bound,
        loss,
        reference_loss,
        differences,
    )


def _wide_enough(*phases: Phase) -> AbstractContextManager[Any]:
    """64-bit JAX for the length of a block, where a policy computes in f64."""
    formats = {site.compute.name for phase in phases for site in phase.sites.values()}
    return jax.enable_x64(True) if "f64" in formats else contextlib.nullcontext()


def ordinary(outlines: Outlines, places: Layout) -> dict[str, np.ndarray]:
    """Largest magnitudes, by path, of tensors whose squares neither overflow nor underflow."""
    members = {path: o.shape[: places.stack.holds(path)] for path, o in outlines.items()}
    return {path: np.ones(members[path], o.dtype) for path, o in outlines.items()}


def _squares_fit(largest: Mapping[str, np.ndarray]) -> bool:
    """Whether sums of squares of all these tensors are right without a scale."""
    sizes = np.concatenate([one.ravel() for one in largest.values()])
    sizes = sizes[np.isfinite(sizes) & (sizes != 0)]
    return bool(np.all(exact.jit(scale_for_squares)(sizes) == 1))


def twin_program(phase: Phase, reference: Phase, mesh: Mesh, outlines: Outlines) -> Any:
    """The compiled `(params, key, scale, factors, batch, sizes) -> losses, statistics by path`.

    Factors are two trees: for the policy, and for the reference. Sizes are about the largest
    magnitudes of the reference's tensors, by path: what to scale by before squaring.
    """

    def program(params: Any, key: Any, scale: Any, factors: Any, batch: Batch, sizes: Any) -> Any:
        """Three passes: the reference, the policy, and the policy on the reference's tensors."""
        inputs = batch, key, scale

        def taken(under: Phase, slots: dict[str, Any], factors: Any) -> tuple[dict[str, Any], Any]:
            _, slots, loss = tapped(under, mesh, slots, params, *inputs, factors)
            return slots, loss

        copies = {path: Copy(jnp.zeros(o.shape, o.dtype)) for path, o in outlines.items()}
        kept, theirs = taken(reference, copies, factors[1])

        def slots(kind: type[Compare]) -> dict[str, Any]:
            return {path: kind.to(copy.values, sizes[path]) for path, copy in kept.items()}

        found, ours = taken(phase, slots(Compare), factors[0])
        alone, _ = taken(phase, slots(Swap), factors[0])
        # A cotangent that arrives is not what the site computes.
        own = {p: {"own": s.deviation.error} for p, s in alone.items() if not p.endswith("/dy")}
        numbers = {p: found[p].deviation._asdict() | own.get(p, {}) for p in outlines}
        return (ours, theirs), numbers

    return exact.jit(program)


def _differences(found: Mapping[str, Any], places: Layout) -> tuple[Difference, ...]:
    """Rows of every tensor in the order of computation, of a stack member by member."""
    rows = []
    for path, index in in_order(list(found), places):
        numbers = {name: float(one[index]) for name, one in found[path].items()}
        member = places.stack.member(index[0], path) if index else path
        rows.append(_difference(member, numbers))
    return tuple(rows)


def _difference(path: str, found: Mapping[str, float]) -> Difference:
    """From what `Deviation` has, and the error of the site by itself."""
    site, _, role = path.rpartition("/")
    error, expected = found["error"], found["expected"]
    x, r = math.sqrt(found["actual"]), math.sqrt(expected)
    # By the law of cosines, which keeps the digits of angles that are small.
    cosine = 1 - (error - (x - r) ** 2) / (2 * x * r) if x * r else float(x == r)
    return Difference(
        site=site,
        role=role,
        relative_error=_ratio(error, expected),
        own_error=_ratio(found["own"], expected) if "own" in found else math.nan,
        cosine=max(-1.0, min(1.0, cosine)) if math.isfinite(cosine) else math.nan,
        # A maximum may leave out a NaN, a sum does not.
        largest_error=_ratio(found["furthest"] ** 2 + 0 * error, found["largest"] ** 2),
        non_finite=int(found["non_finite"]),
    )


def _ratio(error: float, expected: float) -> float:
    """The ratio of two norms, given their squares; infinite unless both are finite."""
    if error == 0:
        return 0.0
    return math.sqrt(error / expected) if expected and math.isfinite(error) else math.inf
