"""LayerNorm and RMSNorm of rows, with a gradient that keeps rows as they are stored.

    y = (s x - mean) root gamma + beta,   root = 1 / sqrt(mean_square + epsilon s^2)

with the mean only in LayerNorm, and s a power of two by which rows are multiplied where sums or
squares of their elements would leave the range of f32, which no normalised number feels. In f16,
where a rule asks for it, squares overflow beyond 255.

Autodiff keeps the normalised rows in f32, twice as large as rows in bf16. On GPUs, the backward
pass keeps rows and statistics, with n = (s x - mean) root (Ba, Kiros and Hinton 2016, section 3):

    dx = s root (dn - mean(dn) - n mean(n dn)),   dn = gamma dy,   dgamma = sum(n dy)

On CPUs, the last bits of a step would depend on whether telemetry measures it; on TPUs, neither
form has been timed.

Shapes: D width. Knows JAX, backends and policies.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from lmjax.precision.asides import aside
from lmjax.precision.backend import this_backend
from lmjax.precision.exact import at_least_f32
from lmjax.precision.policy import SitePolicy
from lmjax.precision.squares import scale_for_squares


class _Statistics(NamedTuple):
    """Of rows `[..., D]`, `[..., 1]` each: s, the mean in LayerNorm, and the root."""

    scale: jax.Array
    mean: jax.Array | None
    root: jax.Array


class _Form(NamedTuple):
    """What of a norm is known before it is traced; see `normalise`."""

    site: SitePolicy
    layer: bool
    epsilon: float


def normalise(
    x: jax.Array,
    gamma: jax.Array,
    beta: jax.Array | None,
    site: SitePolicy,
    *,
    layer: bool,
    epsilon: float,
) -> jax.Array:
    """Normalises rows in the compute format of a site, without rounding the result.

    Args:
      x: `[..., D]`, in any floating-point format; cast to the compute format.
      gamma: `[D]`, in the compute format.
      beta: the same, or None.
      site: the formats.
      layer: LayerNorm instead of RMSNorm.
      epsilon: what is added to the mean square.

    Returns:
      `[..., D]`, in the compute format.
    """
    form = _Form(site, layer, epsilon)
    normalised = _kept if this_backend().platform == "gpu" else _plain
    return normalised(form, x, gamma, beta)


def _normal(form: _Form, x: jax.Array) -> tuple[jax.Array, _Statistics]:
    """Rows without scale and bias, and their statistics."""
    x = form.site.to_compute(x)
    scale = _scale_of_rows(x, form.epsilon)
    x = x * scale
    mean = _mean(x) if form.layer else None
    if mean is not None:
        x = x - mean
    mean_square = _mean(jnp.square(x))
    total = mean_square + form.epsilon * scale * scale
    total = jnp.where(total > 0, total, jnp.ones_like(total))  # a row of equal numbers
    root = jax.lax.rsqrt(total)
    return x * root, _Statistics(scale, mean, root)


def _scaled(normal: jax.Array, gamma: jax.Array, beta: jax.Array | None) -> jax.Array:
    y = normal * gamma
    return y if beta is None else y + beta


def _plain(form: _Form, x: jax.Array, gamma: jax.Array, beta: jax.Array | None) -> jax.Array:
    return _scaled(_normal(form, x)[0], gamma, beta)


_kept = jax.custom_vjp(_plain, nondiff_argnums=(0,))


def _forward(
    form: _Form, x: jax.Array, gamma: jax.Array, beta: jax.Array | None
) -> tuple[jax.Array, Any]:
    normal, statistics = _normal(form, x)
    return _scaled(normal, gamma, beta), (x, gamma, beta, statistics)


def _backward(
    form: _Form, saved: Any, g: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    x, gamma, beta, (scale, mean, root) = saved
    with form.site.scope:
        # Else XLA would find that the normalised rows are known from the forward pass.
        x, scale, mean, root = jax.lax.optimization_barrier((x, scale, mean, root))
        wide, narrowed = jax.vjp(form.site.to_compute, x)
        centred = wide * scale
        normal = (centred if mean is None else centred - mean) * root
        rows = tuple(range(g.ndim - 1))
        dgamma = jnp.sum(g * normal, axis=rows).astype(gamma.dtype)
        dbeta = None if beta is None else jnp.sum(g, axis=rows).astype(beta.dtype)
        g = g * gamma
        dx = g - normal * _mean(g * normal)
        if form.layer:
            dx = dx - _mean(g)
        (dx,) = narrowed(dx * root * scale)
    return dx, dgamma, dbeta


_kept.defvjp(_forward, _backward)


def _mean(x: jax.Array) -> jax.Array:
    """Of each row `[..., D]`, `[..., 1]`; summed and divided in at least f32."""
    with aside("mean"):
        return jnp.mean(x, axis=-1, keepdims=True)


def _scale_of_rows(x: jax.Array, epsilon: float) -> jax.Array:
    """What rows `[..., D]` are multiplied by before they are squared, `[..., 1]`; no gradient."""
    if x.dtype == jnp.float16:  # as narrow as asked: half of the ordinary numbers would be scaled
        return jnp.ones((*x.shape[:-1], 1), x.dtype)
    with aside("range"):
        # Of floats, as in `squares.tree_root`: a NaN left out makes the row NaN all the same.
        magnitudes = jnp.abs(jax.lax.stop_gradient(x)).astype(at_least_f32(x.dtype))
        largest = jnp.max(magnitudes, axis=-1, keepdims=True)
        floor = jnp.asarray(math.sqrt(epsilon), largest.dtype)
        return scale_for_squares(jnp.maximum(largest, floor)).astype(x.dtype)
