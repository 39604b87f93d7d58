"""The train step: one pure function, and a single code path for every policy.

params -> compute format -> logits -> loss in f32 -> times the loss scale -> backward
-> unscale in f32 -> sum over micro-batches in f32 -> finite everywhere? -> clip -> optimizer
-> parameters, rounded to their stored format
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from lmjax.model import (
    Calibrated,
    Constrain,
    Context,
    Params,
    assembled,
    in_evaluation,
    objective_of,
)
from lmjax.model.head import Backward
from lmjax.optim import loss_scale
from lmjax.optim.optimizer import learning_rate_schedule
from lmjax.optim.storage import apply_updates, update_census
from lmjax.parallel import sharding
from lmjax.parallel.reduction import Gradient
from lmjax.precision import probes
from lmjax.precision.exact import at_least_f32
from lmjax.runs.config import Config
from lmjax.runs.resolved import Phase, phase_of
from lmjax.runs.state import TrainState, abstract_state, optimizer_of
from lmjax.telemetry import measure

PARTS = ("reduction", "loss_scale", "optimizer", "measuring", "metrics")
"""Named scopes of what a step computes outside the model; sites name everything else."""

Batch = dict[str, jax.Array]
Metrics = dict[str, jax.Array]
TrainStep = Callable[[TrainState, Batch], tuple[TrainState, Metrics]]
EvalStep = Callable[[Any, Batch], tuple[jax.Array, jax.Array]]


def make_train_step(
    config: Config | Phase, mesh: Any = None, *, telemetry: bool = False
) -> jax.stages.Wrapped:
    """The compiled train step of a run.

    Args:
      config: the run, whose policy must have one phase, or a phase of it.
      mesh: where it runs; by default the config's mesh on all devices. With an abstract mesh the
        step can be traced and lowered but not executed.
      telemetry: whether the step counts what rounding does to its tensors; see `telemetry.py`.

    Returns:
      `step(state, batch) -> state, metrics`. It donates the state it is given. A batch holds
      `inputs` and `targets`, `int32[batch_size, context]`, and with `data.document_mask` also
      `document_starts`, from `lmjax.data.document_starts`. Metrics are f32[] arrays: `loss` in nats
      per token (with the z-loss, if any), `grad_norm` before clipping, `learning_rate` and
      `loss_scale` as this step used them, `skipped_steps` in all and `consecutive_skips`; and with
      telemetry `telemetry`, a `Census` by site and role, and `updates`, an `UpdateCensus` by
      parameter.
    """
    phase = phase_of(config)
    mesh = sharding.make_mesh(phase.config.mesh) if mesh is None else mesh
    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract_state(phase, mesh))
    step = train_step(phase, mesh, telemetry=telemetry)
    return phase.config.reductions.jit(
        step, mesh, donate_argnums=0, out_shardings=(shardings, None)
    )


def train_step(phase: Phase, mesh: Any, *, telemetry: bool = False) -> TrainStep:
    """The step before compilation; see `make_train_step`."""
    config, sites, stack = phase.config, phase.param_sites, phase.layout.stack
    optimizer = optimizer_of(phase)
    schedule = learning_rate_schedule(config.optimizer, config.steps)
    slots = slots_of(phase, telemetry)
    gradient = make_gradient(phase, mesh)

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        """One optimizer step on `int32[batch_size, context]` inputs and targets."""
        scale = loss_scale.current(state.opt_state, config.loss_scale.kind)
        factors = measure.factors(state.scaling, scale, stack)
        step_key = jax.random.fold_in(jax.random.wrap_key_data(state.key), state.step)

        def of_part(index: jax.Array, micro_batch: Batch) -> tuple[Any, measure.Tree, jax.Array]:
            key = jax.random.fold_in(step_key, index)
            (scaled, measured), loss = gradient(
                state.params, micro_batch, key, scale, slots, factors
            )
            return loss_scale.unscale(scaled, scale, stack), measured, loss

        gradients, measured, loss = _over_micro_batches(of_part, batch, config.micro_batches)
        gradients = config.reductions.gathered(gradients, mesh)
        cotangents = measure.cotangent_spread(measured, scale, stack)
        key = jax.random.fold_in(step_key, config.micro_batches)

        def stored(updates: Any) -> tuple[Any, Any]:
            return apply_updates(state.params, updates, state.residuals, sites, key)

        with jax.named_scope("optimizer"):
            update = functools.partial(
                optimizer.update, gradients, state.opt_state, state.params, cotangents=cotangents
            )
            kept = state.params, state.residuals
            (params, residuals), opt_state = update(take=stored, kept=kept)
            norm = config.reductions.norm(gradients).value
        with jax.named_scope("metrics"):
            metrics = {
                "loss": loss,
                "grad_norm": norm,
                "learning_rate": schedule(state.step - state.opt_state.skipped_steps),
                **loss_scale.metrics(scale, opt_state),
            }
        scaling = measure.updated_scaling(state.scaling, measured, scale, phase.layout, phase.sites)
        skipped = opt_state.consecutive_skips > 0
        scaling = jax.tree.map(
            lambda old, new: jnp.where(skipped, old, new), state.scaling, scaling
        )
        if telemetry:
            metrics["telemetry"] = measure.census(measured)
            # Apart, so that the step itself is compiled as it is without telemetry.
            metrics["updates"] = update_census(state.params, params, update()[0], sites, stack)
        new_state = TrainState(state.step + 1, params, opt_state, residuals, scaling, state.key)
        return new_state, metrics

    return sharding.traced_for(mesh, step)


def slots_of(phase: Phase, telemetry: bool) -> measure.Tree:
    """What a step of a run measures; with telemetry, a watched one."""
    return measure.slots(
        phase.layout,
        phase.sites,
        predictive=phase.config.loss_scale.kind == "predictive",
        telemetry=phase.config.telemetry if telemetry else None,
    )


def make_gradient(phase: Phase, mesh: Any) -> Gradient:
    """The gradient of the scaled loss and what its slots measured, together with the loss."""

    def of_loss(constrain: Constrain) -> Gradient:
        scaled_loss = make_scaled_loss(phase, mesh, constrain=constrain)
        return jax.grad(scaled_loss, argnums=(0, 4), has_aux=True)

    return phase.config.reductions.gradient(of_loss, phase.param_sites, mesh)


def make_scaled_loss(
    phase: Phase, mesh: Any, *, constrain: Constrain | None = None
) -> Callable[..., tuple[jax.Array, jax.Array]]:
    """The loss of a micro-batch times the loss scale, together with the loss itself.

    Traced under strict dtype promotion: an accidental upcast is an error here, not a slower run.
    """
    config, sites, objective = phase.config, phase.sites, objective_of(phase.config.model)
    random = config.model.dropout > 0 or any(site.stochastic for site in sites.values())
    placed = constrain or sharding.Placement(mesh)

    def scaled_loss(
        params: Any,
        batch: Batch,
        key: jax.Array,
        scale: jax.Array,
        slots: measure.Tree | None = None,
        factors: measure.Tree | None = None,
    ) -> tuple[jax.Array, jax.Array]:
        """`(loss * scale, loss)` in nats per token, f32[] each (f64[] where the loss is f64)."""
        context = Context(key if random else None, factors, slots)
        with jax.numpy_dtype_promotion("strict"):
            model = assembled(params, config.model)
            posed = objective.posed(batch, key)
            x = model.trunk(
                _documented(config, posed),
                sites=sites,
                context=context,
                cotangent_scales=scale if config.loss_scale.per_block else None,
                constrain=placed,
            )
            with jax.named_scope("loss_scale"):
                factor = loss_scale.of_the_loss(scale)
                if config.loss_multiplier != 1:
                    factor = factor * jnp.asarray(config.loss_multiplier, factor.dtype)
            backward = Backward(factor, config.loss_multiplier, placed)
            loss = objective.loss(x, model, posed, sites, context, backward)
            loss = loss.astype(at_least_f32(loss.dtype))
            with jax.named_scope("loss_scale"):
                return loss * factor.astype(loss.dtype), loss

    return scaled_loss


def _documented(config: Config, batch: Mapping[str, jax.Array]) -> Mapping[str, jax.Array]:
    """A batch as the trunk reads it: it says where documents start just if there is a mask."""
    if not config.data.document_mask:
        return {name: rows for name, rows in batch.items() if name != "document_starts"}
    if "document_starts" not in batch:
        raise ValueError(
            "data.document_mask is on, but the batch does not say where documents start; add "
            "document_starts=lmjax.data.document_starts(inputs, end_of_document)"
        )
    return batch


def _over_micro_batches(
    of_part: Callable[[jax.Array, Batch], tuple[Any, measure.Tree, jax.Array]],
    batch: Batch,
    count: int,
) -> tuple[Any, measure.Tree, jax.Array]:
    """Over the parts of a batch: gradients averaged in f32, what was measured, and the mean loss.

    An infinity or a NaN of one part survives the sum, so testing the sum tests every part.
    """
    first = jnp.zeros((), jnp.int32)
    if count == 1:
        return of_part(first, batch)
    # Strided parts keep every device's rows on that device, wherever the batch is cut.
    parts = jax.tree.map(
        lambda rows: rows.reshape(-1, count, *rows.shape[1:]).swapaxes(0, 1), batch
    )

    def add(total: Any, part: Any) -> tuple[Any, jax.Array]:
        gradients, measured, loss = of_part(*part)
        with jax.named_scope("reduction"):
            summed = jax.tree.map(lambda t, g: t + g / count, total[0], gradients)
        return (summed, probes.combine(total[1], measured)), loss

    example = jax.eval_shape(of_part, first, jax.tree.map(lambda rows: rows[0], parts))
    empty = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), example[:2])
    indices = jnp.arange(count, dtype=jnp.int32)
    (gradients, measured), losses = jax.lax.scan(add, empty, (indices, parts))
    return gradients, measured, jnp.mean(losses)


def evaluated(params: Params, scaling: measure.Tree, phase: Phase) -> Params | Calibrated:
    """What of a state is evaluated: its parameters, `Calibrated` where factors belong to them."""
    factors = measure.lasting_factors(scaling, phase.layout, phase.sites)
    return Calibrated(params, factors) if factors else params


def scaling_within(scaling: measure.Tree, own: Phase, other: Phase) -> measure.Tree:
    """The part of the state of scale factors of a phase that is valid in another one."""
    return measure.common_scaling(scaling, other.layout, own.sites, other.sites)


def make_eval_step(config: Config | Phase, mesh: Any = None) -> jax.stages.Wrapped:
    """The compiled evaluation of one batch.

    Returns:
      `step(params, batch) -> (nats, tokens)`, f32[] each: the summed cross entropy of the tokens
      that count and their number. A batch holds `inputs`, `targets` and `weights`, `[B, T]`, and
      with `data.document_mask` also `document_starts`. `params` may be `Calibrated`.
    """
    phase = phase_of(config)
    mesh = sharding.make_mesh(phase.config.mesh) if mesh is None else mesh
    return phase.config.reductions.jit(evaluation(phase, mesh), mesh)


def evaluation(phase: Phase, mesh: Any) -> EvalStep:
    """The evaluation of one batch before compilation; see `make_eval_step`."""
    config, sites = phase.config, phase.sites
    objective = objective_of(config.model)

    def of_part(constrain: Constrain) -> EvalStep:
        """The evaluation of a part of a batch, with activations placed by `constrain`."""

        def eval_step(params: Any, batch: Batch) -> tuple[jax.Array, jax.Array]:
            """Summed nats and number of what counts."""
            with jax.numpy_dtype_promotion("strict"):
                own, context = in_evaluation(params)
                model = assembled(own, config.model)
                posed = objective.posed(batch, None)
                x = model.trunk(
                    _documented(config, posed),
                    sites=sites,
                    context=context,
                    cotangent_scales=None,
                    constrain=constrain,
                )
                return objective.evaluate(x, model, posed, sites, context, constrain)

        return eval_step

    return sharding.traced_for(mesh, config.reductions.evaluation(of_part, mesh))
