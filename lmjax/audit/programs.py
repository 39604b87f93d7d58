"""The programs of a run, traced: what trains, evaluates and decodes.

Nothing is allocated. Each is the function that the run itself compiles.

Knows phases, meshes, steps and the model.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

import jax
import jax.numpy as jnp

from lmjax.model import Calibrated, decoding_params, extend, initial_cache
from lmjax.parallel import sharding
from lmjax.precision import exact
from lmjax.runs.resolved import Phase
from lmjax.train import (
    abstract_params,
    abstract_scaling,
    abstract_state,
    evaluated,
    make_eval_step,
    make_train_step,
)

NAMES: Final = ("train", "evaluate", "decode")


@dataclass(frozen=True)
class Traced:
    """A traced program.

    Attributes:
      name: one of `NAMES`.
      traced: JAX's; it is lowered and compiled from there.
    """

    name: str
    traced: Any


def trace(name: str, phase: Phase, mesh: Any) -> Traced:
    """Traces one of the programs of a phase for a mesh."""
    makers: dict[str, Callable[[Phase, Any], Any]] = {
        "train": _train,
        "evaluate": _evaluate,
        "decode": _decode,
    }
    return Traced(name, makers[name](phase, mesh))


def _rows(phase: Phase, mesh: Any, rows: int) -> dict[str, jax.ShapeDtypeStruct]:
    """A batch of so many rows, with weights too."""
    config = phase.config
    shapes = config.data.batch_shapes(rows, config.context)
    weights = (rows,) if config.data.labelled else (rows, config.context)
    return {
        name: jax.ShapeDtypeStruct(
            shape,
            jnp.float32 if name == "weights" else jnp.int32,
            sharding=sharding.batch_sharding(mesh, shape),
        )
        for name, shape in (shapes | {"weights": weights}).items()
    }


def _train(phase: Phase, mesh: Any) -> Any:
    batch = _rows(phase, mesh, phase.config.batch_size)
    del batch["weights"]
    return make_train_step(phase, mesh).trace(abstract_state(phase, mesh), batch)


def _evaluate(phase: Phase, mesh: Any) -> Any:
    parts = sharding.batch_parts(mesh)
    rows = -(-phase.config.evaluation.batch_size // parts) * parts
    batch = _rows(phase, mesh, rows)
    return make_eval_step(phase, mesh).trace(_evaluated(phase, mesh), batch)


def _evaluated(phase: Phase, mesh: Any) -> Any:
    """What evaluation and decoding are given of the state."""
    return evaluated(abstract_params(phase, mesh), abstract_scaling(phase, mesh), phase)


def _decode(phase: Phase, mesh: Any) -> Any:
    """One token of one text, with a cache as long as the context, on one device."""
    model, sites = phase.config.model, phase.sites
    stored = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype),
        _evaluated(phase, mesh),
    )
    own, factors = stored if isinstance(stored, Calibrated) else (stored, None)
    params = jax.eval_shape(lambda p: decoding_params(p, config=model, sites=sites), own)
    cache = jax.eval_shape(lambda: initial_cache(model, sites, 1, phase.config.context))

    def decode(weights: Any, factors: Any, tokens: jax.Array, cache: Any, start: jax.Array) -> Any:
        read = Calibrated(weights, factors) if factors else weights
        return extend(read, tokens, cache, start, config=model, sites=sites)

    written_for = sharding.traced_for(mesh, decode)
    token, start = jax.ShapeDtypeStruct((1, 1), jnp.int32), jax.ShapeDtypeStruct((), jnp.int32)
    return exact.jit(written_for).trace(params, factors, token, cache, start)
