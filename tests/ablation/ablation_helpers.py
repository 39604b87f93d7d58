"""An ablation and its cells in the shape that reports read, and run directories written by hand."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from lmjax import strict_json
from lmjax.train import Config


@dataclass(frozen=True)
class Ablation:
    """What reports read of an ablation."""

    arms: Mapping[str, Config]
    name: str = "example"
    question: str = "Does it matter?"
    control: str = "f32"
    controls: Mapping[str, str] = field(default_factory=dict)
    seeds: tuple[int, ...] = (0, 1, 2)
    metric: str = "eval_loss"
    margin: float = 0.005

    @property
    def all_seeds(self) -> tuple[int, ...]:
        """The seeds of every arm."""
        return self.seeds

    @property
    def base(self) -> Config:
        """The config of the control."""
        return self.arms[self.control]


class Cell(NamedTuple):
    """What reports read of a cell."""

    arm: str
    seed: int
    directory: Path
    status: str
    value: float
    reason: str = ""


def write_run(
    directory: Path,
    losses: Mapping[int, float] | np.ndarray,
    *,
    eval_loss: float | None = None,
    environment: Mapping[str, Any] | None = None,
    **columns: Any,
) -> Path:
    """A run directory with those training losses, by step or every 5 steps, and extra columns.

    A column is a number for all rows or a function of the step. Without `eval_loss` the run has no
    result.
    """
    directory.mkdir(parents=True, exist_ok=True)
    steps = (
        losses if isinstance(losses, Mapping) else {5 * (i + 1): v for i, v in enumerate(losses)}
    )
    rows = [
        {
            "step": step,
            "loss": float(loss),
            "learning_rate": 1e-3,
            "grad_norm": 1.0,
            "tokens_per_second": 1000.0 + step,
            "step_seconds": 0.01,
            **{name: v(step) if callable(v) else v for name, v in columns.items()},
        }
        for step, loss in steps.items()
    ]
    if eval_loss is not None:
        rows.append({"step": max(steps), "eval_loss": eval_loss})
        result = {"steps": max(steps), "eval_loss": eval_loss, "train_seconds": 12.5}
        (directory / "result.json").write_text(strict_json.dumps(result))
    (directory / "metrics.jsonl").write_text("".join(strict_json.dumps(row) + "\n" for row in rows))
    environment = environment or {"python": "3.11", "packages": {"jax": "0.10.2"}}
    (directory / "environment.json").write_text(json.dumps(environment))
    return directory


def finished(arm: str, seed: int, directory: Path, value: float) -> Cell:
    """A cell whose run has a result."""
    return Cell(arm, seed, directory, "finished", value)


def failed(arm: str, seed: int, directory: Path, reason: str) -> Cell:
    """A cell whose run ended without one."""
    return Cell(arm, seed, directory, "failed", math.nan, reason)


def missing(arm: str, seed: int, directory: Path) -> Cell:
    """A cell that has not run yet."""
    return Cell(arm, seed, directory, "missing", math.nan)
