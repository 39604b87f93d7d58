"""Masked tokens, predicted from all others (Devlin et al. 2019, section 3.1).

Of each row a fixed number of tokens is chosen, so that the head computes logits for these alone,
and the mean loss does not depend on how a batch is divided.

Knows JAX and policies.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Final

import jax
import jax.numpy as jnp
import numpy as np

from lmjax.model.assembly import Assembly, Batch, Objective
from lmjax.model.config import ModelConfig
from lmjax.model.head import Backward
from lmjax.model.layers import ANYWHERE, Constrain
from lmjax.model.loss import TokenLosses, mean_handed_on, token_losses
from lmjax.model.objectives import counted
from lmjax.model.parametrisation import Parametrisation
from lmjax.model.sites import Context, Sites

MASKED: Final = 0.8
"""The share of chosen tokens that are masked."""
RANDOM: Final = 0.1
"""The share that any token of the vocabulary replaces; the rest stays."""

OWN_KEY: Final = 0x6D61736B
"""Tells the random numbers of masks from those of dropout and of rounding."""


@dataclass(frozen=True)
class MaskedTokens(Objective):
    """Cross entropy of the tokens that were chosen, and a z-loss.

    A batch holds `inputs`, `int32[B, T]`, and in evaluation `weights`, `[B, T]`, which are 0 for
    padding at the end of a row. Both then have chosen N tokens of each row, see
    `ModelConfig.predicted`: in training by the key of the step; in evaluation by the tokens of the
    row themselves, so that the same text always has the same masks, however it is batched.

    Attributes:
      scales: the parametrisation of the model.
      config: the model.
    """

    scales: Parametrisation
    config: ModelConfig

    reads: ClassVar[tuple[str, ...]] = ("inputs",)

    def posed(self, batch: Batch, key: jax.Array | None) -> Batch:
        """See `Objective`: `inputs` with tokens masked.

        Beside them `chosen`, `int32[B, N]`, their positions; `targets`, `int32[B, N]`, the tokens
        that stood there; in evaluation `lengths`, and `weights`, f32[B, N], which are 0 where a
        row has too few tokens.
        """
        tokens = batch["inputs"]
        rows, length = tokens.shape
        with jax.named_scope("masking"):
            if key is not None:
                keys = jax.random.split(jax.random.fold_in(key, OWN_KEY), rows)
                lengths = jnp.full(rows, length, jnp.int32)
            else:
                keys = jax.vmap(_key_of)(tokens)
                lengths = jnp.sum(batch["weights"] > 0, axis=1, dtype=jnp.int32)
            shown, chosen, targets = jax.vmap(self._masked)(keys, tokens, lengths)
            posed = dict(batch) | {"inputs": shown, "chosen": chosen, "targets": targets}
            if key is None:
                wanted = jnp.round(self.config.mask_rate * lengths.astype(jnp.float32))
                wanted = jnp.clip(wanted.astype(jnp.int32), 1, jnp.maximum(lengths, 1))
                wanted = jnp.where(lengths > 0, wanted, 0)
                order = jnp.arange(chosen.shape[1], dtype=jnp.int32)
                weights = (order < wanted[:, None]).astype(jnp.float32)
                posed |= {"lengths": lengths, "weights": weights}
        return posed

    def _masked(
        self, key: jax.Array, tokens: jax.Array, length: jax.Array
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """A row `int32[T]` with tokens masked, which ones `int32[N]`, and what they were."""
        size = self.config.predicted(tokens.size)
        order, kind, other = jax.random.split(key, 3)
        draws = jax.random.uniform(order, tokens.shape, jnp.float32)
        inside = jnp.arange(tokens.size, dtype=jnp.int32) < length
        # Padding comes last; argsort is stable, so equal draws stay in order.
        draws = jnp.where(inside, draws, jnp.float32(2))
        chosen = jnp.argsort(draws)[:size].astype(jnp.int32)
        targets = tokens[chosen]
        share = jax.random.uniform(kind, (size,), jnp.float32)
        others = jax.random.randint(other, (size,), 0, self.config.vocab_size, jnp.int32)
        mask = jnp.int32(self.config.mask_id)
        shown = jnp.where(share < MASKED + RANDOM, others, targets)
        shown = jnp.where(share < MASKED, mask, shown)
        return tokens.at[chosen].set(shown, unique_indices=True), chosen, targets

    def predictions(
        self, x: jax.Array, model: Assembly, batch: Batch, sites: Sites, context: Context
    ) -> jax.Array:
        """See `Objective`: of chosen tokens, `[B, N, V]`; all that the model has without a head."""
        if self.config.headless:
            return model.logits(x, sites, context)
        with sites["transform/dense"].scope:
            x = jnp.take_along_axis(x, batch["chosen"][..., None], axis=1)
        return model.logits(x, sites, context)

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
        losses = self._losses(x, model, batch, sites, context, backward.multiplier)
        loss = jnp.mean(losses.cross_entropy)
        if self.config.z_loss:
            loss = loss + self.config.z_loss * jnp.mean(losses.z)
        return mean_handed_on(loss, sites["loss"], context.at("loss").probe)

    def evaluate(
        self,
        x: jax.Array,
        model: Assembly,
        batch: Batch,
        sites: Sites,
        context: Context,
        constrain: Constrain = ANYWHERE,
    ) -> tuple[jax.Array, jax.Array]:
        """See `Objective`; what counts are masked tokens."""
        losses = self._losses(x, model, batch, sites, context)
        return counted(losses.cross_entropy, batch["weights"], sites)

    def _losses(
        self,
        x: jax.Array,
        model: Assembly,
        batch: Batch,
        sites: Sites,
        context: Context,
        multiplier: float = 1.0,
    ) -> TokenLosses:
        targets = batch["targets"]
        return token_losses(
            self.predictions(x, model, batch, sites, context),
            targets,
            sites["loss"],
            context.at("loss").probe,
            scales=self.scales,
            weight=multiplier / targets.size,
        )


def _key_of(tokens: jax.Array) -> jax.Array:
    """A key that tokens `int32[T]` determine: a polynomial hash of them."""
    powers = np.cumprod(np.full(tokens.size, 0x9E3779B1, np.uint32), dtype=np.uint32)
    folded = jnp.sum((tokens.astype(jnp.uint32) + jnp.uint32(1)) * powers, dtype=jnp.uint32)
    return jax.random.fold_in(jax.random.key(0, impl="threefry2x32"), folded)
