"""Reads texts into a cache of keys and values, and draws what follows them, in compiled programs.

`Reader` reads one text that may grow, in chunks. `DecodingPrograms.draw` continues several texts
for a window of tokens without returning to Python: each row has its own length, and its keys and
values stand where they would stand if it were alone, so rows do not see each other and need no
padding.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, Final, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lmjax.data import document_starts
from lmjax.inference.run import TrainedModel
from lmjax.inference.sampling import NOT_FINITE, Limits, draw
from lmjax.model import Sites, decoding_params, extend, initial_cache, log_probabilities
from lmjax.precision import exact
from lmjax.precision.backend import this_backend
from lmjax.train import Phase

CHUNK: Final = 64
"""Prompt tokens read at a time: one shape, and so one compilation, for all lengths."""

WINDOW: Final = 64
"""The most tokens that are drawn in one call of a program."""

NOTHING: Final = -2
"""What stands in the result of a program where a row drew no token."""


def padded_length(tokens: int, context: int) -> int:
    """Positions for texts of so many tokens: a power of two of chunks, so that lengths share
    programs; at most the context.
    """
    length = CHUNK
    while length < tokens:
        length *= 2
    return min(length, context)


class Rows(NamedTuple):
    """Texts that are continued together, B of them; arrays of one number per row.

    Attributes:
      keys: random keys.
      pending: the last token, which is not read yet.
      length: number of tokens that are read: the position of `pending`.
      document: position of the first token of the document.
      drawn: number of tokens drawn so far.
      left: number of tokens that may still be drawn; 0: the row is finished.
      seen: bool[B, vocabulary], the tokens that the text holds.
    """

    keys: jax.Array
    pending: Any
    length: Any
    document: Any
    drawn: Any
    left: Any
    seen: Any


class DecodingPrograms(NamedTuple):
    """Compiled functions of one config and tokenizer.

    Attributes:
      prepare: `params -> decoding_params`, of what `TrainedModel.evaluated` is.
      start: `(rows, length) -> cache`.
      read: `(params, cache, tokens [1, T], start, last, document_starts) -> logits [V], cache`: the
        logits after the token at index `last`.
      place: `(cache, cache of one row, row) -> cache`.
      draw: `(params, cache, rows, limits, most) -> tokens [B, WINDOW], cache`: reads and draws
        until `most` tokens are drawn, all rows are finished, or the cache of an unfinished row is
        full. A row finishes after the end of a document or `NOT_FINITE`, which are returned too.
      follow: `(params, cache, rows, tokens [N + 1]) -> log-probabilities f32 or wider [N], cache`:
        of each of these tokens but the first, which is the only row's `pending`, as `draw` finds
        them; in nats.
    """

    prepare: Any
    start: Any
    read: Any
    place: Any
    draw: Any
    follow: Any


def programs_of(model: TrainedModel) -> DecodingPrograms:
    """The programs for a model."""
    return _programs(
        model.phase, model.tokenizer.start_of_document, model.tokenizer.end_of_document
    )


@functools.lru_cache(maxsize=4)
def _programs(phase: Phase, first_token: int, last_token: int) -> DecodingPrograms:
    model, functions = phase.config.model, _Functions(phase, first_token, last_token)
    given: dict[str, Any] = {"config": model, "sites": phase.sites}
    empty = functools.partial(initial_cache, model, phase.sites)
    loop: dict[str, Any] = {"donate_argnums": 1, "weights_in_loop": this_backend().platform}
    return DecodingPrograms(
        prepare=exact.jit(functools.partial(decoding_params, **given)),
        start=exact.jit(empty, static_argnums=(0, 1)),
        read=exact.jit(functions.read, donate_argnums=1),
        place=exact.jit(_placed, donate_argnums=0),
        draw=exact.jit(functions.draw, **loop),
        follow=exact.jit(functions.follow, **loop),
    )


def _placed(cache: Any, row: Any, index: jax.Array) -> Any:
    """See `DecodingPrograms.place`."""
    put = lambda all, one: jax.lax.dynamic_update_slice_in_dim(all, one, index, axis=0)
    return jax.tree.map(put, cache, row)


class _Functions(NamedTuple):
    """What is compiled.

    Attributes:
      phase: the config and its policy.
      first_token, last_token: the start and the end of a document.
    """

    phase: Phase
    first_token: int
    last_token: int

    def read(
        self,
        params: Any,
        cache: Any,
        tokens: jax.Array,
        start: jax.Array,
        last: jax.Array,
        starts: jax.Array | None,
    ) -> Any:
        """See `DecodingPrograms.read`."""
        logits, cache = self._extended(params, tokens, cache, start, starts)
        return logits[0, last], cache

    def draw(self, params: Any, cache: Any, rows: Rows, limits: Limits, most: jax.Array) -> Any:
        """See `DecodingPrograms.draw`."""
        batch, capacity = len(rows.pending), cache[0].positions

        def may_continue(state: tuple[Any, ...]) -> jax.Array:
            index, rows, *_ = state
            unfinished = rows.left > 0
            full = unfinished & (rows.length >= capacity)
            return (index < most) & unfinished.any() & ~full.any()

        def step(state: tuple[Any, ...]) -> tuple[Any, ...]:
            """Reads the last token of every row and draws the next."""
            index, rows, cache, drawn = state
            document = jnp.where(rows.pending == self.first_token, rows.length, rows.document)
            rows = rows._replace(document=document)
            logits, cache = self._all_rows(params, cache, rows)
            draws = jax.vmap(draw, in_axes=(0, 0, 0, 0, None))
            token = draws(rows.keys, rows.drawn, logits, rows.seen, limits)
            token = jnp.where(rows.left > 0, token, NOTHING)
            drawn = jax.lax.dynamic_update_slice_in_dim(drawn, token[:, None], index, axis=1)
            return index + 1, _with_drawn(rows, token, self.last_token), cache, drawn

        nothing = jnp.full((batch, WINDOW), NOTHING, jnp.int32)
        state = (jnp.int32(0), rows, cache, nothing)
        *_, cache, drawn = jax.lax.while_loop(may_continue, step, state)
        return drawn, cache

    def follow(self, params: Any, cache: Any, rows: Rows, tokens: jax.Array) -> Any:
        """See `DecodingPrograms.follow`."""
        site = self.phase.sites["loss"]

        def step(state: tuple[Rows, Any], target: jax.Array) -> tuple[Any, jax.Array]:
            """Reads the last token; the next one is given."""
            rows, cache = state
            logits, cache = self._all_rows(params, cache, rows)
            found = log_probabilities(logits[None], target[None, None], site)[0, 0]
            return (rows._replace(pending=target[None], length=rows.length + 1), cache), found

        (_, cache), found = jax.lax.scan(step, (rows, cache), tokens[1:])
        return found, cache

    def _all_rows(self, params: Any, cache: Any, rows: Rows) -> Any:
        """The logits `[B, V]` after the last token of every row, and the cache."""
        tokens, start = rows.pending[:, None], rows.length
        if len(tokens) > 1 and _rows_share_factors(self.phase.sites):
            each = jax.vmap(self._one_row, in_axes=(None, 0, 0, 0, 0))
            return each(params, tokens, cache, start, rows.document)
        starts = rows.document[:, None] if self._masked else None
        start = start if len(tokens) > 1 else start[0]
        logits, cache = self._extended(params, tokens, cache, start, starts)
        return logits[:, -1], cache

    def _one_row(self, params: Any, tokens: Any, cache: Any, start: Any, document: Any) -> Any:
        """The logits `[V]` after the last token `[1]` of one row, and its cache."""
        starts = jnp.full_like(tokens, document)[None] if self._masked else None
        cache = jax.tree.map(lambda leaf: leaf[None], cache)
        logits, cache = self._extended(params, tokens[None], cache, start, starts)
        return logits[0, -1], jax.tree.map(lambda leaf: leaf[0], cache)

    @property
    def _masked(self) -> bool:
        return self.phase.config.data.document_mask

    def _extended(self, params: Any, tokens: Any, cache: Any, start: Any, starts: Any) -> Any:
        config, sites = self.phase.config.model, self.phase.sites
        given = {"config": config, "sites": sites, "document_starts": starts}
        return extend(params, tokens, cache, start, **given)


def _with_drawn(rows: Rows, token: jax.Array, last_token: int) -> Rows:
    """Rows in which each unfinished one has one more token."""
    continues = (rows.left > 0) & (token != last_token) & (token != NOT_FINITE)
    either = lambda new, old: jnp.where(continues, new, old)
    everyone = jnp.arange(len(token))
    return rows._replace(
        pending=either(token, rows.pending),
        length=either(rows.length + 1, rows.length),
        drawn=either(rows.drawn + 1, rows.drawn),
        left=either(rows.left - 1, 0),
        seen=rows.seen.at[everyone, either(token, rows.pending)].set(True),
    )


def _rows_share_factors(sites: Sites) -> bool:
    """Whether a factor of activations is found in all rows, which are then read one by one."""
    operands = (site.activations for site in sites.values() if site.activations)
    return any(operand.quantizer.spans_tensor for operand in operands)


class Reader:
    """Reads a growing text and predicts the next token.

    Attributes:
      first: index of the token at position 0; earlier tokens are not seen.
      length: number of tokens in the cache, counted from `first`.
      cache: keys and values; None before the first token.
    """

    def __init__(self, model: TrainedModel, tokens: int, *, positions: int = 0, params: Any = None):
        """Creates a reader of a text that initially has `tokens` tokens.

        Args:
          model: reads.
          tokens: of the text.
          positions: length of the cache, at most the context; 0: the context.
          params: those of the model, prepared; None: they are prepared here.
        """
        self._context = model.config.context
        self._positions = positions or self._context
        self._programs = programs_of(model)
        self._params = self._programs.prepare(model.evaluated) if params is None else params
        self._start = model.tokenizer.start_of_document
        self._document_mask = model.config.data.document_mask
        self.first = max(tokens - self._context, 0)
        self.forget()

    def forget(self) -> None:
        """Begins with an empty cache."""
        self.length = 0
        self.cache: Any = None

    def logits(self, ids: Sequence[int]) -> jax.Array:
        """The logits `[V]` of the token after `ids`, which begin with those of the last call.

        When the context is full, its last half is read again as the beginning of a text, so every
        token is predicted from at least half a context.
        """
        if len(ids) - self.first > self._context:
            self.first = len(ids) - max(self._context // 2, 1)
            self.forget()
        if self.cache is None:
            self.cache = self._programs.start(1, self._positions)
        window = ids[self.first :]
        while self.length < len(window):
            logits = self._read(window)
        return logits

    def _read(self, window: Sequence[int]) -> jax.Array:
        """Reads up to a chunk of tokens; returns the logits after the last."""
        width = min(CHUNK, self._positions)
        # Fewer are read together with those before them: once more, which changes nothing.
        enough = len(window) - self.length >= width
        start = self.length if enough else max(len(window) - width, 0)
        part = window[start : start + width]
        tokens = np.full((1, width), self._start, np.int32)  # overwritten before it can be seen
        tokens[0, : len(part)] = part
        starts = None
        if self._document_mask:
            starts = np.zeros((1, width), np.int32)
            read = document_starts(np.asarray([window]), self._start)
            starts[:, : len(part)] = read[:, start : start + len(part)]
        self.length = start + len(part)
        last = np.int32(len(part) - 1)
        logits, self.cache = self._programs.read(
            self._params, self.cache, tokens, np.int32(start), last, starts
        )
        return logits
