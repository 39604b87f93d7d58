"""The train state: one pytree of plain arrays, which is also what a checkpoint holds."""

from __future__ import annotations

import contextlib
import dataclasses
import warnings
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from lmjax.errors import InputError
from lmjax.model import (
    Params,
    initial_params,
    learning_rate_factors,
    parameter_count,
    parametrisation_of,
    structure,
)
from lmjax.optim.loss_scale import LossScaleState
from lmjax.optim.optimizer import make_optimizer
from lmjax.optim.storage import ParamSites, convert_moments, convert_params, initial_residuals
from lmjax.parallel.sharding import Mesh, state_shardings
from lmjax.precision import exact, paths
from lmjax.runs.config import Config
from lmjax.runs.resolved import Phase, phase_of
from lmjax.telemetry.measure import carried_scaling, initial_scaling

KEY_KIND = "threefry2x32"


class TrainState(NamedTuple):
    """Everything that a step reads and writes.

    Attributes:
      step: int32[], steps attempted; skipped ones count.
      params: the parameters, each in its stored format.
      opt_state: the loss scale, with the optimizer's state inside.
      residuals: rounding errors of Kahan-compensated updates; empty without any.
      scaling: amax histories of operands with delayed scaling; empty without any.
      key: uint32[2], data of a threefry key; dropout and stochastic rounding fold the step in.
    """

    step: jax.Array
    params: Params
    opt_state: LossScaleState
    residuals: Params
    scaling: dict[str, Any]
    key: jax.Array


def optimizer_of(phase: Phase) -> optax.GradientTransformationExtraArgs:
    """The optimizer of a run, with its loss scale around it."""
    config = phase.config
    settings, scales = config.optimizer, parametrisation_of(config.model)
    norm = scales.clip_norm(settings.clip_norm, parameter_count(config.model))
    settings = dataclasses.replace(settings, clip_norm=norm)
    return make_optimizer(
        settings,
        config.loss_scale,
        config.steps,
        phase.param_sites,
        phase.layout.stack,
        learning_rate_factors(config.model),
        config.reductions.norm,
        config.pruning,
    )


def initial_state(config: Config | Phase, key: jax.Array | None = None) -> TrainState:
    """A fresh state; a pure function of the config and so of its seed. Call it under jit.

    Args:
      config: the run, whose policy must have one phase, or a phase of it.
      key: by default the key of the config's seed.
    """
    phase = phase_of(config)
    refuse_stored(phase)
    key = seed_key(phase.config.seed) if key is None else key
    init_key, dropout_key = jax.random.split(key)
    params = initial_params(init_key, phase.config.model, phase.sites)
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        opt_state=optimizer_of(phase).init(params),
        residuals=initial_residuals(params, phase.param_sites),
        scaling=initial_scaling(phase.layout, phase.sites),
        key=jax.random.key_data(dropout_key),
    )


def refuse_stored(phase: Phase) -> None:
    """Rejects policies whose weights can be read but not trained.

    Raises:
      InputError: some weights are `.stored`.
    """
    for path, site in phase.sites.items():
        if site.stores:
            raise InputError(
                f"{path} has w={site.second}: what is stored as elements can be read, but nothing "
                f"can be added to it. Train with w={site.stores} and quantize the run afterwards"
            )


def params_alone(params: Params, step: int, scaling: dict[str, Any] | None = None) -> TrainState:
    """The state of a run that holds parameters to be read, and nothing to train them with.

    Args:
      params: the parameters.
      step: training steps that they have seen.
      scaling: the state of the factors that they are read with.
    """
    zeros = jnp.zeros(2, jnp.uint32)
    opt_state: Any = ()
    return TrainState(jnp.asarray(step, jnp.int32), params, opt_state, {}, scaling or {}, zeros)


def abstract_params(config: Config | Phase, mesh: Any) -> Params:
    """Shapes, dtypes and shardings of the parameters, as `abstract_state` has them."""
    phase = phase_of(config)
    shapes = params_shapes(phase)
    return _placed(shapes, state_shardings(mesh, structure(phase.config.model)[2], shapes))


def abstract_scaling(phase: Phase, mesh: Any) -> dict[str, Any]:
    """Shapes, dtypes and shardings of the state of scale factors."""
    shapes = jax.eval_shape(lambda: initial_scaling(phase.layout, phase.sites))
    return _placed(shapes, state_shardings(mesh, structure(phase.config.model)[2], shapes))


def params_shapes(phase: Phase) -> Params:
    """Shapes and dtypes of the parameters alone."""
    key, model = jax.random.key(0), phase.config.model
    return jax.eval_shape(lambda: initial_params(key, model, phase.sites))


