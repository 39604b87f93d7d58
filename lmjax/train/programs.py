"""The programs of a run: its steps, compiled for the devices that it runs on.

Runs that differ in the seed alone execute the same programs, as a seed is an argument of them. So a
process that trains many runs hands the same `Programs` to all, and traces, lowers and compiles each
program once.

Knows meshes, states and steps; nothing of the loop around them.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax

from lmjax.sharding import Mesh
from lmjax.train.config import Config
from lmjax.train.state import TrainState
from lmjax.train.step import Batch, make_eval_step, make_train_step


class PhasePrograms(NamedTuple):
    """The compiled train steps of one phase; `watched` is the one with telemetry, if any."""

    train: Any
    watched: Any


class Programs:
    """Compiled steps by what they compute. They stay in memory as long as this does."""

    def __init__(self) -> None:
        self._phases: dict[tuple[Config, Mesh], PhasePrograms] = {}
        self._evaluations: dict[tuple[Config, Mesh], jax.stages.Wrapped] = {}

    def phase(self, config: Config, mesh: Mesh, state: TrainState, batch: Batch) -> PhasePrograms:
        """The train steps of a phase.

        Args:
          config: resolved, and of one phase; see `Config.at`.
          mesh: where the steps are computed.
          state, batch: what they are called with, or arrays of the same shapes and shardings.
        """
        key = _whatever_the_seed(config), mesh
        if key not in self._phases:
            compiled = lambda step: step.lower(state, batch).compile()
            watched = None
            if config.telemetry.every:
                watched = compiled(make_train_step(config, mesh, telemetry=True))
            self._phases[key] = PhasePrograms(compiled(make_train_step(config, mesh)), watched)
        return self._phases[key]

    def evaluation(self, config: Config, mesh: Mesh) -> jax.stages.Wrapped:
        """The evaluation of a batch in a phase; see `make_eval_step`."""
        key = _whatever_the_seed(config), mesh
        if key not in self._evaluations:
            self._evaluations[key] = make_eval_step(config, mesh)
        return self._evaluations[key]


def _whatever_the_seed(config: Config) -> Config:
    return dataclasses.replace(config, seed=0)
