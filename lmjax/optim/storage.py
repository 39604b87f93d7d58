"""Stores parameters and moments in narrow formats while all arithmetic is f32.

Parameters: `apply_updates` adds an f32 update to a stored parameter and rounds once, to nearest,
stochastically, or with Kahan compensation. Moments: `with_stored_moments` lets any optax optimizer
see f32 moments and keeps them as the policy says between steps. `convert_params` and
`convert_moments` carry both over into the formats of another policy.

Knows JAX, optax and what a policy says of a parameter.
"""

from __future__ import annotations

import functools
import zlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from lmjax.precision import paths
from lmjax.precision.bits import floor_log2, join, split, unsigned, widen
from lmjax.precision.exact import at_least_f32
from lmjax.precision.policy import SitePolicy, carrier
from lmjax.precision.quantizer import Quantizer
from lmjax.precision.rounding import ldexp, quantize
from lmjax.precision.scaling import Quantized
from lmjax.precision.sites import Stack
from lmjax.precision.squares import root_sum_square
from lmjax.precision.stored import decode, encode

ParamSites = Mapping[str, SitePolicy]
"""The formats of each parameter, by its path."""


def initial_residuals(params: Any, sites: ParamSites) -> dict[str, Any]:
    """Zeros, in the stored format, for each parameter whose updates are Kahan-compensated."""
    return paths.unflatten(
        {
            path: jnp.zeros_like(param)
            for path, param in paths.flatten(params).items()
            if sites[path].update == "kahan"
        }
    )


def apply_updates(
    params: Any, updates: Any, residuals: Any, sites: ParamSites, key: jax.Array
) -> tuple[Any, Any]:
    """Parameters plus updates: added in f32, rounded once to the stored format.

    Args:
      params: stored parameters.
      updates: f32, a tree of the same structure.
      residuals: what earlier roundings lost, for compensated parameters.
      sites: how each parameter is stored.
      key: random key of this step, for stochastic rounding.

    Returns:
      New parameters and new residuals. With Kahan compensation, y = update + residual,
      p' = round(p + y), residual' = round(y - (p' - p)) (Zamirai et al. 2020, algorithm 3).
    """
    kept = paths.flatten(residuals)
    flat_params, flat_updates = paths.flatten(params), paths.flatten(updates)
    for path, param in flat_params.items():
        site, update = sites[path], flat_updates[path]
        wide = param.astype(update.dtype)
        if site.update == "kahan":
            update = update + kept[path].astype(update.dtype)
        new = _stored(wide + update, site, jax.random.fold_in(key, zlib.crc32(path.encode())))
        if site.update == "kahan":
            kept[path] = _stored(update - (new.astype(update.dtype) - wide), site, None)
        flat_params[path] = new
    return paths.unflatten(flat_params), paths.unflatten(kept)


class UpdateCensus(NamedTuple):
    """The effect of an update on a parameter; f32 arrays, `[]` or `[blocks]`.

    Attributes:
      size: elements.
      unchanged: elements that are the same number as before.
      lost: elements whose update is not 0, but less than half a unit in the last place of the
        element in its stored format.
      update_norm, param_norm: roots of sums of squares, of what was added and of what it was added
        to.
    """

    size: jax.Array
    unchanged: jax.Array
    lost: jax.Array
    update_norm: jax.Array
    param_norm: jax.Array


@jax.named_scope("measuring")
def update_census(
    old: Any, new: Any, updates: Any, sites: ParamSites, stack: Stack | None = None
) -> dict[str, UpdateCensus]:
    """Counts what a step did to each parameter, by path.

    Args:
      old, new: stored parameters before and after.
      updates: what the optimizer asked for, f32.
      sites: how each parameter is stored.
      stack: parameters with a leading axis of blocks, which are counted singly.
    """
    flat_new, flat_updates = paths.flatten(new), paths.flatten(updates)
    census = {}
    for path, before in paths.flatten(old).items():
        after, update = flat_new[path], flat_updates[path]
        wide = before.astype(update.dtype)
        singly = stack is not None and stack.holds(path)
        axes = tuple(range(int(singly), before.ndim))
        total = functools.partial(jnp.sum, axis=axes, dtype=jnp.float32)
        number_format = sites[path].params
        exponent = jnp.maximum(floor_log2(wide), np.int32(number_format.smallest_exponent))
        half_ulp = ldexp(
            jnp.ones(wide.shape, jnp.float32), exponent - np.int32(number_format.mantissa_bits + 1)
        )
        census[path] = UpdateCensus(
            size=total(jnp.ones(wide.shape, jnp.float32)),
            unchanged=total(before == after),
            lost=total((update != 0) & (jnp.abs(update) < half_ulp.astype(update.dtype))),
            update_norm=root_sum_square(update, axes),
            param_norm=root_sum_square(wide, axes),
        )
    return census


def _stored(value: jax.Array, site: SitePolicy, key: jax.Array | None) -> jax.Array:
    if site.update == "sr" and key is not None:
        # Too large a value becomes what rounding to nearest would make of it.
        value = quantize(value, site.params, "stochastic", key, "clamp")
    return site.to_params(value)


