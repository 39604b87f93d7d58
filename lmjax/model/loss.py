"""The loss of each token: its cross entropy, and its z-loss.

Knows JAX, backends, policies and probes.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from lmjax.model.parametrisation import IDENTITY, Parametrisation
from lmjax.model.sites import at_site, take, within_site
from lmjax.precision.asides import aside
from lmjax.precision.backend import this_backend
from lmjax.precision.policy import SitePolicy
from lmjax.precision.probes import Probe


class TokenLosses(NamedTuple):
    """Per token: `cross_entropy` in nats, and `z`, the squared log-partition; `[B, T]` each."""

    cross_entropy: jax.Array
    z: jax.Array


@at_site
def token_losses(
    logits: jax.Array,
    targets: jax.Array,
    site: SitePolicy,
    probe: Probe | None = None,
    *,
    scales: Parametrisation = IDENTITY,
    weight: float = 1.0,
) -> TokenLosses:
    """Negative log-probability of each target, and the z-loss term.

    Args:
      logits: `[B, T, V]`, in whatever format the head hands on.
      targets: `int32[B, T]`.
      site: formats of the site `loss`; everything here happens in its compute format.
      probe: slots for the logits' cotangent, `dx`.
      scales: the parametrisation of the model, which may scale cotangents.
      weight: what each loss is about to be multiplied by: 1 / (B * T) for their mean. Unit scaling
        divides it out of the cotangents.

    Returns:
      `-log softmax(logits)[target]` and `log(sum(exp(logits)))^2` (PaLM, Chowdhery et al. 2022,
      section 5).
    """
    logits = scales.logits(take(logits, site, probe))
    log_partition = jax.nn.logsumexp(logits, axis=-1)
    target_logits = _of_targets(logits, targets)
    losses = log_partition - target_logits, jnp.square(log_partition)
    return TokenLosses(*(scales.losses(x, weight) for x in losses))


def _of_targets(logits: jax.Array, targets: jax.Array) -> jax.Array:
    """The logits `[..., V]` of the targets `int32[...]`, `[...]`."""
    if this_backend().platform != "gpu":
        return _gathered(logits, targets)
    return _selected(logits.shape[-1], logits, targets)


def _gathered(logits: jax.Array, targets: jax.Array) -> jax.Array:
    return jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _selected(size: int, logits: jax.Array, targets: jax.Array) -> jax.Array:
    """The same of `size` logits, with a gradient that is no scatter.

    Before and after a scatter, XLA's GPU backend writes out the cotangents of all logits in f32;
    a selection becomes part of the kernel that computes them.
    """
    return _gathered(logits, targets)


def _selected_forward(
    size: int, logits: jax.Array, targets: jax.Array
) -> tuple[jax.Array, jax.Array]:
    return _gathered(logits, targets), targets


def _selected_backward(size: int, targets: jax.Array, g: jax.Array) -> tuple[jax.Array, None]:
    indices = jax.lax.broadcasted_iota(targets.dtype, (*targets.shape, size), targets.ndim)
    return jnp.where(indices == targets[..., None], g[..., None], jnp.zeros((), g.dtype)), None


_selected.defvjp(_selected_forward, _selected_backward)


@at_site
def mean_handed_on(mean: jax.Array, site: SitePolicy, probe: Probe | None) -> jax.Array:
    """The mean loss in the compute format of the site `loss`, which a probe taps as `y`."""
    with aside("mean"):
        mean = site.to_compute(mean)
    return within_site(mean, site, probe, "y")


def log_probabilities(logits: jax.Array, targets: jax.Array, site: SitePolicy) -> jax.Array:
    """`[B, T]`: log-probability of each target in nats, in the compute format of site `loss`."""
    return -token_losses(logits, targets, site).cross_entropy
