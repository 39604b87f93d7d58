"""The decoder: embedding, scanned blocks, final norm, head; trained to predict the next token.

Knows Flax, JAX and policies; no mesh, no optimizer, no data.
"""

from __future__ import annotations

import functools

import jax

from lmjax.model.assembly import Assembly, Batch, Objective
from lmjax.model.block import Block
from lmjax.model.config import ModelConfig
from lmjax.model.head import Head
from lmjax.model.layers import ANYWHERE, Constrain, Dense, Embedding, Norm, dropout, embedded
from lmjax.model.layout import decoder_layout
from lmjax.model.mask import Causal, CausalWithinDocuments, Mask, mask_and_positions
from lmjax.model.objectives import NextToken
from lmjax.model.parametrisation import parametrisation_of
from lmjax.model.sites import Context, Sites
from lmjax.model.stack import scan_blocks, stacked
from lmjax.precision.sites import Layout


class Decoder(Assembly):
    """A decoder-only Transformer: GPT-2, Llama and what lies between."""

    def __init__(self, key: jax.Array, config: ModelConfig):
        c, scales = config, parametrisation_of(config)
        self.config, self.scales = config, scales
        embed_key, position_key, block_key, head_key = jax.random.split(key, 4)
        table = functools.partial(Embedding, width=c.width, std=scales.weight_std, scales=scales)
        self.embed = table(embed_key, c.vocab_size, axes=("vocab", "embed"))
        self.positions = (
            table(position_key, c.max_positions, axes=("positions", "embed"))
            if c.positions == "learned"
            else None
        )
        self.blocks = stacked(lambda k: Block(k, c), jax.random.split(block_key, c.layers))
        self.norm = Norm(c.width, c)
        self.head = (
            None
            if c.tied
            else Dense(
                head_key,
                c.width,
                c.vocab_size,
                axes=("embed", "vocab"),
                std=scales.weight_std,
                bias=False,
                scales=scales,
            )
        )

    @staticmethod
    def layout(config: ModelConfig) -> Layout:
        """See `Assembly`."""
        return decoder_layout(config)

    @staticmethod
    def objective(config: ModelConfig) -> Objective:
        """The next token."""
        return NextToken(parametrisation_of(config), config.z_loss)

    @staticmethod
    def mask(*, documents: bool) -> type[Mask]:
        """See `Assembly`."""
        return CausalWithinDocuments if documents else Causal

    def trunk(
        self,
        batch: Batch,
        *,
        sites: Sites,
        context: Context,
        cotangent_scales: jax.Array | None,
        constrain: Constrain,
    ) -> jax.Array:
        """What leaves the last block, `[B, T, D]`; see `Assembly`.

        A batch holds `inputs`, `int32[B, T]`, T at most `config.max_positions` for learned
        positions; and for a document mask `document_starts`, the index in its row of the first
        token of each token's document, `int32[B, T]`: tokens attend within their document, whose
        positions count from 0. Without, each row is one document.
        """
        tokens, c = batch["inputs"], self.config
        check_length(c, tokens.shape[1])
        mask, positions = mask_and_positions(0, tokens.shape[1], batch.get("document_starts"))
        x = self.embedded(tokens, positions, sites, context, constrain)
        x = constrain(x, ("batch", "length", "width"))
        with sites["embed"].scope:
            x = dropout(x, c.dropout, context.at("dropout").key)
        return scan_blocks(
            self.blocks,
            x,
            config=c,
            sites=sites,
            context=context.at("blocks"),
            mask=mask,
            positions=positions,
            cotangent_scales=cotangent_scales,
            constrain=constrain,
        )

    def embedded(
        self,
        tokens: jax.Array,
        positions: jax.Array,
        sites: Sites,
        context: Context,
        constrain: Constrain = ANYWHERE,
    ) -> jax.Array:
        """What enters the first block, `[B, T, D]`.

        Args:
          tokens: `int32[B, T]`.
          positions: of each, `int32[T]`, or `int32[B, T]` where they differ between rows.
          sites: the formats of every site.
          context: randomness and probes.
          constrain: that of `trunk`.
        """
        tables = {"embed": (self.embed, tokens)}
        if self.positions is not None:
            tables["positions"] = self.positions, positions
        return embedded(tables, sites, context, constrain, self.scales)

    def readout(self, x: jax.Array, sites: Sites, context: Context) -> tuple[jax.Array, Head]:
        """The normed rows of what left the last block, and the head: that of the next token."""
        x = self.norm(x, sites["norm"], context.at("norm"))
        unit = self.scales.unit_products
        if self.head is not None:
            return x, Head("btk,kn->btn", self.head.kernel[...], unit)
        return x, Head("btd,vd->btv", self.embed.table[...], unit)


def check_length(config: ModelConfig, length: int) -> None:
    """Refuses more tokens than the model has positions.

    Raises:
      ValueError: positions are learned, and there are fewer.
    """
    if config.positions == "learned" and length > config.max_positions:
        raise ValueError(f"{length} tokens, but the model has {config.max_positions} positions")
