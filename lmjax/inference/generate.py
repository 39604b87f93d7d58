"""Continuing a text, one token at a time."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lmjax import stages
from lmjax.inference.run import TrainedModel
from lmjax.model import Sites, decoding_params, extend, initial_cache
from lmjax.precision import exact
from lmjax.precision.contraction import bf16_pays
from lmjax.train import Config, refuse_no_seed, seed_key

CHUNK = 64
"""Tokens of a prompt that are read at a time: one shape, and one compilation, for all lengths."""


def generate(
    model: TrainedModel,
    prompt: str,
    *,
    tokens: int = 200,
    temperature: float = 0.8,
    top_k: int = 0,
    seed: int = 0,
) -> str:
    """The model's continuation of a prompt, without the prompt.

    It ends after `tokens` tokens or where the model ends the document. Every token is read once and
    its keys and values are kept, in the formats of the policy, until the context is full. Then the
    last half of it is read anew as the beginning of a text, so that every token is drawn from at
    least half a context; of a prompt longer than the context the last tokens are read.

    Args:
      model: what `load_model` gives.
      prompt: text to go on from; empty: the start of a document.
      tokens: most tokens to generate.
      temperature: divides the logits; 0 takes the likeliest token.
      top_k: draw from this many likeliest tokens only; 0: from all.
      seed: of the draws.

    Raises:
      ValueError: a negative number, or a seed beyond 2**64 - 1.
    """
    if min(tokens, temperature, top_k) < 0:
        raise ValueError("tokens, temperature and top_k must not be negative")
    refuse_no_seed("seed", seed)
    drawn = _draw(model, prompt, temperature, top_k, seed)
    ids = [token for _, token in zip(range(tokens), drawn, strict=False)]
    return model.tokenizer.decode(np.asarray(ids, np.int32))


def _draw(
    model: TrainedModel, prompt: str, temperature: float, top_k: int, seed: int
) -> Iterator[int]:
    end = model.tokenizer.end_of_document
    ids = [end, *map(int, model.tokenizer.encode(prompt))]
    reader = Reader(model, len(ids))
    key = seed_key(seed)
    for index in range(2**31 - 1):
        with stages.stage("generating text"):
            logits = reader.logits(ids)[: model.tokenizer.vocab_size]
            token = int(_choose(jax.random.fold_in(key, index), logits, temperature, top_k))
        if token == end:
            return
        ids.append(token)
        yield token


class Reader:
    """Reads a growing text and says what comes next.

    Attributes:
      first: index of the token at position 0: what stands before it is not seen.
      length: how many tokens from there on are in the cache.
    """

    def __init__(self, model: TrainedModel, tokens: int):
        """A reader of a text that has `tokens` tokens at first."""
        self._context = model.config.context
        self._programs = _programs(model.config)
        self._params = self._programs.prepare(model.params)
        self._step = _step_width(model.sites)
        self._padding = model.tokenizer.end_of_document
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
        """Reads one token, or up to a chunk of them; the logits after the last."""
        unread = len(window) - self.length
        width = min(self._step if unread == 1 else CHUNK, self._context)
        # Fewer are read together with those before them: once more, which changes nothing.
        start = self.length if unread >= width else max(len(window) - width, 0)
        part = window[start : start + width]
        tokens = np.full((1, width), self._padding, np.int32)  # overwritten before it can be seen
        tokens[0, : len(part)] = part
        self.length = start + len(part)
        logits, self._cache = self._programs.read(
            self._params, self._cache, tokens, np.int32(start), np.int32(len(part) - 1)
        )
        return logits


def _step_width(sites: Sites) -> int:
    """How many tokens are read to draw one: 1, or 2 where that is faster.

    XLA's bf16 products on CPU, where they are used, take six times as long for one row as for two.
    """
    narrow = any(site.compute.name == "bf16" for site in sites.values())
    return 2 if narrow and jax.default_backend() == "cpu" and bf16_pays() else 1


class _Programs(NamedTuple):
    """Compiled functions of one config.

    Attributes:
      prepare: `params -> decoding_params`.
      start: `() -> cache`, of the length of the context.
      read: `(params, cache, tokens [1, T], start, last) -> logits [V], cache`: the logits after the
        token at index `last`.
    """

    prepare: Any
    start: Any
    read: Any


@functools.lru_cache(maxsize=4)
def _programs(config: Config) -> _Programs:
    model, sites = config.model, config.sites

    def read(params: Any, cache: Any, tokens: jax.Array, start: jax.Array, last: jax.Array) -> Any:
        logits, cache = extend(params, tokens, cache, start, config=model, sites=sites)
        return logits[0, last], cache

    return _Programs(
        prepare=exact.jit(lambda params: decoding_params(params, config=model, sites=sites)),
        start=exact.jit(lambda: initial_cache(model, sites, 1, config.context)),
        read=exact.jit(read, donate_argnums=1),
    )


@functools.partial(exact.jit, static_argnums=(2, 3))
def _choose(key: jax.Array, logits: jax.Array, temperature: float, top_k: int) -> jax.Array:
    logits = logits.astype(jnp.float32)
    if temperature == 0:
        return jnp.argmax(logits)
    if top_k:
        least = jax.lax.top_k(logits, min(top_k, logits.size))[0][-1]
        logits = jnp.where(logits >= least, logits, -jnp.inf)
    return jax.random.categorical(key, logits / temperature)
