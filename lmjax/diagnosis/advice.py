"""Advice: which formats the tensors of an experiment have room for, and whether it trains in them.

A short run in f32 counts the exponents of every tensor. They say what a format would do to it: the
share that becomes 0 and the share beyond the largest number, also if the tensor is divided by a
factor that brings its maximum to that number. Of a ladder of formats, each tensor gets the first
for which both shares stay below a budget; that is a policy. It is then tried: the run is repeated
under it, what telemetry counts stands beside what was predicted, and the held-out losses beside
each other. If the policy loses more than is tolerated, a wider ladder is tried.

A ladder's operands are what a chip multiplies faster than what follows; without a target, what
takes fewer bits.

Knows runs, telemetry and peak rates of chips.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import numpy as np
from scipy import stats

from lmjax.chips import DEVICES
from lmjax.console import stages
from lmjax.diagnosis.exponents import GRADIENTS, Exponents, Loss, f16_loss_scales, predicted
from lmjax.diagnosis.opened import fresh_run
from lmjax.precision.probes import Census
from lmjax.runs.config import Config
from lmjax.runs.resolved import Phase
from lmjax.telemetry.rows import telemetry_row, tensor_format
from lmjax.train.evaluate import held_out_loss
from lmjax.train.step import evaluated, make_eval_step, make_train_step

WATCHED = 4
"""Steps of a trial whose tensors are counted, spread evenly over it."""

KEY_OF = {"w": "w", "x": "x", "g": "g", "y": "c", "dx": "c", "dw": "c"}
"""The key of a policy that sets the format of each role."""


@dataclass(frozen=True)
class Trial:
    """A policy that was tried.

    Attributes:
      precision: the policy.
      loss_scale: the static scale of f16, in the middle of those that are right; 1 for others.
      losses: held-out nats per token, by seed.
      gap: mean over seeds of what it loses to f32.
      half_width: of the 95% confidence interval of the gap; infinite with one seed.
      formats: that each tensor is rounded to.
      predicted: what it was expected to lose of each tensor.
      measured: what it lost: elements that are 0 and are not in f32, and that overflow.
    """

    precision: str
    loss_scale: float
    losses: tuple[float, ...]
    gap: float
    half_width: float
    formats: dict[str, str]
    predicted: dict[str, Loss]
    measured: dict[str, Loss]


@dataclass(frozen=True)
class Advice:
    """What formats an experiment has room for.

    Attributes:
      budget: the share of a tensor that may underflow, or overflow.
      tolerance: the largest gap to f32 that is accepted, in nats.
      target: chip whose rates count; empty: bits count.
      precision: the advised policy: the first tried that is within the tolerance; else f32.
      f32: held-out losses of the run in f32, by seed.
      formats: by site and role, the first format of the narrowest ladder within the budget.
      loss_scale: the smallest power of two at which f16 loses less than the budget of every
        gradient; None if f16 needs none.
      largest_loss_scale: the largest at which no gradient comes within a factor of 2 of overflow.
      trials: the policies that were tried, in that order.
    """

    budget: float
    tolerance: float
    target: str
    precision: str
    f32: tuple[float, ...]
    formats: dict[str, str]
    loss_scale: float | None
    largest_loss_scale: float
    trials: tuple[Trial, ...]

    @property
    def flags(self) -> str:
        """Of an experiment, to train as advised."""
        scales = [t.loss_scale for t in self.trials if t.precision == self.precision]
        scale = f"{scales[-1]:g}" if scales else "1"
        flags = {"kind": "static", "initial": scale, "maximum": scale} if scale != "1" else {}
        scaled = "".join(f" --loss-scale.{name} {value}" for name, value in flags.items())
        return f"--precision '{self.precision}'{scaled}"


def advise(
    config: Config,
    *,
    target: str = "",
    steps: int = 60,
    seeds: int = 1,
    budget: float = 1e-2,
    tolerance: float = 1e-2,
) -> Advice:
    """Advises on the formats of an experiment, and tries the advice.

    Args:
      config: the experiment; its own policy does not matter.
      target: name of a chip, such as `h100`.
      steps: length of each trial, the first steps of the experiment.
      seeds: how often each is repeated, with other seeds.
      budget: share of a tensor that may become 0, or be beyond the largest number.
      tolerance: largest gap to f32 in held-out loss, in nats per token.

    Raises:
      ValueError: the chip is unknown.
    """
    ladders = _ladders(target)
    wide = _trained(config, "f32", steps, seeds)
    smallest, largest = f16_loss_scales(wide[0].exponents, budget)
    middle = 2.0 ** round(math.log2((smallest or 1.0) * largest) / 2)
    trials: list[Trial] = []
    advised = "f32"
    formats: dict[str, str] = {}
    for ladder in ladders:
        scale = min(middle, largest) if "f16" in ladder.compute else 1.0
        exponents = {
            path: found.times(scale) if path.endswith(GRADIENTS) else found
            for path, found in wide[0].exponents.items()
        }
        policy, chosen = _policy(wide[0].phase, ladder, exponents, budget)
        formats = formats or chosen
        ran = _trained(config, policy, steps, seeds, scale)
        gaps = np.array([one.loss - other.loss for one, other in zip(ran, wide, strict=True)])
        trials.append(
            Trial(
                policy,
                scale,
                tuple(one.loss for one in ran),
                float(np.mean(gaps)),
                _half_width(gaps),
                ran[0].formats,
                {path: predicted(exponents[path], text) for path, text in ran[0].formats.items()},
                ran[0].lost_to(wide[0]),
            )
        )
        if trials[-1].gap <= tolerance:
            advised = policy
            break
    losses = tuple(one.loss for one in wide)
    return Advice(
        budget, tolerance, target, advised, losses, formats, smallest, largest, tuple(trials)
    )


class Ladder(NamedTuple):
    """Formats of the operands of products, narrowest first, and of everything else."""

    operands: tuple[str, ...]
    cotangents: tuple[str, ...]
    compute: tuple[str, ...]


def _ladders(target: str) -> list[Ladder]:
    """The ladders to try, narrowest first."""
    eight = Ladder(("e4m3@tensor", "e5m2@tensor"), ("e5m2@tensor",), ("bf16", "f32"))
    sixteen = Ladder((), (), ("bf16", "f32"))
    if not target:
        return [eight, sixteen]
    rates = _rates(target)
    faster = lambda name, than: rates.get(name, 0.0) > rates.get(than, 0.0)
    half = next((name for name in ("bf16", "f16") if faster(name, "f32")), None)
    if half is None:
        return []
    compute = (half, "f32")
    ladders = [Ladder((), (), compute)]
    if faster("fp8", half):
        ladders.insert(0, eight._replace(compute=compute))
    return ladders


def _rates(target: str) -> dict[str, float]:
    plain = lambda name: re.sub(r"[^a-z0-9]", "", name.lower())
    for _, chip, flops in DEVICES:
        if plain(chip).removeprefix("tpu").startswith(plain(target).removeprefix("tpu")):
            return flops
    known = ", ".join(chip for _, chip, _ in DEVICES)
    raise ValueError(f"no chip is called {target!r}; there are {known}")


def _policy(
    phase: Phase, ladder: Ladder, exponents: Mapping[str, Exponents], budget: float
) -> tuple[str, dict[str, str]]:
    """A policy with the first format of a ladder that each tensor has room for.

    Returns:
      The policy, and the format of every tensor by site and role.
    """
    chosen: dict[str, str] = {}
    rules: dict[str, dict[str, str]] = {}
    first = ladder.compute[0]
    base = {"p": "f32", "c": first, "o": "f32"}
    for key, steps in (("w", ladder.operands), ("x", ladder.operands), ("g", ladder.cotangents)):
        base |= {key: steps[0]} if steps else {}
    for path, site in phase.sites.items():
        roles = [role for role in site.site.roles if f"{path}/{role}" in exponents]
        fits = lambda role, text, p=path: predicted(exponents[f"{p}/{role}"], text).worst <= budget
        wide = site.site.wide
        narrowed = "f32" if wide else next(
            (c for c in ladder.compute if all(fits(r, c) for r in roles)), ladder.compute[-1]
        )  # fmt: skip
        if not wide and narrowed != first:
            rules.setdefault(path, {})["c"] = narrowed
        for role in roles:
            steps = ladder.cotangents if role == "g" else ladder.operands
            if KEY_OF[role] == "c" or not site.site.takes_operands or not steps:
                chosen[f"{path}/{role}"] = narrowed
                continue
            text = next((one for one in steps if fits(role, one)), narrowed)
            chosen[f"{path}/{role}"] = text
            if text != base[role]:
                rules.setdefault(path, {})[role] = text
    written = lambda settings: ",".join(f"{key}={value}" for key, value in settings.items())
    merged = _merged(phase, {path: written(settings) for path, settings in rules.items()})
    return "; ".join([written(base), *(f"{path}: {text}" for path, text in merged)]), chosen


def _merged(phase: Phase, rules: Mapping[str, str]) -> Iterable[tuple[str, str]]:
    """Rules by path; one for all members of a stack where they are alike."""
    for place in phase.layout.places:
        texts = [rules.get(path, "") for path in place.paths]
        if texts[0] and len(set(texts)) == 1:
            yield str(place), texts[0]
        else:
            yield from ((path, text) for path, text in zip(place.paths, texts, strict=True) if text)


class _Trained(NamedTuple):
    phase: Phase
    loss: float
    exponents: dict[str, Exponents]
    formats: dict[str, str]
    lost: dict[str, Loss]

    def lost_to(self, wide: _Trained) -> dict[str, Loss]:
        """What each tensor lost here and to what it was computed from, compared with a wide run."""
        zeros = {path: e.zeros - wide.exponents[path].zeros for path, e in self.exponents.items()}
        return {
            path: Loss(max(0.0, found.underflow + zeros[path]), found.overflow)
            for path, found in self.lost.items()
        }


def _trained(
    config: Config, precision: str, steps: int, seeds: int, loss_scale: float = 1.0
) -> list[_Trained]:
    """The first steps of an experiment under a policy, some of them watched, from several seeds."""
    scale = dataclasses.replace(config.loss_scale, kind="auto", format="auto")
    if loss_scale != 1:
        scale = dataclasses.replace(
            scale, kind="static", initial=loss_scale, maximum=loss_scale, per_block=False
        )
    watching = dataclasses.replace(config.telemetry, every=1)
    config = dataclasses.replace(config, precision=precision, loss_scale=scale, telemetry=watching)
    first = fresh_run(config)
    mesh, phase = first.mesh, first.phase
    # Compiled once for all seeds, which no program depends on.
    plain, counting = (make_train_step(phase, mesh, telemetry=counts) for counts in (False, True))
    evaluate = make_eval_step(phase, mesh)
    watched = {round(steps * part / WATCHED) for part in range(1, WATCHED + 1)}

    def one(seed: int) -> _Trained:
        """The run with one seed; telemetry is counted in the first alone."""
        own = dataclasses.replace(first.config, seed=first.config.seed + seed)
        run = fresh_run(own) if seed else first
        rows: list[dict[str, Any]] = []
        with stages.stage(f"training {steps} steps with {precision}, seed {own.seed}"):
            for number in range(1, steps + 1):
                step = counting if number in watched and not seed else plain
                run.state, metrics = step(run.state, run.next_batch())
                if "telemetry" in metrics:
                    tensors: dict[str, Census] = jax.device_get(metrics["telemetry"])
                    updates = jax.device_get(metrics["updates"])
                    rows.append(telemetry_row(number, tensors, updates, phase.sites, phase.layout))
            params = evaluated(run.state.params, run.state.scaling, phase)
            loss = held_out_loss(evaluate, params, run.corpus, own, mesh, batches=32)
        seen = list(rows[0]["tensors"]) if rows else []
        return _Trained(
            phase,
            loss,
            {path: _exponents([row["tensors"][path] for row in rows]) for path in seen},
            {path: tensor_format(path, phase.sites, phase.layout) for path in seen},
            {path: _lost([row["tensors"][path] for row in rows]) for path in seen},
        )

    return [one(seed) for seed in range(seeds)]


def _exponents(rows: Sequence[Mapping[str, Any]]) -> Exponents:
    counts: dict[int, float] = {}
    for row in rows:
        for exponent, count in row["exponents"].items():
            counts[int(exponent)] = counts.get(int(exponent), 0) + count
    return Exponents(sum(row["size"] for row in rows), max(r["maximum"] for r in rows), counts)


def _lost(rows: Sequence[Mapping[str, Any]]) -> Loss:
    mean = lambda name: float(np.mean([row[name] for row in rows]))
    return Loss(mean("underflow"), mean("overflow"))


def _half_width(gaps: np.ndarray) -> float:
    if len(gaps) < 2:
        return math.inf
    spread = np.std(gaps, ddof=1) / math.sqrt(len(gaps))
    return float(stats.t.ppf(0.975, len(gaps) - 1) * spread)
