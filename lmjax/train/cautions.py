"""Warns before a run starts about what its policy cannot do.

Every warning shows its arithmetic. None stops a run: an ablation may want to see it fail.
"""

from __future__ import annotations

import math

from lmjax.model import learning_rate_factors, parametrisation_of
from lmjax.optim.optimizer import learning_rate_schedule
from lmjax.precision.formats import Format
from lmjax.runs.config import Config
from lmjax.runs.resolved import Phase, Resolved


def warnings(run: Resolved) -> list[str]:
    """Reasons why a run may learn less than it seems to, one line each.

    - *Lost updates.* AdamW moves a weight by about the learning rate. Under round to nearest, an
      update of less than half a unit in the last place of the weight changes nothing.
    - *Stuck moments.* The second moment falls by at most the fraction 1 - b2 per step. Stored in a
      format with wider spacing, it cannot fall at all.
    - *Small steps.* Weights of a unit-scaled model have size 1, other weights about 0.02: with the
      learning rates of the latter it hardly moves.
    - *Endless warm-up.* A warm-up as long as the run leaves no step at or after the peak.

    A policy that changes with the step is checked phase by phase, each at its largest learning
    rate.
    """
    config, phases = run.config, run.phases
    if len(phases) == 1:
        rate = config.optimizer.learning_rate
        return _of_the_run(config) + _warnings(phases[0], "the peak learning rate", rate)
    ends = [phase.start for phase in phases[1:]] + [config.steps]
    return _of_the_run(config) + [
        f"from step {phase.start} on, {warning}"
        for phase, end in zip(phases, ends, strict=True)
        for warning in _warnings(
            phase, "the phase's largest learning rate", _largest_rate(config, phase.start, end)
        )
    ]


def _largest_rate(config: Config, start: int, end: int) -> float:
    """The largest learning rate of steps `start` to `end - 1`.

    Schedules rise until the warm-up ends and never afterwards.
    """
    peak = min(max(config.optimizer.warmup_steps, start), end - 1)
    return float(learning_rate_schedule(config.optimizer, config.steps)(peak))


def _warnings(phase: Phase, rate_name: str, rate: float) -> list[str]:
    return [*_lost_updates(phase, rate_name, rate), *_stuck_moments(phase)]


def _of_the_run(config: Config) -> list[str]:
    return [*_small_steps(config), *_endless_warmup(config)]


def _endless_warmup(config: Config) -> list[str]:
    warmup, steps = config.optimizer.warmup_steps, config.steps
    if warmup < steps:
        return []
    return [
        f"optimizer.warmup_steps={warmup}: the run has {steps} steps, all of them warm-up; use a "
        "shorter one"
    ]


def _small_steps(config: Config) -> list[str]:
    rate = config.optimizer.learning_rate
    usual = parametrisation_of(config.model).usual_rate
    if usual is None or rate > 0.1 * usual:
        return []
    move = rate / math.sqrt(config.model.width)
    return [
        f"model.parametrisation={config.model.parametrisation}: a learning rate of {rate:g} moves "
        f"weights of size 1 by only {move:.1e} in a step, 1/sqrt(width) of it; start from {usual}"
    ]


def _lost_updates(phase: Phase, rate_name: str, rate: float) -> list[str]:
    factors = learning_rate_factors(phase.config.model)
    weight_std = parametrisation_of(phase.config.model).weight_std
    found: dict[tuple[str, float, float], float] = {}
    for path, site in phase.param_sites.items():
        if site.update != "nearest":
            continue
        own = rate * factors.get(path, 1.0)
        size = 1.0 if path.endswith("/scale") else weight_std
        if size and own < half_ulp(size, site.params):
            found.setdefault((site.params.name, size, own), half_ulp(size, site.params))
    return [
        f"p={name}: an update of {rate_name} {own:.1e} is less than half a unit in the last place "
        f"({half:.1e}) of a parameter of size {size:g}, and is lost when rounded to "
        f"nearest; use p={name}.sr, p={name}.kahan or p=f32"
        for (name, size, own), half in found.items()
    ]


def _stuck_moments(phase: Phase) -> list[str]:
    config = phase.config
    if config.optimizer.name != "adamw":
        return []
    share = 1.0 - config.optimizer.b2
    found = {}
    for site in phase.param_sites.values():
        nu = site.nu
        if nu.groups == "none" and share < nu.format.epsilon / 2:
            found[str(nu)] = nu.format.epsilon / 2
    return [
        f"nu={name}: with b2={config.optimizer.b2:g} a second moment falls by at most {share:.1e} "
        f"of itself in a step, less than half the spacing of its format ({half:.1e}); once large, "
        "it stays. Use a smaller b2 or nu=f32"
        for name, half in found.items()
    ]


def half_ulp(value: float, number_format: Format) -> float:
    """Half a unit in the last place of a positive number in a format."""
    exponent = max(math.floor(math.log2(value)), number_format.smallest_exponent)
    return math.ldexp(0.5, exponent - number_format.mantissa_bits)
