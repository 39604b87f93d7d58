"""Measures a step's own tensors for delayed scaling, the loss scale and telemetry.

    delayed      maxima of operands     -> the histories in `TrainState.scaling`
    loss_scale   spread of cotangents   -> the forecast in the state of a predictive loss scale
    telemetry    a census of every site -> the metrics of watched steps

The measurements are gradients of the slots that `slots` lays out; see `precision/probes.py`. A
run that uses none of the three gets no slots, and so its program is unaffected by this module.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from lmjax.model import Sites, site_tree
from lmjax.precision import paths
from lmjax.precision.past import ScaleState, Slope, init_scale_state, update_scale_state
from lmjax.precision.policy import SitePolicy
from lmjax.precision.probes import Census, FullCensus, Maximum, Spread, is_slot
from lmjax.precision.quantizer import Quantizer
from lmjax.precision.sites import Layout, Place, Stack
from lmjax.telemetry.rows import TelemetryConfig, counted_roles

Tree = dict[str, Any]
"""Nested by the components of a site's path, then by role; sites in blocks are stacked."""


def initial_scaling(layout: Layout, sites: Sites) -> Tree:
    """Returns a fresh `ScaleState` for every operand whose factor follows from past steps."""

    def one(place: Place) -> dict[str, ScaleState] | None:
        """By role, for the delayed operands of a place."""
        quantizers = _following(place, sites)
        return {role: init_scale_state(q) for role, q in quantizers.items()} or None

    return site_tree(layout, one)


def carried_scaling(scaling: Tree, layout: Layout, old: Sites, new: Sites) -> Tree:
    """Converts the histories of one phase of a policy to those of the next.

    An operand with the same quantizer in both keeps its history; any other starts a fresh one.
    """
    kept = paths.flatten(scaling, _is_state)
    fresh = paths.flatten(initial_scaling(layout, new), _is_state)
    same = {
        path: kept[path]
        for path in fresh
        if path in kept and _quantizer(path, layout, old) == _quantizer(path, layout, new)
    }
    return paths.unflatten(fresh | same)


@jax.named_scope("measuring")
def factors(scaling: Tree, scale: jax.Array, stack: Stack) -> Tree:
    """Returns the scale factor of every operand with delayed scaling, at this loss scale.

    Histories hold maxima of unscaled cotangents, so that they remain valid when the loss scale
    changes; the factor is multiplied by the loss scale instead.
    """
    return paths.unflatten(
        {
            path: delayed.scale * _cotangent_scale(path, scale, stack)
            for path, delayed in paths.flatten(scaling, _is_state).items()
        }
    )


def lasting_factors(scaling: Tree, layout: Layout, sites: Sites) -> Tree:
    """The factors that evaluation uses too, as they are: observed and learned ones."""
    return paths.unflatten(
        {
            path: state.scale
            for path, state in paths.flatten(scaling, _is_state).items()
            if not path.endswith("/g")
            and any(q and q.way != "delayed" for q in _members(path, layout, sites))
        }
    )


def common_scaling(scaling: Tree, layout: Layout, old: Sites, new: Sites) -> Tree:
    """The part of a state that is valid under other formats, which may differ between blocks too.

    Those are the operands with the same quantizer, or with none that follows from past steps.
    """

    def valid(path: str) -> bool:
        after = _members(path, layout, new)
        pairs = zip(_members(path, layout, old), after, strict=True)
        return any(after) and all(q is None or q == before for before, q in pairs)

    flat = paths.flatten(scaling, _is_state)
    return paths.unflatten({path: state for path, state in flat.items() if valid(path)})


def slots(
    layout: Layout, sites: Sites, *, predictive: bool, telemetry: TelemetryConfig | None
) -> Tree:
    """Returns slots for everything that a step measures.

    Args:
      layout: the sites of the model.
      sites: their formats.
      predictive: whether the loss scale needs the spread of cotangents.
      telemetry: what a watched step counts; None for any other step.
    """

    def one(place: Place) -> dict[str, dict[str, Any]] | None:
        """By role and purpose, for what is measured at a place."""
        asked: dict[str, dict[str, Any]] = {}
        for role, quantizer in _following(place, sites).items():
            kind = Slope if quantizer.way == "learned" else Maximum
            asked.setdefault(role, {})["delayed"] = kind.empty()
        if predictive:
            for role in place.site.gradients:
                asked.setdefault(role, {})["loss_scale"] = Spread.empty()
        if telemetry is not None:
            counting = FullCensus if telemetry.exact else Census
            for role in counted_roles(telemetry, place):
                asked.setdefault(role, {})["telemetry"] = counting.empty()
        return asked or None

    return site_tree(layout, one)