def convert_params(
    params: Any, residuals: Any, old: ParamSites, new: ParamSites
) -> tuple[Any, Any]:
    """Parameters and residuals as another policy stores them.

    The exact value of a parameter is itself plus its residual, if it has one. This sum is rounded
    once to the new format, always to nearest, because no update can be lost here. A new residual
    holds the rounding error.

    Args:
      params: parameters as stored under `old`.
      residuals: what compensated ones have lost to rounding under `old`.
      old: how each parameter has been stored.
      new: how it is stored from now on.

    Returns:
      Parameters and residuals as stored under `new`; the same arrays where nothing changes.
    """
    flat, kept = paths.flatten(params), paths.flatten(residuals)
    for path, param in flat.items():
        site, compensated = new[path], new[path].update == "kahan"
        if site.params == old[path].params and compensated == (path in kept):
            continue
        total, rest = _exact_sum(param, kept.pop(path, None), site)
        flat[path] = _rounded_sum(total, rest, site)
        if compensated:
            kept[path] = site.to_params(total - flat[path].astype(total.dtype) + rest)
    return paths.unflatten(flat), paths.unflatten(kept)


def _exact_sum(
    param: jax.Array, residual: jax.Array | None, site: SitePolicy
) -> tuple[jax.Array, jax.Array]:
    """Their sum and its rounding error, in at least f32 and no less than the new format needs.

    The error of a sum is itself a number: TwoSum (Knuth, The Art of Computer Programming, volume 2,
    section 4.2.2, theorem B).
    """
    dtype = jnp.promote_types(at_least_f32(param.dtype), carrier(site.params))
    x = widen(param).astype(dtype)
    if residual is None:
        return x, jnp.zeros_like(x)
    y = widen(residual).astype(dtype)
    total = x + y
    y_seen = total - x
    return total, (x - (total - y_seen)) + (y - y_seen)


def _rounded_sum(total: jax.Array, rest: jax.Array, site: SitePolicy) -> jax.Array:
    """`total + rest`, rounded once to the stored format.

    Rounded in two steps, a sum can come out on the wrong side of a tie. It does not if the first
    step rounds to odd and keeps two more bits than the second (Boldo and Melquiond 2008, "Emulation
    of a FMA and correctly rounded sums", theorem 2).
    """
    work, sign, magnitude = split(total)
    if site.params.mantissa_bits + 2 <= work.mantissa_bits:
        one = unsigned(work)(1)
        odd = jnp.where((rest > 0) == (total > 0), magnitude + one, magnitude - one)
        inexact = (rest != 0) & jnp.isfinite(rest) & (magnitude & one == 0)
        total = join(sign, jnp.where(inexact, odd, magnitude), total.dtype)
    return site.to_params(quantize(total, site.params, overflow="clamp"))


def with_stored_moments(
    inner: optax.GradientTransformation, sites: ParamSites
) -> optax.GradientTransformation:
    """Keeps the moments of an optimizer in the formats of the policy between steps.

    The optimizer computes in f32: it reads the widened moments, and its updates come from moments
    that are not rounded yet; only the moments stored for the next step are rounded.

    Args:
      inner: an optimizer whose states name their moments `mu` and `nu`, as optax's do.
      sites: how the moments of each parameter are stored.
    """

    def init(params: optax.Params) -> Any:
        return _map_moments(_encode, inner.init(params), sites)

    def update(gradients: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        updates, state = inner.update(gradients, _map_moments(decode, state, sites), params)
        return updates, _map_moments(_encode, state, sites)

    return optax.GradientTransformation(init, update)


def convert_moments(state: Any, old: ParamSites, new: ParamSites) -> Any:
    """An optimizer state with its moments as another policy stores them.

    Args:
      state: an optimizer state, anywhere in which there may be moments stored under `old`.
      old: how the moments of each parameter have been stored.
      new: how they are stored from now on.

    Returns:
      The state with moments converted where their format changes; the rest is unchanged.
    """

    def convert(stored: Any, before: Quantizer, after: Quantizer) -> Any:
        return stored if before == after else _encode(decode(stored, before), after)

    return _map_moments(convert, state, old, new)


def _map_moments(change: Callable[..., Any], state: Any, *sites: ParamSites) -> Any:
    """Applies `change` to every moment anywhere in an optimizer state and to its quantizers."""

    def one(node: Any) -> Any:
        if not hasattr(node, "mu"):
            return node
        moments = {name: getattr(node, name) for name in ("mu", "nu") if hasattr(node, name)}
        return node._replace(
            **{name: _map_tree(change, tree, name, *sites) for name, tree in moments.items()}
        )

    return jax.tree.map(one, state, is_leaf=lambda node: hasattr(node, "mu"))


def _map_tree(change: Callable[..., Any], tree: Any, moment: str, *sites: ParamSites) -> Any:
    def one(keys: Any, leaf: Any) -> Any:
        path = paths.path_string(keys)
        return change(leaf, *(getattr(by_path[path], moment) for by_path in sites))

    return jax.tree_util.tree_map_with_path(
        one, tree, is_leaf=lambda node: isinstance(node, Quantized)
    )


def _encode(moment: jax.Array, quantizer: Quantizer) -> Any:
    # A moment beyond the format is a failure to be seen, which a clamp would hide.
    return encode(moment, quantizer, overflow="fail")
