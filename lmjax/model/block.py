"""A Transformer block: attention and an MLP, each a branch of the residual stream.

Shapes: B batch, T positions, D width, M hidden width. Knows Flax, JAX and policies; no mesh, no
optimizer, no data.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Final, Literal, TypeVar

import jax
from flax import nnx

from lmjax.model.attention import Attention
from lmjax.model.cache import LayerCache
from lmjax.model.config import ModelConfig
from lmjax.model.layers import ANYWHERE, Constrain, Dense, Norm, dropout
from lmjax.model.mask import Mask, Position
from lmjax.model.parametrisation import parametrisation_of
from lmjax.model.recompute import recomputed
from lmjax.model.sites import Context, Sites, at_site, give, take, within, within_site
from lmjax.model.standard import Branches, PlainBranches
from lmjax.precision.policy import SitePolicy

T = TypeVar("T")

NormPosition = Literal["before", "after"]
"""Where the norm of a branch stands: before it, x + f(norm(x)), as in GPT-2 and Llama (Xiong et al.
2020), or after the sum, norm(x + f(x)), as in BERT and the first Transformer (Vaswani et al. 2017).
"""


ACTIVATIONS: Final[Mapping[str, Callable[[jax.Array], jax.Array]]] = {
    "gelu": functools.partial(jax.nn.gelu, approximate=True),
    "gelu_erf": functools.partial(jax.nn.gelu, approximate=False),
    "relu": jax.nn.relu,
    "silu": jax.nn.silu,
}
"""Activations without a gate, by `model.activation`."""


class Mlp(nnx.Module):
    """Two linear layers around an activation, or three around a gated SiLU.

    `norm` is the norm of its half of the block, which calls it where it stands.
    """

    def __init__(self, key: jax.Array, config: ModelConfig):
        keys = iter(jax.random.split(key, 3))
        c, scales = config, parametrisation_of(config)
        inward = functools.partial(
            Dense,
            fan_in=c.width,
            fan_out=c.mlp_size,
            axes=("embed", "mlp"),
            std=scales.weight_std,
            bias=c.bias,
            scales=scales,
        )
        self.norm = Norm(c.width, c)
        self.up = inward(next(keys))
        self.down = Dense(
            next(keys),
            c.mlp_size,
            c.width,
            axes=("mlp", "embed"),
            bias=c.bias,
            std=scales.last_weight_std,
            scales=scales,
        )
        self.scales = scales
        self.activation = c.activation
        gated = c.activation == "swiglu"
        self.gate = inward(next(keys)) if gated else None

    def __call__(self, x: jax.Array, sites: Sites, context: Context) -> jax.Array:
        """`[B, T, D]` to `[B, T, D]`."""
        hidden = self.up(x, sites["up"], context.at("up"))
        gate = None if self.gate is None else self.gate(x, sites["gate"], context.at("gate"))
        hidden = self.activated(hidden, gate, sites["activation"], context.at("activation"))
        return self.down(hidden, sites["down"], context.at("down"))

    @at_site
    def activated(
        self, hidden: jax.Array, gate: jax.Array | None, site: SitePolicy, context: Context
    ) -> jax.Array:
        """The activation of `hidden [B, T, M]`, or `hidden` times SiLU of a gate of that shape."""

        def run(hidden: jax.Array, gate: jax.Array | None) -> jax.Array:
            hidden = take(hidden, site, context.probe)
            if gate is None:
                hidden = ACTIVATIONS[self.activation](hidden)
            else:
                hidden = jax.nn.silu(site.to_compute(gate)) * hidden
            return give(self.scales.activated(hidden), site, context.probe)

        return recomputed(run, hidden, gate)


class Block(nnx.Module):
    """One layer: attention, then the MLP, each added to the residual stream."""

    def __init__(self, key: jax.Array, config: ModelConfig, norm_position: NormPosition = "before"):
        attention_key, mlp_key = jax.random.split(key)
        self.rate = config.dropout
        self.norm_position = norm_position
        self.attention = Attention(attention_key, config)
        self.mlp = Mlp(mlp_key, config)

    def __call__(
        self,
        x: jax.Array,
        sites: Sites,
        angles: tuple[jax.Array, jax.Array] | None,
        context: Context,
        mask: Mask,
        branches: Branches = PlainBranches(),  # noqa: B008 - an empty tuple
        constrain: Constrain = ANYWHERE,
        cache: LayerCache | None = None,
        start: Position = 0,
    ) -> tuple[jax.Array, LayerCache | None]:
        """`[B, T, D]` to `[B, T, D]`, in the format of the residual stream; see `Attention`.

        `branches` says how both branches leave and join the stream; its arrays are f32[2] each.
        `constrain` says where activations live.
        """
        residual, probe = sites["residual"], context.at("residual").probe
        first, second = (jax.tree.map(lambda w, i=i: w[i], branches) for i in range(2))

        def attend(y: jax.Array, own: Context) -> tuple[jax.Array, LayerCache | None]:
            inside = within(sites, "attention")
            return self.attention(y, inside, angles, own, mask, constrain, cache, start)

        def transform(y: jax.Array, own: Context) -> tuple[jax.Array, None]:
            return self.mlp(y, within(sites, "mlp"), own), None

        with residual.scope:
            x = within_site(take(x, residual, probe), residual, probe, "entering")
        given = sites, context
        x, cache = self._half("attention", "dropout 1", attend, x, first, *given)
        with residual.scope:
            x = within_site(x, residual, probe, "between")
        x, _ = self._half("mlp", "dropout 2", transform, x, second, *given)
        with residual.scope:
            return give(x, residual, probe), cache

    def _half(
        self,
        name: str,
        dropped: str,
        branch: Callable[[jax.Array, Context], tuple[jax.Array, T]],
        x: jax.Array,
        branches: Branches,
        sites: Sites,
        context: Context,
    ) -> tuple[jax.Array, T]:
        """The stream after the branch of one part was added to it, and what else came of it."""
        residual, norm, own = sites["residual"], getattr(self, name).norm, context.at(name)
        normed = lambda y: norm(y, sites[f"{name}/norm"], own.at("norm"))
        with residual.scope:
            y = branches.enter(x)
        y, rest = branch(normed(y) if self.norm_position == "before" else y, own)
        with residual.scope:
            y = residual.to_compute(dropout(y, self.rate, context.at(dropped).key))
            x = residual.to_compute(branches.add(x, y))
        if self.norm_position == "after":
            x = normed(x)
            with residual.scope:
                x = residual.to_compute(x)
        return x, rest
