"""The loss of each token: its cross entropy, and its z-loss.

Knows JAX, policies and probes.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from lmjax.model.parametrisation import IDENTITY, Parametrisation
from lmjax.model.sites import at_site, take, within_site
from lmjax.precision.asides import aside
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
    target_logits = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    losses = log_partition - target_logits, jnp.square(log_partition)
    return TokenLosses(*(scales.losses(x, weight) for x in losses))


@at_site
def mean_handed_on(mean: jax.Array, site: SitePolicy, probe: Probe | None) -> jax.Array:
    """The mean loss in the compute format of the site `loss`, which a probe taps as `y`."""
    with aside("mean"):
        mean = site.to_compute(mean)
    return within_site(mean, site, probe, "y")


def log_probabilities(logits: jax.Array, targets: jax.Array, site: SitePolicy) -> jax.Array:
    """`[B, T]`: log-probability of each target in nats, in the compute format of site `loss`."""
    return -token_losses(logits, targets, site).cross_entropy
