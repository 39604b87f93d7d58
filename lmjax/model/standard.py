"""The standard parametrisation: small initial weights, and nothing multiplied by constants.

It is the identity of what a parametrisation may change. Another one, such as `unit_scaling.py`, is
a subclass that overrides what it changes and a row in `parametrisation.py`; layers, loss and
optimizer ask the object and do not know which it is.

Knows JAX and the model's config.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, NamedTuple, Protocol

import jax

from lmjax.model.config import ModelConfig
from lmjax.precision.broadcast import add_to_rows


class Branches(Protocol):
    """How the branches of a block leave and join the residual stream.

    A pytree. Of all branches of a model, arrays have an axis of layers and one of the branches in a
    block, along which `jax.tree.map` and `jax.lax.scan` take them apart.
    """

    def enter(self, x: jax.Array) -> jax.Array:
        """The stream as a branch reads it."""
        ...

    def add(self, x: jax.Array, y: jax.Array) -> jax.Array:
        """The stream `x` after the result `y` of a branch was added, in the format of `x`."""
        ...


class PlainBranches(NamedTuple):
    """Branches read the stream as it is, and their results are added as they are."""

    def enter(self, x: jax.Array) -> jax.Array:
        """See `Branches`."""
        return x

    def add(self, x: jax.Array, y: jax.Array) -> jax.Array:
        """See `Branches`."""
        return x + y


@dataclass(frozen=True)
class Standard:
    """The standard parametrisation of a model."""

    config: ModelConfig

    unit_products: ClassVar[bool] = False
    """Whether every product and its gradients are divided by the roots of their numbers of terms;
    see `einsum`."""
    auto_loss_scale: ClassVar[bool] = True
    """Whether narrow cotangents need a loss scale, so that `loss_scale.kind=auto` may be one."""
    usual_rate: ClassVar[float | None] = None
    """A learning rate of AdamW to start from, where it is far from what is usual elsewhere."""

    @property
    def weight_std(self) -> float:
        """Standard deviation of initial weights."""
        return self.config.init_std

    @property
    def last_weight_std(self) -> float:
        """The same where a half block ends and is added to the residual stream (GPT-2, Radford et
        al. 2019, section 2.3).
        """
        return self.config.init_std / math.sqrt(2 * self.config.layers)

    def shared(self, parameter: jax.Array, uses: float) -> jax.Array:
        """A parameter, or the rows taken from it, whose gradient is a sum over so many uses."""
        return parameter

    def sum_of_embeddings(self, tokens: jax.Array, positions: jax.Array) -> jax.Array:
        """The sum of `[B, T, D]` and `[T, D]` or `[B, T, D]`, in the format of both."""
        return add_to_rows(tokens, positions)

    def queries(self, q: jax.Array) -> jax.Array:
        """Queries `[B, T, K, G, H]` on their way into the product with the keys.

        The factor 1/sqrt(H) of scores (Vaswani et al. 2017, section 3.2.1) is split: its power of
        two goes to the queries, where it is exact in every format and keeps f16 scores in range;
        the rest is applied to the scores in the format of the softmax.
        """
        return q * self._power

    @property
    def score_factor(self) -> float:
        """What the scores of queries and keys are multiplied by as the softmax reads them."""
        return 1.0 / (math.sqrt(self.config.head_size) * self._power)

    @property
    def _power(self) -> float:
        return 2.0 ** -math.floor(math.log2(self.config.head_size) / 2)

    def weight_factor(self, keys: int) -> float:
        """What the result of a softmax over so many keys is multiplied by."""
        return 1.0

    def activated(self, hidden: jax.Array) -> jax.Array:
        """The result of the activation, gated or not."""
        return hidden

    def branches(self) -> Branches:
        """How the two branches of all blocks leave and join the residual stream."""
        return PlainBranches()

    def logits(self, logits: jax.Array) -> jax.Array:
        """Logits `[..., V]` as the loss reads them."""
        return logits

    def losses(self, losses: jax.Array, weight: float) -> jax.Array:
        """Losses of tokens that are about to be multiplied by `weight` and added up."""
        return losses

    def learning_rate_factors(self, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, float]:
        """By what the learning rate of each parameter is multiplied, by its path; nothing at 1."""
        return {}

    def clip_norm(self, bound: float, count: int) -> float:
        """The largest global norm of the gradients of `count` numbers, of the bound in settings."""
        return bound