@jax.named_scope("measuring")
def updated_scaling(
    scaling: Tree, measured: Tree, scale: jax.Array, layout: Layout, sites: Sites
) -> Tree:
    """Returns the histories updated with what a step measured."""
    maxima = _asked_by("delayed", measured)
    updated = {}
    for path, delayed in paths.flatten(scaling, _is_state).items():
        quantizer = _quantizer(path, layout, sites)
        maximum = maxima[path].maximum / _cotangent_scale(path, scale, layout.stack)
        update = lambda state, amax, *slope, q=quantizer: update_scale_state(state, amax, q, *slope)
        slope = []
        if isinstance(maxima[path], Slope):
            slope = [maxima[path].slope / _loss_scale(path, scale, layout.stack)]
        updated[path] = (jax.vmap(update) if maximum.ndim else update)(delayed, maximum, *slope)
    return paths.unflatten(updated)


@jax.named_scope("measuring")
def cotangent_spread(measured: Tree, scale: jax.Array, stack: Stack) -> Spread | None:
    """Returns the spread of a step's cotangents: a `Spread` with leading axes as in `scale`."""
    asked = _asked_by("loss_scale", measured)
    if not asked:
        return None
    inside = [spread for path, spread in asked.items() if stack.holds(path)]
    outside = [spread for path, spread in asked.items() if not stack.holds(path)]
    blocks, rest = _joined(inside), _joined(outside)
    everything = Spread(*(jnp.concatenate([b, r[None]]) for b, r in zip(blocks, rest, strict=True)))
    if scale.ndim:
        return everything
    return Spread(jnp.max(everything.maximum), jnp.sum(everything.histogram, axis=0))


@jax.named_scope("measuring")
def census(measured: Tree) -> dict[str, Census]:
    """Returns the telemetry measurements by site and role: `blocks/mlp/up/w`."""
    return _asked_by("telemetry", measured)


def _joined(spreads: list[Spread]) -> Spread:
    first, *others = spreads
    for other in others:
        first = first.combine(other)
    return first


def _asked_by(who: str, measured: Tree) -> dict[str, Any]:
    """The measurements for one of the three users, by site and role."""
    flat, end = paths.flatten(measured, is_slot), f"/{who}"
    return {path.removesuffix(end): slot for path, slot in flat.items() if path.endswith(end)}


def _following(place: Place, sites: Sites) -> dict[str, Quantizer]:
    """The quantizers of a site whose factors follow from past steps, by role.

    Raises:
      ValueError: blocks disagree.
    """
    found: dict[str, Quantizer] = {}
    if not place.site.is_product:
        return found
    for site in (sites[path] for path in place.paths):
        for role, quantizer in _of_site(site).items():
            if found.setdefault(role, quantizer) != quantizer:
                raise ValueError(
                    f"the histories of all blocks are one array, but {role} of {place} is "
                    f"{found[role]} in one block and {quantizer} in another; give every "
                    "block the same"
                )
    return found


def _of_site(site: SitePolicy) -> dict[str, Quantizer]:
    """The quantizers of a product whose factors follow from past steps, by role."""
    operands = {"w": site.second, "x": site.activations, "g": site.grads}
    return {
        role: operand.quantizer
        for role, operand in operands.items()
        if operand is not None and operand.quantizer.history
    }


def _members(path: str, layout: Layout, sites: Sites) -> list[Quantizer | None]:
    """The quantizer of an operand in each block, by its path in `TrainState.scaling`."""
    place, _, role = path.rpartition("/")
    return [_of_site(sites[member]).get(role) for member in layout.place(place).paths]


def _quantizer(path: str, layout: Layout, sites: Sites) -> Quantizer:
    """The delayed quantizer of an operand, by its path in `TrainState.scaling`."""
    site, _, role = path.rpartition("/")
    return _following(layout.place(site), sites)[role]


def _cotangent_scale(path: str, scale: jax.Array, stack: Stack) -> jax.Array:
    """The factor of the loss scale on the operand at `path`: only cotangents are scaled."""
    one = jnp.ones((), jnp.float32)
    return _loss_scale(path, scale, stack) if path.endswith("/g") else one


def _loss_scale(path: str, scale: jax.Array, stack: Stack) -> jax.Array:
    """The loss scale where a path is."""
    if not scale.ndim:
        return scale
    return scale[:-1] if stack.holds(path) else scale[-1]


def _is_state(node: Any) -> bool:
    return isinstance(node, ScaleState)
