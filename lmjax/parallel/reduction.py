"""Sums gradients over devices in the format that the policy names (its key `r`).

In f32 there is nothing to do: XLA's partitioner cuts each weight gradient, a product that sums over
the batch, into one product per device and a sum over devices, before the product is rounded. Any
other format needs the devices' own gradients first. These are the gradients of parts of the batch,
one part for each device that holds one, so `r` has no effect on a single device.

The cost: each device holds its own gradient of every parameter, whole, until they are summed.

With `deterministic_reductions` that field sets the number of parts, wherever they live, and they
are summed in an order that depends only on their number: `ordered_gradient`.

Knows JAX, the mesh through `sharding`, and a parameter's policy.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from lmjax.parallel import sharding
from lmjax.precision import paths, probes
from lmjax.precision.exact import at_least_f32
from lmjax.precision.policy import F32, NATIVE, SitePolicy, carrier
from lmjax.precision.rounding import quantize

Gradient = Callable[..., tuple[tuple[Any, Any], jax.Array]]
"""`(params, batch, key, scale, slots, factors) -> (gradients, measured), loss`."""


def reduces_narrow(sites: Mapping[str, SitePolicy], mesh: Any) -> bool:
    """Whether gradients are summed over devices in a format other than f32."""
    return sharding.batch_parts(mesh) > 1 and any(site.reduce != F32 for site in sites.values())


def reduced_gradient(gradient: Gradient, sites: Mapping[str, SitePolicy], mesh: Any) -> Gradient:
    """Computes the gradient of a whole batch from the gradients of its parts.

    Args:
      gradient: of one part, whose activations are pinned by `sharding.constrain_part`.
      sites: the site of each parameter.
      mesh: where the parts live.

    Returns:
      A function with the arguments of `gradient`. Each gradient is divided by the number of parts
      and rounded to its format, and so is each sum.
    """
    parts = sharding.batch_parts(mesh)
    each = sharding.each_part(mesh, gradient, (None, 0, 0, None, None, None))

    def whole(
        params: Any, batch: Any, key: jax.Array, scale: jax.Array, slots: Any, factors: Any
    ) -> tuple[tuple[Any, Any], jax.Array]:
        # The rows of one device are adjacent, so this moves nothing.
        cut = jax.tree.map(lambda rows: rows.reshape(parts, -1, *rows.shape[1:]), batch)
        keys = jax.random.split(key, parts)
        (gradients, measured), losses = each(params, cut, keys, scale, slots, factors)
        summed = {
            path: _sum(gradient, parts, sites[path])
            for path, gradient in paths.flatten(gradients).items()
        }
        first, *others = (jax.tree.map(lambda m, i=i: m[i], measured) for i in range(parts))
        together = functools.reduce(probes.combine, others, first)
        return (paths.unflatten(summed), together), jnp.mean(losses)

    return whole


def ordered_gradient(
    gradient: Gradient, sites: Mapping[str, SitePolicy], mesh: Any, parts: int
) -> Gradient:
    """Like `reduced_gradient`, but bit-identical on every mesh that `sharding.in_order` accepts.

    This holds as far as the parts themselves are bit-identical; see `exact.ORDER_OPTIONS`.

    Args:
      gradient: of one part, with unpinned activations.
      sites: the site of each parameter.
      mesh: where the parts live.
      parts: their number, independent of the number of devices.
    """

    def of_part(
        index: jax.Array, rows: Any, params: Any, key: Any, scale: Any, slots: Any, factors: Any
    ) -> tuple[Any, Any, jax.Array]:
        """The contribution of one part: gradients with their measurements, and loss."""
        key = jax.random.fold_in(key, index)
        (gradients, measured), loss = gradient(params, rows, key, scale, slots, factors)
        shares = {
            path: _rounded(g.astype(at_least_f32(g.dtype)) / parts, sites[path])
            for path, g in paths.flatten(gradients).items()
        }
        return shares, measured, loss / parts

    def combine(one: tuple[Any, Any, jax.Array], other: tuple[Any, Any, jax.Array]) -> Any:
        summed = {path: _rounded(g + other[0][path], sites[path]) for path, g in one[0].items()}
        return summed, probes.combine(one[1], other[1]), one[2] + other[2]

    over_parts = sharding.in_order(mesh, parts, of_part, combine)

    def whole(
        params: Any, batch: Any, key: jax.Array, scale: jax.Array, slots: Any, factors: Any
    ) -> tuple[tuple[Any, Any], jax.Array]:
        gradients, measured, loss = over_parts(batch, params, key, scale, slots, factors)
        return (paths.unflatten(gradients), measured), loss

    return whole


@jax.named_scope("reduction")
def _rounded(gradient: jax.Array, site: SitePolicy) -> jax.Array:
    """Rounds a gradient to the site's `reduce` format, in an array no narrower than before."""
    if site.reduce == F32:
        return gradient
    return quantize(gradient, site.reduce, overflow="fail").astype(gradient.dtype)


@jax.named_scope("reduction")
def _sum(gradients: jax.Array, parts: int, site: SitePolicy) -> jax.Array:
    """Sums `[parts, ...]` in the site's `reduce` format, which is also the dtype of the result."""
    wide = gradients.astype(at_least_f32(gradients.dtype)) / parts
    dtype = jnp.dtype(carrier(site.reduce))
    if site.reduce.name in NATIVE:
        # Not `jnp.sum`, which would widen bf16 and f16 internally.
        return jax.lax.reduce(wide.astype(dtype), jnp.zeros((), dtype), jax.lax.add, (0,))
    rounded = quantize(wide, site.reduce, overflow="fail")
    return quantize(jnp.sum(rounded, axis=0), site.reduce, overflow="fail")
