"""Objectives: what a model is trained for, and evaluated by; see `assembly.Objective`.

Knows JAX and policies.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from lmjax.model.assembly import Assembly, Batch, Objective
from lmjax.model.head import Backward, mean_loss, token_nats
from lmjax.model.layers import ANYWHERE, Constrain
from lmjax.model.loss import mean_handed_on, token_losses
from lmjax.model.parametrisation import Parametrisation
from lmjax.model.sites import Context, Sites
from lmjax.precision.asides import aside
from lmjax.precision.exact import at_least_f32


@dataclass(frozen=True)
class NextToken(Objective):
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
        backward: Backward,
    ) -> jax.Array:
        """See `Objective`."""
        x, head = model.readout(x, sites, context)
        options: dict[str, Any] = {"scales": self.scales, "z_loss": self.z_loss}
        return mean_loss(x, head, batch["targets"], sites, context, backward=backward, **options)

    def evaluate(
        self,
        x: jax.Array,
        model: Assembly,
        batch: Batch,
        sites: Sites,
        context: Context,
        constrain: Constrain = ANYWHERE,
    ) -> tuple[jax.Array, jax.Array]:
        """See `Objective`; what counts are tokens, and the z-loss does not."""
        x, head = model.readout(x, sites, context)
        nats = token_nats(x, head, batch["targets"], sites, context, constrain)
        return counted(nats, batch["weights"], sites)


@dataclass(frozen=True)
class TextClass(Objective):
    """Cross entropy of the class of each text.

    A batch holds `classes`, `int32[B]`, and in evaluation `weights`, `[B]`.

    Attributes:
      scales: the parametrisation of the model.
    """

    scales: Parametrisation

    reads: ClassVar[tuple[str, ...]] = ("inputs", "classes")

    def loss(
        self,
        x: jax.Array,
        model: Assembly,
        batch: Batch,
        sites: Sites,
        context: Context,
        backward: Backward,
    ) -> jax.Array:
        """See `Objective`."""
        classes, probe = batch["classes"][:, None], context.at("loss").probe
        losses = token_losses(
            model.logits(x, sites, context),
            classes,
            sites["loss"],
            probe,
            scales=self.scales,
            weight=backward.multiplier / classes.size,
        )
        return mean_handed_on(jnp.mean(losses.cross_entropy), sites["loss"], probe)

    def evaluate(
        self,
        x: jax.Array,
        model: Assembly,
        batch: Batch,
        sites: Sites,
        context: Context,
        constrain: Constrain = ANYWHERE,
    ) -> tuple[jax.Array, jax.Array]:
        """See `Objective`; what counts are texts."""
        logits = model.logits(x, sites, context)
        nats = token_losses(logits, batch["classes"][:, None], sites["loss"]).cross_entropy
        return counted(nats, batch["weights"][:, None], sites)


def counted(nats: jax.Array, weights: jax.Array, sites: Sites) -> tuple[jax.Array, jax.Array]:
    """The weighted sum of losses, and the sum of their weights, at least f32[] each."""
    with sites["loss"].scope, aside("total"):
        nats = nats.astype(at_least_f32(nats.dtype))
        weights = weights.astype(nats.dtype)
        # Padding does not count, whatever is computed of it: NaN times 0 would be NaN.
        kept = jnp.where(weights > 0, nats * weights, jnp.zeros_like(nats))
        return jnp.sum(kept), jnp.sum(weights)
