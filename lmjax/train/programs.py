"""A run's steps, compiled for its devices.

The seed is an argument of the programs, so runs that differ only in the seed share them. A process
that trains many runs passes the same `Programs` to all, and traces, lowers and compiles each
program once.

Knows meshes, states and steps, not the loop around them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import jax

from lmjax.parallel.sharding import Mesh
from lmjax.runs.config import by_name
from lmjax.runs.resolved import Phase
from lmjax.runs.state import TrainState
from lmjax.train.step import Batch, make_eval_step, make_train_step

_Key = tuple[tuple[tuple[str, Any], ...], Mesh]
_Program = TypeVar("_Program")


class PhasePrograms(NamedTuple):
    """The train steps of one phase.

    Attributes:
      train: compiled.
      watched: with telemetry, if any.
      jaxpr: what `train` was compiled from.
    """

    train: Any
    watched: Any
    jaxpr: Any = None


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

    def phase(self, phase: Phase, mesh: Mesh, state: TrainState, batch: Batch) -> PhasePrograms:
        """The train steps of a phase.

        Args:
          phase: which.
          mesh: where the steps are computed.
          state, batch: their arguments, or arrays with the same shapes and shardings.
        """

        def make() -> PhasePrograms:
            watched = None
            if phase.config.telemetry.every:
                step = make_train_step(phase, mesh, telemetry=True)
                watched = step.lower(state, batch).compile()
            traced = make_train_step(phase, mesh).trace(state, batch)
            return PhasePrograms(traced.lower().compile(), watched, traced.jaxpr)

        return self._kept(self._phases, phase, mesh, make)

    def evaluation(self, phase: Phase, mesh: Mesh) -> jax.stages.Wrapped:
        """The evaluation of a batch in a phase; see `make_eval_step`."""
        make = lambda: make_eval_step(phase, mesh)
        return self._kept(self._evaluations, phase, mesh, make)

    def _kept(
        self, made: dict[_Key, _Program], phase: Phase, mesh: Mesh, make: Callable[[], _Program]
    ) -> _Program:
        """Returns the program of a phase with any seed, made if missing; moves it to the end."""
        key = tuple((by_name(phase.config) | {"seed": 0}).items()), mesh
        program = made.pop(key) if key in made else make()
        made[key] = program
        if len(made) > self._capacity:
            del made[next(iter(made))]
        return program
