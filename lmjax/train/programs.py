"""The programs of a run: its steps, compiled for the devices that it runs on.

Runs that differ in the seed alone execute the same programs, as a seed is an argument of them. So a
process that trains many runs hands the same `Programs` to all, and traces, lowers and compiles each
program once.

Knows meshes, states and steps; nothing of the loop around them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import jax

from lmjax.parallel.sharding import Mesh
from lmjax.runs.config import Config
from lmjax.runs.state import TrainState
from lmjax.train.step import Batch, make_eval_step, make_train_step

_Key = tuple[Config, Mesh]
_Program = TypeVar("_Program")


class PhasePrograms(NamedTuple):
    """The compiled train steps of one phase; `watched` is the one with telemetry, if any."""

    train: Any
    watched: Any


class Programs:
    """Compiled steps by what they compute.

    Even a small model's take tens of megabytes, so those not asked for lately are dropped.

    Args:
      capacity: how many phases, and how many evaluations, are kept.
    """

    def __init__(self, capacity: int = 12) -> None:
        self._capacity = capacity
        self._phases: dict[_Key, PhasePrograms] = {}
        self._evaluations: dict[_Key, jax.stages.Wrapped] = {}

    def phase(self, config: Config, mesh: Mesh, state: TrainState, batch: Batch) -> PhasePrograms:
        """The train steps of a phase.

        Args:
          config: resolved, and of one phase; see `Config.at`.
          mesh: where the steps are computed.
          state, batch: what they are called with, or arrays of the same shapes and shardings.
        """

        def make() -> PhasePrograms:
            compiled = lambda step: step.lower(state, batch).compile()
            watched = None
            if config.telemetry.every:
                watched = compiled(make_train_step(config, mesh, telemetry=True))
            return PhasePrograms(compiled(make_train_step(config, mesh)), watched)

        return self._kept(self._phases, (config, mesh), make)

    def evaluation(self, config: Config, mesh: Mesh) -> jax.stages.Wrapped:
        """The evaluation of a batch in a phase; see `make_eval_step`."""
        make = lambda: make_eval_step(config, mesh)
        return self._kept(self._evaluations, (config, mesh), make)

    def _kept(
        self, made: dict[_Key, _Program], key: _Key, make: Callable[[], _Program]
    ) -> _Program:
        """What was made for a key whatever its seed, or is now; the last one in its dict."""
        key = dataclasses.replace(key[0], seed=0), key[1]
        program = made.pop(key) if key in made else make()
        made[key] = program
        if len(made) > self._capacity:
            del made[next(iter(made))]
        return program
