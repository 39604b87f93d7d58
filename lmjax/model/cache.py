"""What attention remembers while decoding: keys and values of the tokens read so far.

Keys are kept as they enter the site `scores` and values as they enter `combine`: cast to the site's
compute format and then as its `kv` says. Each position has factors of its own, so an entry does not
change when others join it. Positions that were not read yet hold zeros.

Shapes: B batch, T new positions, S positions of the cache, K key/value heads, H head width. Knows
JAX and policies.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp

from lmjax.precision.policy import SitePolicy, carrier
from lmjax.precision.stored import Stored, decode, encode

Sites = Mapping[str, SitePolicy]

_KEYS, _VALUES = (0, 2, 1, 3), (0, 2, 3, 1)
"""How `[B, T, K, H]` is turned to be kept: the axis that a product sums over comes last. XLA on CPU
would transpose it for each token, and fails on bf16 that stands otherwise."""

_POSITION, _WIDTH = 1, 3


class LayerCache(NamedTuple):
    """Keys and values of one layer.

    Attributes:
      keys: `[B, K, S, H]`, as the site `scores` stores them.
      values: `[B, K, H, S]`, as `combine` does.
    """

    keys: Stored
    values: Stored

    @classmethod
    def of(cls, k: jax.Array, v: jax.Array, sites: Sites) -> LayerCache:
        """Keys and values `[B, T, K, H]` as they are kept; `sites` are attention's."""
        return cls(_stored(k, sites["scores"], _KEYS), _stored(v, sites["combine"], _VALUES))

    @classmethod
    def empty(cls, shape: tuple[int, int, int, int], sites: Sites) -> LayerCache:
        """The cache of `shape` [B, S, K, H] before the first token."""
        *_, width = shape
        k, v = (
            jnp.zeros((1, 1, 1, width), carrier(sites[name].compute))
            for name in ("scores", "combine")
        )
        zero = cls.of(k, v, sites)  # Not zeros when stored: e8m0 factors have no zero.
        return cls(_everywhere(zero.keys, shape, _KEYS), _everywhere(zero.values, shape, _VALUES))

    @property
    def positions(self) -> int:
        """S."""
        leaf, *_ = jax.tree.leaves(self.keys)
        return leaf.shape[_KEYS.index(_POSITION)]

    def extended(
        self, k: jax.Array, v: jax.Array, start: int | jax.Array, sites: Sites
    ) -> LayerCache:
        """The cache with the keys and values `[B, T, K, H]` of positions `start` to `start + T`.

        `start` is int32[], or int32[B] where it differs between rows. As `dynamic_update_slice`
        does, it moves what would not fit to where it does.
        """
        new = LayerCache.of(k, v, sites)
        keys = _inserted(self.keys, new.keys, start, _KEYS)
        values = _inserted(self.values, new.values, start, _VALUES)
        # Fused with what reads it, the update would be made in a copy of the cache.
        return jax.lax.optimization_barrier(LayerCache(keys, values))

    def read(self, sites: Sites) -> tuple[jax.Array, jax.Array]:
        """Keys and values of all positions, `[B, S, K, H]` each."""
        return (
            _read(self.keys, sites["scores"], _KEYS),
            _read(self.values, sites["combine"], _VALUES),
        )


def _stored(x: jax.Array, site: SitePolicy, order: tuple[int, ...]) -> Stored:
    x = jnp.transpose(site.to_compute(x), order)
    return x if site.cache is None else encode(x, site.cache, axis=order.index(_WIDTH))


def _everywhere(stored: Stored, shape: tuple[int, ...], order: tuple[int, ...]) -> Stored:
    """One position of one head, repeated for all of `shape` [B, S, K, H]."""

    def repeat(leaf: jax.Array) -> jax.Array:
        width = leaf.shape[order.index(_WIDTH)]
        return jnp.broadcast_to(leaf, [(*shape[:_WIDTH], width)[axis] for axis in order])

    return jax.tree.map(repeat, stored)


def _inserted(old: Stored, new: Stored, start: int | jax.Array, order: tuple[int, ...]) -> Stored:
    axis = order.index(_POSITION)

    def insert(old: jax.Array, new: jax.Array) -> jax.Array:
        """One array of the cache with new positions from `start` on."""
        if not jnp.ndim(start):
            return jax.lax.dynamic_update_slice_in_dim(old, new, start, axis=axis)
        # Row by row, which is done in place: a scatter of all rows would turn the whole cache on
        # CPU. Narrow formats are moved as bits, since XLA widens them otherwise. To and from bits
        # are a pass over the cache each; a single position is therefore selected in one pass, and
        # several are put in a loop, since a chain of updates would be a pass for each.
        kind, bits, rows = old.dtype, f"uint{8 * old.dtype.itemsize}", jnp.asarray(start)

        def put(row: int | jax.Array, old: jax.Array) -> jax.Array:
            where = [jnp.int32(0)] * old.ndim
            where[0], where[axis] = jnp.asarray(row, jnp.int32), rows[row].astype(jnp.int32)
            one = jax.lax.dynamic_slice_in_dim(new, row, 1)
            return jax.lax.dynamic_update_slice(old, one, where)

        if kind.itemsize >= 4:
            return functools.reduce(lambda old, row: put(row, old), range(len(rows)), old)
        old, new = (jax.lax.bitcast_convert_type(x, bits) for x in (old, new))
        if new.shape[axis] == 1:
            all_of_them = jnp.where(_is_at(rows, old.shape, axis), new, old)
        else:
            all_of_them = jax.lax.fori_loop(0, len(rows), put, old)
        return jax.lax.bitcast_convert_type(all_of_them, kind)

    return jax.tree.map(insert, old, new)


def _is_at(rows: jax.Array, shape: tuple[int, ...], axis: int) -> jax.Array:
    """Whether a position is that of its row, or the last one if that is beyond it."""
    along = [size if at in (0, axis) else 1 for at, size in enumerate(shape)]
    place = jnp.minimum(rows.astype(jnp.int32), shape[axis] - 1)
    return jax.lax.broadcasted_iota(jnp.int32, along, axis) == place.reshape(-1, 1, 1, 1)


def _read(stored: Stored, site: SitePolicy, order: tuple[int, ...]) -> jax.Array:
    if site.cache is not None:
        stored = decode(stored, site.cache, axis=order.index(_WIDTH))
    return jnp.transpose(site.to_compute(stored), sorted(range(4), key=order.__getitem__))
