"""Objectives: what a model is trained for, and evaluated by; see `assembly.Objective`.

Knows JAX and policies.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from lmjax.model.assembly import Assembly, Batch
from lmjax.model.head import Backward, mean_loss, token_nats
from lmjax.model.layers import ANYWHERE, Constrain
from lmjax.model.parametrisation import Parametrisation
from lmjax.model.sites import Context, Sites
from lmjax.precision.asides import aside
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
        with sites["loss"].scope, aside("total"):
            nats = nats.astype(at_least_f32(nats.dtype))
            weights = batch["weights"].astype(nats.dtype)
            # Padding does not count, whatever is computed of it: NaN times 0 would be NaN.
            counted = jnp.where(weights > 0, nats * weights, jnp.zeros_like(nats))
            return jnp.sum(counted), jnp.sum(weights)
