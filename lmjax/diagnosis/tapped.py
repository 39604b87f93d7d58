"""The tensors of a step, taken out of it: what the twin and replay share.

Knows sites, losses and states; no files.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from lmjax.diagnosis.opened import OpenRun
from lmjax.model import site_tree
from lmjax.optim import loss_scale
from lmjax.parallel.sharding import Mesh
from lmjax.precision import paths
from lmjax.precision.probes import is_slot
from lmjax.precision.sites import Layout
from lmjax.precision.taps import Outline
from lmjax.runs.resolved import Phase, phase_of
from lmjax.telemetry import measure
from lmjax.train.step import make_scaled_loss

USER = "diagnosis"
"""Under which name slots are asked for."""

GRADIENTS = ("dy", "dx", "dw")
"""Roles that are computed backwards."""

Outlines = dict[str, jax.ShapeDtypeStruct]
"""Shapes and dtypes of tensors by site and role, such as `blocks/mlp/up/dx`, in the order of
computation; those of a stack have it as leading axis."""


def phase_under(phase: Phase, precision: str) -> Phase:
    """A phase under another policy, with the kind of loss scaling that it has."""
    return phase_of(dataclasses.replace(phase.config, precision=precision))


def step_inputs(run: OpenRun, places: Layout, part: int = 0) -> tuple[Any, ...]:
    """Parameters, random key, loss scale and factors of delayed scaling of a part of a batch.

    Factors are those of the policy whose state it is; others scale tensors by themselves.
    """
    scale = loss_scale.current(run.state.opt_state)
    key = jax.random.wrap_key_data(run.state.key)
    key = jax.random.fold_in(jax.random.fold_in(key, run.state.step), jnp.int32(part))
    factors = measure.factors(run.state.scaling, scale, places.stack)
    return run.state.params, key, scale, factors


def outline_of(phase: Phase, mesh: Mesh, params: Any, *inputs: Any) -> Outlines:
    """Shapes and dtypes of all tensors that can be tapped, in the order of computation."""
    found: dict[str, Any] = {}
    stack = phase.layout.stack
    noting = lambda place: {
        role: {USER: Outline(found, f"{place.path}/{role}")} for role in place.site.taps
    }
    slots = site_tree(phase.layout, noting)
    # Abstractly, so that nothing of it is in the program.
    gradient = jax.grad(make_scaled_loss(phase, mesh), has_aux=True)
    jax.eval_shape(gradient, params, *inputs, slots, {})
    sizes = {path: (stack.size,) * stack.holds(path) for path in found}
    # The head's gradients are computed with its loss.
    return {
        path: jax.ShapeDtypeStruct((*sizes[path], *found[path].shape), found[path].dtype)
        for path in sorted(found, key=is_value, reverse=True)
    }


def tapped(
    phase: Phase, mesh: Mesh, slots: Mapping[str, Any], params: Any, *inputs: Any
) -> tuple[Any, dict[str, Any], jax.Array]:
    """Takes the gradient of the scaled loss with one slot for each of some tensors.

    Args:
      phase: formats and loss scaling.
      mesh: where.
      slots: by path of the tensor; those of a stack have it as leading axis.
      params: the parameters.
      inputs: micro-batch, key, loss scale, and factors of delayed scaling.

    Returns:
      The gradients of the parameters, what the slots took, and the loss.
    """
    *given, factors = inputs
    nested = paths.unflatten({f"{path}/{USER}": slot for path, slot in slots.items()})
    gradient = jax.grad(make_scaled_loss(phase, mesh), argnums=(0, 4), has_aux=True)
    (gradients, measured), loss = gradient(params, *given, nested, factors)
    flat = paths.flatten(measured, is_slot)
    return gradients, {path.removesuffix(f"/{USER}"): slot for path, slot in flat.items()}, loss


def in_order(tensors: list[str], places: Layout) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Paths with indices into a stack: its members follow each other, backwards for gradients."""
    run: list[str] = []
    for path, following in zip(tensors, [*tensors[1:], ""], strict=True):
        if not places.stack.holds(path):
            yield path, ()
            continue
        run.append(path)
        if places.stack.holds(following) and is_value(path) == is_value(following):
            continue
        members = range(places.stack.size)
        for index in members if is_value(path) else reversed(members):
            yield from ((one, (index,)) for one in run)
        run = []


def is_value(path: str) -> bool:
    """Whether a path names a value of the forward pass rather than a gradient."""
    return path.rpartition("/")[2] not in GRADIENTS
