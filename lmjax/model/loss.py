"""The training objective: next-token cross entropy with an optional z-loss.

Knows JAX, policies and probes.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from lmjax.model import unit_scaling
from lmjax.model.sites import at_site, take
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
    unit_weight: float | None = None,
) -> TokenLosses:
    """Negative log-probability of each target, and the z-loss term.

    Args:
      logits: `[B, T, V]`, in whatever format the head hands on.
      targets: `int32[B, T]`.
      site: formats of the site `loss`; everything here happens in its compute format.
      probe: slots for the logits' cotangent, `dx`.
      unit_weight: of a unit-scaled model, what each loss is about to be multiplied by: 1 / (B * T)
        for their mean. It is divided out of the cotangents, which start at unit variance.

    Returns:
      `-log softmax(logits)[target]` and `log(sum(exp(logits)))^2` (PaLM, Chowdhery et al. 2022,
      section 5).
    """
    logits = take(logits, site, probe)
    if unit_weight is not None:
        logits = unit_scaling.unit_logits(logits)
    log_partition = jax.nn.logsumexp(logits, axis=-1)
    target_logits = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    losses = TokenLosses(log_partition - target_logits, jnp.square(log_partition))
    if unit_weight is not None:
        losses = TokenLosses(*(unit_scaling.unit_cotangent(x, unit_weight) for x in losses))
    return losses


def log_probabilities(logits: jax.Array, targets: jax.Array, site: SitePolicy) -> jax.Array:
    """`[B, T]`: log-probability of each target in nats, in the compute format of site `loss`."""
    return -token_losses(logits, targets, site).cross_entropy
