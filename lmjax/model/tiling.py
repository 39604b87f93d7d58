"""How attention is cut into blocks of queries and keys, and which blocks meet.

Shapes: B batch, T queries, S keys, K key/value heads, G query heads of each, H width of a head; P
groups of L key/value heads; N blocks of queries of a group, R rows of one (all G heads of its
queries), M blocks of keys, C keys of one. Where devices divide the T queries into parts, a block
has as many queries of each part, one part after another. Knows JAX and masks.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lmjax.model.mask import Mask, Position
from lmjax.precision.contraction import is_one_cpu, relaid

CACHED_SCORES = 2**20
"""Scores of a block on one CPU, at most, if fewer heads can make it so.

They are read and written about ten times. 2 cores of an AMD EPYC with 32 MiB of cache attend to
4,096 tokens 1.2 times as fast with 4 heads in a block as with 12.
"""

Index = int | jax.Array


class Pairs(NamedTuple):
    """Blocks of queries i and keys j, of one group of heads after another.

    Attributes:
      whole: those in which every query sees every key, whatever the arrays of the mask are.
      cut: the others in which a query may see a key.
    """

    whole: list[tuple[int, int]]
    cut: list[tuple[int, int]]


@dataclass(frozen=True)
class Tiling:
    """Sizes of one attention.

    Attributes:
      queries, keys, groups: T, S and G.
      parts: of the queries, each on devices of its own.
      start: index of the first query; None if only arrays say.
      query_blocks, key_blocks: N and M.
      head_groups: P.
    """

    queries: int
    keys: int
    groups: int
    parts: int
    start: int | None
    query_blocks: int
    key_blocks: int
    head_groups: int

    @classmethod
    def of(
        cls,
        q: jax.Array,
        k: jax.Array,
        *,
        block: int,
        strip: int,
        parts: int,
        start: int | None,
    ) -> Tiling:
        """Blocks of at most `block` queries and keys, for `[B, T, K, G, H]` and `[B, S, K, H]`.

        If one block would hold everything, queries are cut into strips of `strip`, which leave out
        the keys after their own.
        """
        batch, queries, heads, groups, _ = q.shape
        keys = k.shape[1]
        own = queries // parts
        blocks = _blocks(own, block), _blocks(keys, block)
        if blocks == (1, 1) and parts == 1 and own % strip == 0 and start is not None:
            blocks = own // strip, 1
        one = cls(queries, keys, groups, parts, start, *blocks, head_groups=1)
        if one.key_blocks == 1 or not is_one_cpu():
            return one
        of_a_head = batch * one.key_size * one.rows
        cuts = (n for n in range(1, heads) if heads % n == 0)
        fitting = (n for n in cuts if heads // n * of_a_head <= CACHED_SCORES)
        return dataclasses.replace(one, head_groups=next(fitting, heads))

    @property
    def query_size(self) -> int:
        """Queries of a part in a block."""
        return -(-(self.queries // self.parts) // self.query_blocks)

    @property
    def key_size(self) -> int:
        """Keys of a block, C."""
        return -(-self.keys // self.key_blocks)

    @property
    def rows(self) -> int:
        """Rows of a block of queries, R."""
        return self.parts * self.groups * self.query_size

    def split_queries(self, x: jax.Array) -> jax.Array:
        """`[B, T, K, G, H]` to `[P N, B, L, R, H]`."""
        batch, _, heads, groups, width = x.shape
        size, own = self.query_size, self.queries // self.parts
        x = x.reshape(batch, self.parts, own, heads, groups, width)
        x = _padded(x, self.query_blocks * size, axis=2)
        x = x.reshape(
            *(batch, self.parts, self.query_blocks, size, self.head_groups, -1, groups, width)
        )
        x = relaid(x, (4, 2, 0, 5, 1, 6, 3, 7))
        return x.reshape(-1, batch, heads // self.head_groups, self.rows, width)

    def join_queries(self, x: jax.Array) -> jax.Array:
        """`[P N, B, L, H, R]` to `[B, T, K, G, H]`."""
        _, batch, heads, width, _ = x.shape
        size, own = self.query_size, self.queries // self.parts
        x = x.reshape(
            *(self.head_groups, self.query_blocks, batch, heads, width),
            *(self.parts, self.groups, size),
        )
        x = jnp.transpose(x, (2, 5, 1, 7, 0, 3, 6, 4))
        x = x.reshape(batch, self.parts, self.query_blocks * size, -1, self.groups, width)
        return x[:, :, :own].reshape(batch, self.queries, -1, self.groups, width)

    def split_keys(self, x: jax.Array, *, turned: bool = False) -> jax.Array:
        """`[B, S, K, H]` to `[P M, B, L, C, H]`, or turned to `[P M, B, L, H, C]`."""
        batch, _, heads, width = x.shape
        x = _padded(x, self.key_blocks * self.key_size, axis=1)
        x = x.reshape(batch, self.key_blocks, self.key_size, self.head_groups, -1, width)
        x = relaid(x, (3, 1, 0, 4, 5, 2) if turned else (3, 1, 0, 4, 2, 5))
        return x.reshape(-1, batch, heads // self.head_groups, *x.shape[-2:])

    def join_keys(self, x: jax.Array) -> jax.Array:
        """`[P M, B, L, C, H]` to `[B, S, K, H]`."""
        _, batch, heads, _, width = x.shape
        x = x.reshape(self.head_groups, self.key_blocks, batch, heads, self.key_size, width)
        x = jnp.transpose(x, (2, 1, 4, 0, 3, 5))
        return x.reshape(batch, -1, heads * self.head_groups, width)[:, : self.keys]

    def heads_of(self, x: jax.Array, i: Index) -> jax.Array:
        """`[B, K]` to `[B, L]`, the heads of block i of queries."""
        groups = x.reshape(x.shape[0], self.head_groups, -1)
        return jax.lax.dynamic_index_in_dim(groups, i // self.query_blocks, 1, keepdims=False)

    def visible(self, mask: Mask, start: Position, i: Index, j: Index) -> jax.Array:
        """What the rows of block i see of the keys of block j: bool, `[C, R]` or `[B, 1, C, R]`."""
        i, j = i % self.query_blocks, j % self.key_blocks
        own = np.arange(self.parts, dtype=np.int32)[:, None, None] * (self.queries // self.parts)
        within = np.arange(self.query_size, dtype=np.int32)
        shape = self.parts, self.groups, self.query_size
        places = np.broadcast_to(np.int32(own) + within, shape).reshape(-1)
        rows = places + i * np.int32(self.query_size)
        keys = np.arange(self.key_size, dtype=np.int32) + j * np.int32(self.key_size)
        seen = mask.of(jnp.asarray(rows)).visible(jnp.asarray(rows + start), jnp.asarray(keys))
        if self.key_blocks * self.key_size > self.keys:
            seen = seen & jnp.asarray(keys < self.keys)
        seen = jnp.swapaxes(seen, -1, -2)
        return seen if seen.ndim == 2 else jnp.squeeze(seen, 2)

    def pairs(self, mask: Mask, *, all_of_them: bool = False) -> Pairs:
        """The blocks in which a query may see a key, by i."""
        found = Pairs([], [])
        for i in range(self.query_blocks):
            for j in range(self.key_blocks):
                if self._must_see(mask, i, j):
                    found.whole.append((i, j))
                elif all_of_them or self._may_see(mask, i, j):
                    found.cut.append((i, j))
        groups = range(self.head_groups)
        n, m = self.query_blocks, self.key_blocks
        return Pairs(*([(p * n + i, p * m + j) for p in groups for i, j in each] for each in found))

    def seen(self, mask: Mask, i: int) -> int:
        """How many keys the queries of block i may see if one block holds all keys, the first."""
        if self.key_blocks > 1 or self.query_blocks == 1 or self.start is None:
            return self.key_size
        first = self.start + i * self.query_size
        rows, keys = range(first, first + self.query_size), self.keys
        ends = range(self.query_size, keys, self.query_size)
        return next((end for end in ends if not mask.may_see(rows, range(end, keys))), keys)

    def _must_see(self, mask: Mask, i: int, j: int) -> bool:
        """Whether each query of block i sees each key of block j, none of which is padding."""
        keys = self._keys(j)
        known = self.start is not None and keys.stop <= self.keys
        return known and all(mask.must_see(rows, keys) for rows in self._rows(i))

    def _may_see(self, mask: Mask, i: int, j: int) -> bool:
        unknown = self.start is None
        return unknown or any(mask.may_see(rows, self._keys(j)) for rows in self._rows(i))

    def _keys(self, j: int) -> range:
        return range(j * self.key_size, (j + 1) * self.key_size)

    def _rows(self, i: int) -> list[range]:
        """Indices of the queries of block i, by part."""
        assert self.start is not None
        own = self.queries // self.parts
        firsts = (self.start + part * own + i * self.query_size for part in range(self.parts))
        return [range(first, first + self.query_size) for first in firsts]


def visit(
    pairs: list[tuple[int, int]], step: Callable[[Any, Index, Index], Any], carry: Any
) -> Any:
    """`carry = step(carry, i, j)` for each pair, one after another.

    In a loop of the program where there are several blocks of keys.
    """
    if len(pairs) < 2 or not any(j for _, j in pairs):
        for pair in pairs:
            carry = step(carry, *pair)
        return carry
    indices = jnp.asarray(np.asarray(pairs, np.int32))
    return jax.lax.scan(lambda total, pair: (step(total, *pair), None), carry, indices)[0]


def taken(tree: Any, index: Index) -> Any:
    """Block `index` of every array of a tree."""
    take = lambda x: x[0] if x.shape[0] == 1 else jax.lax.dynamic_index_in_dim(x, index, 0, False)
    return jax.tree.map(take, tree)


def put(tree: Any, blocks: Any, index: Index) -> Any:
    """The tree with `blocks` in the place of block `index`."""

    def one(x: jax.Array, block: jax.Array) -> jax.Array:
        if x.shape[0] == 1:
            return block[None]
        return jax.lax.dynamic_update_index_in_dim(x, block, index, 0)

    return jax.tree.map(one, tree, blocks)


def add_to(tree: jax.Array, block: jax.Array, index: Index) -> jax.Array:
    """`[N, ..., C, H]` with `[..., c, H]` added to the first c rows of block `index`."""
    before, rows = taken(tree, index), block.shape[-2]
    total = before[..., :rows, :] + block
    return put(tree, jnp.concatenate([total, before[..., rows:, :]], -2), index)


def _blocks(length: int, block: int) -> int:
    """How many blocks a length is cut into: without padding, unless they would be very small."""
    fewest = -(-length // block)
    even = (n for n in range(fewest, 2 * fewest + 1) if length % n == 0)
    return next(even, fewest)


def _padded(x: jax.Array, size: int, axis: int) -> jax.Array:
    if x.shape[axis] == size:
        return x
    widths = [(0, size - x.shape[axis] if a == axis else 0) for a in range(x.ndim)]
    return jnp.pad(x, widths)
