"""What attention in blocks computes: its formats and constants, and one block of scores.

Shapes are those of `tiling.py`. Knows JAX, masks and policies.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

import jax
import jax.numpy as jnp

from lmjax.model.mask import Mask, Position
from lmjax.model.tiling import Index, Tiling, visit
from lmjax.precision.policy import SitePolicy, carrier
from lmjax.precision.probes import Slots
from lmjax.precision.summation import sum_of_products

BLOCK = 512
"""Queries and keys of a block, at most."""

STRIP = 128
"""Queries of a block where it holds all keys, if they divide them."""

INSIDE: Final = {"scores": ("g",), "softmax": ("y", "dx"), "combine": ("x", "dx")}
"""Roles that are as large as the scores: they exist, and are measured, block by block."""

Measured = Mapping[str, Slots]
"""Slots by the name of their site."""

Visible = jax.Array | None
"""Which keys the queries of a block see: bool, `[C, R]` or `[B, 1, C, R]`; None: all of them."""


@dataclass(frozen=True)
class Rules:
    """What attention computes, as far as arrays do not say it.

    Attributes:
      scores, softmax, combine: the formats.
      score_factor, weight_factor: what scores and weights are multiplied by.
      unit: whether each product is divided by the root of its number of terms; see `einsum`.
      dropout: the rate at which weights are dropped where there are keys for it.
      start: index of the first query; None where only `Given.start` says.
      parts: into how many parts devices divide the queries.
      block: queries and keys of a block, at most.
      strip: queries of a block that holds all keys.
    """

    scores: SitePolicy
    softmax: SitePolicy
    combine: SitePolicy
    score_factor: float = 1.0
    weight_factor: float = 1.0
    unit: bool = False
    dropout: float = 0.0
    start: int | None = 0
    parts: int = 1
    block: int = BLOCK
    strip: int = STRIP

    def product(self, spec: str, x: jax.Array, w: jax.Array, site: SitePolicy) -> jax.Array:
        """A sum of products at a site, not rounded."""
        with site.scope:
            return sum_of_products(spec, x, w, site)

    def divisor(self, terms: int) -> float:
        """What a sum of so many products is multiplied by."""
        return terms**-0.5 if self.unit else 1.0


class Given(NamedTuple):
    """What attention reads beside queries, keys and values; it has no gradient.

    Attributes:
      mask: of all T queries, each of which sees at least one key.
      start: index of the first query; keys have the indices 0 to S.
      keys: random keys of each row and head, `[B, K]`, for dropout; None: nothing is dropped.
    """

    mask: Mask
    start: Position
    keys: jax.Array | None


class Sheet:
    """Blocks of scores, forwards and backwards alike: `[B, L, C, R]`."""

    def __init__(
        self, rules: Rules, q: jax.Array, k: jax.Array, given: Given, slots: Measured
    ) -> None:
        self.rules, self.given = rules, given
        self.tiling = Tiling.of(
            q, k, block=rules.block, strip=rules.strip, parts=rules.parts, start=rules.start
        )
        watched = any(role in slots.get(site, {}) for site in INSIDE for role in INSIDE[site])
        # What is skipped is measured too, as zeros.
        self.pairs = self.tiling.pairs(given.mask, all_of_them=watched)
        unknown = bool(jax.tree.leaves(given.mask)) or rules.start is None
        self.conditional = self.tiling.key_blocks > 1 and (unknown or watched)
        self.dtype = jnp.dtype(carrier(rules.softmax.compute))

    def visit(self, step: Callable[[Any, Index, Index, Visible], Any], carry: Any) -> Any:
        """`carry = step(carry, i, j, visible)` for each block that is not skipped.

        Those come first in which every query sees every key.
        """
        unmasked = lambda carry, i, j: step(carry, i, j, None)
        masked = lambda carry, i, j: step(carry, i, j, self._visible(i, j))
        carry = visit(self.pairs.whole, unmasked, carry)
        return visit(self.pairs.cut, masked, carry)

    def _visible(self, i: Index, j: Index) -> jax.Array:
        start = self.given.start if self.rules.start is None else self.rules.start
        with self.rules.softmax.scope:
            return self.tiling.visible(self.given.mask, start, i, j)[..., : self.seen(i), :]

    def seen(self, i: Index) -> int:
        """How many keys of a block the queries of block i may see; the others come after them."""
        return self.tiling.seen(self.given.mask, i) if isinstance(i, int) else self.tiling.key_size

    @property
    def is_one_block(self) -> bool:
        """Whether there is a single step."""
        return sum(map(len, self.pairs)) == 1

    def scores(self, queries: jax.Array, keys: jax.Array, visible: Visible) -> jax.Array:
        """The scores of one block, minus infinity where a query does not see."""
        rules = self.rules
        scores = rules.product("bkch,bkrh->bkcr", keys, queries, rules.scores)
        with rules.softmax.scope:
            factor = rules.score_factor * rules.divisor(queries.shape[-1])
            scores = scores.astype(self.dtype) * factor
            # Selected, not added: a large negative number added to a score can overflow. Infinite:
            # should all real scores of a row overflow, it becomes NaN and the step is skipped.
            return where(visible, scores, -jnp.inf)

    def keep(self, i: Index, j: Index) -> jax.Array | None:
        """Which weights of a block dropout keeps, `[B, L, C, R]`; None: all."""
        keys, rate, tiling = self.given.keys, self.rules.dropout, self.tiling
        if keys is None or rate == 0.0:
            return None
        index = i % tiling.query_blocks * tiling.key_blocks + j % tiling.key_blocks
        shape = tiling.key_size, tiling.rows

        def one(key: jax.Array) -> jax.Array:
            return jax.random.bernoulli(jax.random.fold_in(key, index), 1.0 - rate, shape)

        with self.rules.softmax.scope:
            keys = tiling.heads_of(keys, i)
            return jax.vmap(jax.vmap(one))(keys)[..., : self.seen(i), :]

    def dropped(self, x: jax.Array, keep: jax.Array | None) -> jax.Array:
        """Weights of a block, or their cotangents, after dropout."""
        if keep is None:
            return x
        return jnp.where(keep, x / (1.0 - self.rules.dropout), jnp.zeros_like(x))

    def when(self, visible: Visible, compute: Callable[[], Any], skip: Callable[[], Any]) -> Any:
        """`compute()`, or `skip()` where a whole block is invisible."""
        if visible is None or not self.conditional:
            return compute()
        return jax.lax.cond(jnp.any(visible), compute, skip)


def where(visible: Visible, x: jax.Array, other: float) -> jax.Array:
    """What stands where a query sees a key, and another number where it does not."""
    return x if visible is None else jnp.where(visible, x, jnp.asarray(other, x.dtype))
