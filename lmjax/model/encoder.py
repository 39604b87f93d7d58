"""The encoder: embedding, norm, scanned blocks with norms after their branches, and a head.

Its tokens see each other in both directions, and it is trained to predict masked tokens, or the
class of a text (BERT, Devlin et al. 2019).

Knows Flax, JAX and policies; no mesh, no optimizer, no data.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from flax import nnx

from lmjax.model.assembly import Assembly, Batch, Objective
from lmjax.model.block import ACTIVATIONS, Block
from lmjax.model.config import ModelConfig
from lmjax.model.decoder import check_length
from lmjax.model.layers import Constrain, Dense, Embedding, Norm, constant, dropout, embedded
from lmjax.model.layout import encoder_layout
from lmjax.model.mask import Bidirectional, Mask, Padded, indices_from
from lmjax.model.masking import MaskedTokens
from lmjax.model.objectives import TextClass
from lmjax.model.parametrisation import parametrisation_of
from lmjax.model.sites import Context, Sites, at_site, give, take, within
from lmjax.model.stack import scan_blocks, stacked
from lmjax.precision.policy import SitePolicy
from lmjax.precision.sites import Layout


class Transform(nnx.Module):
    """What the head reads to predict a token: a linear layer, an activation and a norm."""

    def __init__(self, key: jax.Array, config: ModelConfig):
        self.dense = _square(key, config)
        self.norm = Norm(config.width, config)
        self.activation = config.activation
        self.scales = parametrisation_of(config)

    def __call__(self, x: jax.Array, sites: Sites, context: Context) -> jax.Array:
        """`[B, N, D]` to `[B, N, D]`."""
        x = self.dense(x, sites["dense"], context.at("dense"))
        x = self.activated(x, sites["activation"], context.at("activation"))
        return self.norm(x, sites["norm"], context.at("norm"))

    @at_site
    def activated(self, x: jax.Array, site: SitePolicy, context: Context) -> jax.Array:
        """The activation of the blocks; without its gate, of one that has a gate."""
        function = ACTIVATIONS.get(self.activation, jax.nn.silu)
        y = self.scales.activated(function(take(x, site, context.probe)))
        return give(y, site, context.probe)


class FirstToken(nnx.Module):
    """What the head reads to tell the class of a text: the first token, and a tanh."""

    def __init__(self, key: jax.Array, config: ModelConfig):
        self.dense = _square(key, config)

    def __call__(self, x: jax.Array, sites: Sites, context: Context) -> jax.Array:
        """`[B, T, D]` to `[B, 1, D]`."""
        x = self.dense(x[:, :1], sites["dense"], context.at("dense"))
        return self.activated(x, sites["activation"], context.at("activation"))

    @at_site
    def activated(self, x: jax.Array, site: SitePolicy, context: Context) -> jax.Array:
        """The hyperbolic tangent."""
        return give(jnp.tanh(take(x, site, context.probe)), site, context.probe)


class TiedHead(nnx.Module):
    """What a head has of its own that multiplies by the embedding table: a bias."""

    def __init__(self, size: int):
        self.bias = constant(0.0, (size,), ("vocab",))


class Encoder(Assembly):
    """A Transformer that reads in both directions: BERT."""

    def __init__(self, key: jax.Array, config: ModelConfig):
        c, scales = config, parametrisation_of(config)
        self.config, self.scales = config, scales
        keys = iter(jax.random.split(key, 6))
        table = functools.partial(Embedding, width=c.width, std=scales.weight_std, scales=scales)
        self.embed = table(next(keys), c.vocab_size, axes=("vocab", "embed"))
        learned, typed = c.positions == "learned", c.token_types > 0
        rows, types = next(keys), next(keys)
        self.positions = (
            table(rows, c.max_positions, axes=("positions", "embed")) if learned else None
        )
        self.types = table(types, c.token_types, axes=("types", "embed")) if typed else None
        self.norm = Norm(c.width, c)
        block = functools.partial(Block, config=c, norm_position="after")
        self.blocks = stacked(block, jax.random.split(next(keys), c.layers))
        part = next(keys)
        self.pool = FirstToken(part, c) if c.pooled else None
        self.transform = None if c.pooled else Transform(part, c)
        head = functools.partial(
            Dense, next(keys), c.width, std=scales.weight_std, bias=True, scales=scales
        )
        if c.headless:
            self.head: TiedHead | Dense | None = None
        elif c.tied_head:
            self.head = TiedHead(c.vocab_size)
        else:
            size, axis = (c.classes, "classes") if c.classes else (c.vocab_size, "vocab")
            self.head = head(size, axes=("embed", axis))

    @staticmethod
    def layout(config: ModelConfig) -> Layout:
        """See `Assembly`."""
        return encoder_layout(config)

    @staticmethod
    def objective(config: ModelConfig) -> Objective:
        """The class of a text, or its masked tokens."""
        scales = parametrisation_of(config)
        return TextClass(scales) if config.classes else MaskedTokens(scales, config)

    @staticmethod
    def mask(*, documents: bool) -> type[Mask]:
        """See `Assembly`; without lengths, rows have no padding."""
        return Bidirectional

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
        positions. It may hold `lengths`, `int32[B]`: rows have so many tokens, and then padding,
        which no token sees; and `token_types`, `int32[B, T]`, which are 0 without.
        """
        tokens, c = batch["inputs"], self.config
        check_length(c, tokens.shape[1])
        positions = indices_from(0, tokens.shape[1])
        tables = {"embed": (self.embed, tokens)}
        if self.positions is not None:
            tables["positions"] = self.positions, positions
        if self.types is not None:
            tables["types"] = self.types, batch.get("token_types", jnp.zeros_like(positions))
        x = embedded(tables, sites, context, constrain, self.scales)
        x = self.norm(x, sites["norm"], context.at("norm"))
        x = constrain(x, ("batch", "length", "width"))
        with sites["norm"].scope:
            x = dropout(x, c.dropout, context.at("dropout").key)
        return scan_blocks(
            self.blocks,
            x,
            config=c,
            sites=sites,
            context=context.at("blocks"),
            mask=Padded(batch["lengths"]) if "lengths" in batch else Bidirectional(),
            positions=positions,
            cotangent_scales=cotangent_scales,
            constrain=constrain,
        )

    def logits(self, x: jax.Array, sites: Sites, context: Context) -> jax.Array:
        """The logits of what stands at each position, `[B, N, V]`, or of each class, `[B, 1, C]`.

        Without a head, the pooled first token, `[B, 1, D]`.

        `x` may hold some positions of what left the trunk; classes are told by the first one.
        """
        for name, part in (("transform", self.transform), ("pool", self.pool)):
            if part is not None:
                x = part(x, within(sites, name), context.at(name))
        if self.head is None:
            return x
        site, head = sites["head"], context.at("head")
        if isinstance(self.head, TiedHead):
            return self.embed.logits(x, site, head, self.head.bias)
        return self.head(x, site, head)


def _square(key: jax.Array, config: ModelConfig) -> Dense:
    """A linear layer with a bias that keeps the width."""
    scales = parametrisation_of(config)
    return Dense(
        key,
        config.width,
        config.width,
        axes=("embed", "width"),
        std=scales.weight_std,
        bias=True,
        scales=scales,
    )
