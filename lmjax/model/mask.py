"""Which keys a query attends to, and which position a token has, as values that layers are given.

A mask is a frozen pytree. Attention asks it and knows nothing else about causality, documents or
padding, so another kind of attention is another class in this file.

Tokens are counted in two ways. An *index* says where a token stands among all that attention holds,
in a window or in a cache. A *position* is what learned tables and rotary embeddings encode. They
are the same but for windows that hold several documents, in which positions restart.

Shapes: B batch, T queries, S keys. Knows JAX only.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import jax
import jax.numpy as jnp

Position = int | jax.Array


class Mask(Protocol):
    """Decides which keys each query attends to. Every query must see at least one key."""

    def visible(self, queries: jax.Array, keys: jax.Array) -> jax.Array:
        """Whether each query sees each key, to be broadcast against scores `[B, K, G, T, S]`.

        Args:
          queries: index of each query, `int32[T]`, or `int32[B, T]` where rows differ.
          keys: index of each key, `int32[S]`.

        Returns:
          `bool[T, S]`, or `bool[B, 1, 1, T, S]` where rows differ.
        """
        ...

    def may_see(self, queries: range, keys: range) -> bool:
        """Whether any of these queries sees any of these keys, as far as its arrays are unknown."""
        ...

    def must_see(self, queries: range, keys: range) -> bool:
        """Whether each of these queries sees each of these keys, whatever its arrays are."""
        ...

    def of(self, rows: jax.Array) -> Mask:
        """The mask of some of its T queries: those at `rows`, int32, the last one beyond T."""
        ...

    @property
    def axes(self) -> tuple[tuple[str, ...], ...]:
        """The logical axes of its arrays, in their order."""
        ...


class Causal(NamedTuple):
    """Each query sees itself and everything before it."""

    def visible(self, queries: jax.Array, keys: jax.Array) -> jax.Array:
        """See `Mask`."""
        visible = queries[..., None] >= keys
        return visible if queries.ndim == 1 else visible[:, None, None]

    def may_see(self, queries: range, keys: range) -> bool:
        """See `Mask`."""
        return keys.start < queries.stop

    def must_see(self, queries: range, keys: range) -> bool:
        """See `Mask`."""
        return keys.stop <= queries.start + 1

    def of(self, rows: jax.Array) -> Causal:
        """See `Mask`."""
        return self

    @property
    def axes(self) -> tuple[tuple[str, ...], ...]:
        """See `Mask`."""
        return ()


CAUSAL = Causal()


class CausalWithinDocuments(NamedTuple):
    """Each query sees itself and what its own document holds before it.

    Attributes:
      starts: index of the first token of each query's document, `int32[B, T]`, at most the index of
        the query.
    """

    starts: jax.Array

    def visible(self, queries: jax.Array, keys: jax.Array) -> jax.Array:
        """See `Mask`."""
        own = keys >= self.starts[:, None, None, :, None]
        return own & CAUSAL.visible(queries, keys)

    def may_see(self, queries: range, keys: range) -> bool:
        """See `Mask`."""
        return CAUSAL.may_see(queries, keys)

    def must_see(self, queries: range, keys: range) -> bool:
        """See `Mask`."""
        return False

    def of(self, rows: jax.Array) -> CausalWithinDocuments:
        """See `Mask`."""
        return CausalWithinDocuments(jnp.take(self.starts, rows, axis=1, mode="clip"))

    @property
    def axes(self) -> tuple[tuple[str, ...], ...]:
        """See `Mask`."""
        return (("batch", "length"),)


class Bidirectional(NamedTuple):
    """Each query sees every key."""

    def visible(self, queries: jax.Array, keys: jax.Array) -> jax.Array:
        """See `Mask`."""
        return jnp.ones((queries.size, keys.size), bool)

    def may_see(self, queries: range, keys: range) -> bool:
        """See `Mask`."""
        return True

    def must_see(self, queries: range, keys: range) -> bool:
        """See `Mask`."""
        return True

    def of(self, rows: jax.Array) -> Bidirectional:
        """See `Mask`."""
        return self

    @property
    def axes(self) -> tuple[tuple[str, ...], ...]:
        """See `Mask`."""
        return ()


class Padded(NamedTuple):
    """Each query sees every key of its row before the padding at the end of the row.

    Attributes:
      lengths: number of tokens in each row before the padding, `int32[B]`. Of a row of padding
        alone, 0, queries see the first key, so that their softmax is a number in every format.
    """

    lengths: jax.Array

    def visible(self, queries: jax.Array, keys: jax.Array) -> jax.Array:
        """See `Mask`."""
        own = keys < jnp.maximum(self.lengths, 1)[:, None, None, None, None]
        return own & jnp.ones((queries.size, 1), bool)

    def may_see(self, queries: range, keys: range) -> bool:
        """See `Mask`."""
        return True

    def must_see(self, queries: range, keys: range) -> bool:
        """See `Mask`."""
        return False

    def of(self, rows: jax.Array) -> Padded:
        """See `Mask`."""
        return self

    @property
    def axes(self) -> tuple[tuple[str, ...], ...]:
        """See `Mask`."""
        return (("batch",),)


def indices_from(start: Position, length: int) -> jax.Array:
    """`int32[length]`, counting from `start`; `int32[B, length]` from `int32[B]`."""
    indices = jnp.arange(length, dtype=jnp.int32)
    return indices + (start if jnp.ndim(start) == 0 else jnp.asarray(start)[:, None])


def mask_and_positions(
    start: Position, length: int, document_starts: jax.Array | None
) -> tuple[Mask, jax.Array]:
    """What the tokens of a language model attend to, and where they stand in their documents.

    Args:
      start: index of the first of the tokens; int32[B] where it differs between rows.
      length: number of tokens, T.
      document_starts: index of the first token of each token's document, `int32[B, T]`; None: all
        belong to one document, which begins at index 0.

    Returns:
      The mask; and the positions, `int32[T]`, or `int32[B, T]` where rows differ.
    """
    indices = indices_from(start, length)
    if document_starts is None:
        return CAUSAL, indices
    return CausalWithinDocuments(document_starts), indices - document_starts