def size_of_state(phase: Phase) -> tuple[int, int]:
    """The number of parameters, and the bytes of all that is kept between steps.

    Of weights that are stored as elements, which nothing is trained with, those of the parameters.
    """
    stored = any(site.stores for site in phase.sites.values())
    kept = params_shapes(phase) if stored else jax.eval_shape(lambda: initial_state(phase))
    held = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(kept))
    return parameter_count(phase.config.model), held


def _placed(shapes: Any, shardings: Any) -> Any:
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        shapes,
        shardings,
    )


def abstract_state(config: Config | Phase, mesh: Any) -> TrainState:
    """Shapes, dtypes and shardings of the state on a mesh, which may be abstract."""
    phase = phase_of(config)
    shapes = jax.eval_shape(lambda: initial_state(phase))
    return _placed(shapes, state_shardings(mesh, structure(phase.config.model)[2], shapes))


def create_state(config: Config | Phase, mesh: Mesh) -> TrainState:
    """A fresh state, each array created on the devices where it lives.

    The seed is an argument of the compiled program, not a constant, so that runs which differ only
    in the seed share it in the compilation cache.
    """
    phase = phase_of(config)
    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract_state(phase, mesh))

    def init(data: jax.Array) -> TrainState:
        return initial_state(phase, jax.random.wrap_key_data(data, impl=KEY_KIND))

    seed = np.asarray(jax.random.key_data(seed_key(phase.config.seed)))
    return exact.jit(init, out_shardings=shardings)(seed)


def adopt(params: Params, stored: ParamSites, phase: Phase, mesh: Mesh) -> TrainState:
    """A fresh state around parameters that exist already, which it donates.

    Args:
      params: on the devices of the mesh, where the state has them; those that are missing are
        drawn from the seed.
      stored: how they are stored; they are converted to the formats of the phase.
      phase: the first one.
      mesh: where the state lives.
    """
    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract_state(phase, mesh))

    def init(params: Params, data: jax.Array) -> TrainState:
        """The state before the first step, from given parameters and the data of a key."""
        fresh = initial_state(phase, jax.random.wrap_key_data(data, impl=KEY_KIND))
        own, residuals = convert_params(params, {}, stored, phase.param_sites)
        if missing := paths.flatten(fresh.params).keys() - paths.flatten(own).keys():
            pick = lambda tree: {p: x for p, x in paths.flatten(tree).items() if p in missing}
            own, residuals = (
                paths.unflatten(paths.flatten(given) | pick(drawn))
                for given, drawn in ((own, fresh.params), (residuals, fresh.residuals))
            )
        optimizer = optimizer_of(phase).init(own)
        return fresh._replace(params=own, residuals=residuals, opt_state=optimizer)

    seed = np.asarray(jax.random.key_data(seed_key(phase.config.seed)))
    with _donation_refused():
        return exact.jit(init, donate_argnums=0, out_shardings=shardings)(params, seed)


@contextlib.contextmanager
def _donation_refused() -> Iterator[None]:
    """Donated memory of an array whose format changes cannot be reused; suppresses the warning."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Some donated buffers were not usable")
        yield


def carry_over(state: TrainState, old: Phase, new: Phase) -> TrainState:
    """Converts the state of one phase of a policy for the next phase; a pure function.

    Parameters, residuals and moments are converted where their formats change (see
    `convert_params` and `convert_moments`); histories of delayed scaling are kept where the next
    phase has the same. The rest is unchanged bit for bit: the step, the loss scale with its
    counters, the optimizer's counts, the key.

    Args:
      state: as a step of `old` left it.
      old: the phase before.
      new: the phase to come.
    """
    before, after = old.param_sites, new.param_sites
    params, residuals = convert_params(state.params, state.residuals, before, after)
    return state._replace(
        params=params,
        residuals=residuals,
        opt_state=convert_moments(state.opt_state, before, after),
        scaling=carried_scaling(state.scaling, new.layout, old.sites, new.sites),
    )


def change_phase(state: TrainState, old: Phase, new: Phase, mesh: Mesh) -> TrainState:
    """`carry_over` on the devices of a mesh; it donates the state it is given."""
    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract_state(new, mesh))
    convert = lambda state: carry_over(state, old, new)
    with _donation_refused():
        return exact.jit(convert, donate_argnums=0, out_shardings=shardings)(state)


def seed_key(seed: int) -> jax.Array:
    """The threefry key of a seed in [0, 2**64): its high and its low 32 bits are the two words.

    `jax.random.key` gives the same key for seeds below 2**32. Of larger ones it drops the high bits
    unless 64-bit types are enabled, so that seeds 2**32 apart would share a key.
    """
    words = np.asarray(divmod(seed, 2**32), np.uint32)
    return jax.random.wrap_key_data(jnp.asarray(words), impl=KEY_KIND)
