"""Objectives: what a model is trained for, and evaluated by; see `assembly.Objective`.

Knows JAX and policies.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from lmjax.model.assembly import Assembly, Batch
from lmjax.model.loss import token_losses
from lmjax.model.parametrisation import Parametrisation
from lmjax.model.sites import Context, Sites
from lmjax.precision.exact import at_least_f32


@dataclass(frozen=True)
class NextToken:
    """Cross entropy of the next token, and a z-loss.

    A batch holds `targets`, `int32[B, T]`, and in evaluation `weights`, `[B, T]`.

    Attributes:
      scales: the parametrisation of the model.
      z_loss: weight of the squared log-partition (PaLM, Chowdhery et al. 2022, section 5).
    """

    scales: Parametrisation
    z_loss: float

    def loss(
        self,
        x: jax.Array,
        model: Assembly,
        batch: Batch,
        sites: Sites,
        context: Context,
        multiplier: float,
    ) -> jax.Array:
        """See `Objective`."""
        targets = batch["targets"]
        losses = token_losses(
            model.logits(x, sites, context),
            targets,
            sites["loss"],
            context.at("loss").probe,
            scales=self.scales,
            weight=multiplier / targets.size,
        )
        loss = jnp.mean(losses.cross_entropy)
        if self.z_loss:  # 0 times a square that overflowed would be NaN
            loss = loss + self.z_loss * jnp.mean(losses.z)
        return loss

    def evaluate(
        self, x: jax.Array, model: Assembly, batch: Batch, sites: Sites, context: Context
    ) -> tuple[jax.Array, jax.Array]:
        """See `Objective`; what counts are tokens, and the z-loss does not."""
        logits = model.logits(x, sites, context)
        nats = token_losses(logits, batch["targets"], sites["loss"]).cross_entropy
        nats = nats.astype(at_least_f32(nats.dtype))
        weights = batch["weights"].astype(nats.dtype)
        # Padding does not count, whatever is computed of it: NaN times 0 would be NaN.
        counted = jnp.where(weights > 0, nats * weights, jnp.zeros_like(nats))
        return jnp.sum(counted), jnp.sum(weights)
