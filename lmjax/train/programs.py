"""A run's steps, compiled for its devices.

The seed is an argument of the programs, so runs that differ only in the seed share them. A process
that trains many runs passes the same `Programs` to all, and traces, lowers and compiles each
program once.

Knows meshes, states and steps, not the loop around them.
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
    """A cache of compiled steps, keyed by what they compute.

    Even a small model's steps take tens of megabytes, so the least recently used are dropped.

    Args:
      capacity: the number of phases, and of evaluations, to keep.
    """

    def __init__(self, capacity: int = 12) -> None:
        self._capacity = capacity
        self._phases: dict[_Key, PhasePrograms] = {}
        self._evaluations: dict[_Key, jax.stages.Wrapped] = {}

    def phase(self, config: Config, mesh: Mesh, state: TrainState, batch: Batch) -> PhasePrograms:
        """The train steps of a phase.

        Args:
          config: resolved, for a single phase; see `Config.at`.
          mesh: where the steps are computed.
          state, batch: their arguments, or arrays with the same shapes and shardings.
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
        """Returns the entry of a key, ignoring the seed, made if missing; moves it to the end."""
        key = dataclasses.replace(key[0], seed=0), key[1]
        program = made.pop(key) if key in made else make()
        made[key] = program
        if len(made) > self._capacity:
            del made[next(iter(made))]
        return program
