"""Generates text, one token at a time."""

from __future__ import annotations

import codecs
import functools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from lmjax.data import document_starts
from lmjax.inference.finite import not_finite
from lmjax.inference.run import TrainedModel, refuse_encoder
from lmjax.inference.sampling import NOT_FINITE, Sampler, refuse_no_count
from lmjax.model import Sites, decoding_params, extend, initial_cache
from lmjax.precision import exact
from lmjax.precision.contraction import bf16_pays
from lmjax.train import Phase

CHUNK = 64
"""Prompt tokens read at a time: one shape, and so one compilation, for all lengths."""


def generate(
    model: TrainedModel,
    prompt: str,
    *,
    tokens: int = 200,
    temperature: float = 0.8,
    top_k: int = 0,
    seed: int = 0,
) -> str:
    """Returns the model's continuation of a prompt: everything that `stream` yields."""
    return "".join(
        stream(model, prompt, tokens=tokens, temperature=temperature, top_k=top_k, seed=seed)
    )


def stream(
    model: TrainedModel,
    prompt: str,
    *,
    tokens: int = 200,
    temperature: float = 0.8,
    top_k: int = 0,
    seed: int = 0,
) -> Continuation:
    """Continues a prompt piece by piece, as tokens are drawn.

    The text ends after `tokens` tokens or where the model ends the document. Each token is read
    once; its keys and values are kept, in the formats of the policy, until the context is full.
    Then the last half of the context is reread as the beginning of a text, so every token is drawn
    from at least half a context. If the prompt exceeds the context, only its last tokens are read.
    The same arguments give the same text.

    Args:
      model: from `load_model`.
      prompt: text to continue; empty: the start of a document.
      tokens: most tokens to generate; may be 0.
      temperature: divides the logits; 0 takes the likeliest token, the first of equal ones.
      top_k: draw only from this many of the likeliest tokens, preferring lower ids among equals;
        from all tokens of the tokenizer if 0 or above their number.
      seed: seed of the draws; an integer in [0, 2**64).

    Returns:
      An iterator over strings of whole characters. Bytes that are not UTF-8 become U+FFFD; an
      incomplete character after the last of `tokens` tokens is dropped.

    Raises:
      InputError: the model is an encoder.
      ValueError: a setting is negative, not finite or of the wrong type.
      NonFiniteError: while iterating, if the logits of a token contain NaN or infinity.
    """
    refuse_encoder(model)
    refuse_no_count("tokens", tokens)
    sampler = Sampler(model.tokenizer.vocab_size, temperature, top_k, seed)
    ids = [model.tokenizer.start_of_document, *map(int, model.tokenizer.encode(prompt))]
    return Continuation(model, ids, sampler, tokens)


class Continuation(Iterator[str]):
    """A continuation that is being generated.

    Attributes:
      tokens: how many tokens have been drawn so far.
      ended: whether the model has ended the document.
    """

    def __init__(self, model: TrainedModel, ids: Sequence[int], sampler: Sampler, limit: int):
        """See `stream`; `ids` are the tokens so far, including the start of the document."""
        self.tokens = 0
        self.ended = False
        self._model = model
        self._drawn = self._draw(list(ids), sampler, limit)
        self._pieces = self._whole_characters()

    def __next__(self) -> str:
        """The next whole characters."""
        return next(self._pieces)

    def _whole_characters(self) -> Iterator[str]:
        tokenizer = self._model.tokenizer
        decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        for token in self._drawn:
            if piece := decoder.decode(tokenizer.bytes_of([token])):
                yield piece
        # A character cut off by the limit is dropped; one that the model left incomplete is broken.
        if self.ended and (rest := decoder.decode(b"", final=True)):
            yield rest

    def _draw(self, ids: list[int], sampler: Sampler, limit: int) -> Iterator[int]:
        reader = Reader(self._model, len(ids))
        while self.tokens < limit:
            token = sampler.draw(reader.logits(ids), self.tokens)
            if token == NOT_FINITE:
                what = f"the logits of token {self.tokens + 1} of the continuation"
                raise not_finite(self._model, what)
            if token == self._model.tokenizer.end_of_document:
                self.ended = True
                return
            ids.append(token)
            self.tokens += 1
            yield token


class Reader:
    """Reads a growing text and predicts the next token.

    Attributes:
      first: index of the token at position 0; earlier tokens are not seen.
      length: number of tokens in the cache, counted from `first`.
    """

    def __init__(self, model: TrainedModel, tokens: int):
        """Creates a reader of a text that initially has `tokens` tokens."""
        self._context = model.config.context
        self._programs = _programs(model.phase)
        self._params = self._programs.prepare(model.params)
        self._step = _step_width(model.sites)
        self._start = model.tokenizer.start_of_document
        self._document_mask = model.config.data.document_mask
        self.first = max(tokens - self._context, 0)
        self._forget()

    def _forget(self) -> None:
        self.length = 0
        self._cache = self._programs.start()

    def logits(self, ids: Sequence[int]) -> jax.Array:
        """The logits `[V]` of the token after `ids`, which begin with those of the last call."""
        if len(ids) - self.first > self._context:
            self.first = len(ids) - max(self._context // 2, 1)
            self._forget()
        window = ids[self.first :]
        while self.length < len(window):
            logits = self._read(window)
        return logits

    def _read(self, window: Sequence[int]) -> jax.Array:
        """Reads one token, or up to a chunk of them; returns the logits after the last."""
        unread = len(window) - self.length
        width = min(self._step if unread == 1 else CHUNK, self._context)
        # Fewer are read together with those before them: once more, which changes nothing.
        start = self.length if unread >= width else max(len(window) - width, 0)
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
        logits, self._cache = self._programs.read(
            self._params, self._cache, tokens, np.int32(start), last, starts
        )
        return logits


def _step_width(sites: Sites) -> int:
    """Number of tokens to read in order to draw one: 1, or 2 if that is faster.

    XLA's bf16 products on CPU, if used, take six times as long for one row as for two.
    """
    narrow = any(site.compute.name == "bf16" for site in sites.values())
    return 2 if narrow and jax.default_backend() == "cpu" and bf16_pays() else 1


class _Programs(NamedTuple):
    """Compiled functions of one config.

    Attributes:
      prepare: `params -> decoding_params`.
      start: `() -> cache`, of the length of the context.
      read: `(params, cache, tokens [1, T], start, last, document_starts) -> logits [V], cache`: the
        logits after the token at index `last`.
    """

    prepare: Any
    start: Any
    read: Any


@functools.lru_cache(maxsize=4)
def _programs(phase: Phase) -> _Programs:
    config, sites = phase.config, phase.sites
    model = config.model

    def read(
        params: Any,
        cache: Any,
        tokens: jax.Array,
        start: jax.Array,
        last: jax.Array,
        starts: jax.Array | None,
    ) -> Any:
        """See `_Programs.read`."""
        logits, cache = extend(
            params, tokens, cache, start, config=model, sites=sites, document_starts=starts
        )
        return logits[0, last], cache

    return _Programs(
        prepare=exact.jit(lambda params: decoding_params(params, config=model, sites=sites)),
        start=exact.jit(lambda: initial_cache(model, sites, 1, config.context)),
        read=exact.jit(read, donate_argnums=1),
    )
