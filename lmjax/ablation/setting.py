"""Describes what was run: model size, length, learning rate, data, seeds, machine and versions.

Knows configs, the state of a run and `environment.json`; nothing of statistics.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from lmjax import strict_json
from lmjax.ablation.grid import Ablation
from lmjax.ablation.words import millions
from lmjax.console.wording import counted
from lmjax.runs.config import Config
from lmjax.runs.resolved import resolve
from lmjax.runs.state import size_of_state

Environment = Mapping[str, Any]
"""What `environment.json` says."""


def read_environment(run: Path) -> Environment:
    """Reads the environment that a run directory records; empty before the run starts."""
    path = run / "environment.json"
    return strict_json.read(path) if path.exists() else {}


class Footprint(NamedTuple):
    """The size of a run: its parameters, and the bytes of all state kept between steps."""

    parameters: int
    state_bytes: int


@functools.lru_cache(maxsize=256)
def footprint(config: Config) -> Footprint:
    """Returns the size of a run at its first step, without computing anything."""
    return Footprint(*size_of_state(resolve(config).at(0)))


def what_was_run(ablation: Ablation | None, environments: Iterable[Environment]) -> dict[str, str]:
    """Returns the setup of an ablation, one entry per line; differing arms list all values.

    Args:
      ablation: None if nothing was trained.
      environments: those of the runs, or that of the process that computed.
    """
    there = [environment for environment in environments if environment]
    machines = {
        "hardware": _either(map(_hardware, there)),
        "software": _either(map(_software, there)),
    }
    if ablation is None:
        return {"runs": "none; arithmetic alone", **machines}
    arms = list(ablation.arms.values())
    seeds = ", ".join(map(str, ablation.all_seeds))
    return {
        "runs": f"{counted(len(arms), 'arm')}; {counted(len(ablation.all_seeds), 'seed')}: {seeds}",
        "model": _either(map(_model, arms)),
        "tokens": _either(map(_tokens, arms)),
        "learning rate": _either(map(_rate, arms)),
        "data": _either(map(_data, arms)),
        **machines,
    }


def subject(ablation: Ablation | None) -> str:
    """The object of study, as the subject of a sentence."""
    if ablation is None:
        return "Arithmetic on random numbers"
    sizes = _either(millions(footprint(arm).parameters) for arm in ablation.arms.values())
    tokens = _either(f"{_count(arm):,}" for arm in ablation.arms.values())
    return f"A model of {sizes} parameters trained on {tokens} tokens"


def _either(texts: Iterable[str]) -> str:
    return " or ".join(dict.fromkeys(texts)) or "not recorded"


def _model(config: Config) -> str:
    model = config.model
    size = millions(footprint(config).parameters)
    return f"{size} parameters, {counted(model.layers, 'block')} of width {model.width}"


def _count(config: Config) -> int:
    return config.steps * config.batch_size * config.context


def _tokens(config: Config) -> str:
    steps = f"{counted(config.steps, 'step')} of {config.batch_size} x {config.context}"
    return f"{_count(config):,} ({steps})"


def _rate(config: Config) -> str:
    optimizer = config.optimizer
    warmup = counted(optimizer.warmup_steps, "step")
    return f"{optimizer.learning_rate:g} ({optimizer.name}, {optimizer.schedule}, warm-up {warmup})"


def _data(config: Config) -> str:
    data = config.data
    files = f" {' '.join(data.files)}" if data.files else ""
    return f"{data.dataset}{files}, tokenizer {data.tokenizer}"


def _hardware(environment: Environment) -> str:
    devices = list(environment.get("devices", ()))
    if environment.get("backend", "cpu") != "cpu":
        return f"{len(devices)} x {devices[0]}"
    processor = environment.get("processor") or environment.get("machine") or "CPU"
    return f"{processor}, {counted(environment.get('cpu_count') or 1, 'core')}"


def _software(environment: Environment) -> str:
    packages = environment.get("packages", {})
    versions = [f"{name} {packages[name]}" for name in ("jax", "jaxlib") if packages.get(name)]
    versions.append(f"Python {environment.get('python', '?')}")
    if revision := environment.get("git_revision"):
        versions.append(f"git {revision[:10]}{'+' * revision.endswith('+')}")
    return ", ".join(versions)
