"""Scores texts: the log-probability of every token under a model."""

from __future__ import annotations

import codecs
import functools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lmjax.console import stages
from lmjax.data import Tokenizer
from lmjax.inference.finite import not_finite
from lmjax.inference.run import TrainedModel, refuse_encoder
from lmjax.model import Params, apply, log_probabilities
from lmjax.precision import exact
from lmjax.train import Phase


@dataclass(frozen=True)
class Piece:
    """A shortest run of tokens that together form whole characters.

    Attributes:
      text: the characters.
      tokens: number of tokens; several if a token is only part of a character.
      log_probability: of these tokens given all before them, in nats.
    """

    text: str
    tokens: int
    log_probability: float


@dataclass(frozen=True)
class Score:
    """Log-probabilities of a text as the beginning of a document.

    Attributes:
      tokens: the text of each token; U+FFFD for part of a character.
      log_probabilities: of each token given all before it (within the context), in nats.
      pieces: the same text in whole characters.
      bytes: length of the text in UTF-8.
    """

    tokens: tuple[str, ...]
    log_probabilities: tuple[float, ...]
    pieces: tuple[Piece, ...]
    bytes: int

    @property
    def total(self) -> float:
        """Log-probability of the whole text, in nats."""
        return math.fsum(self.log_probabilities)

    @property
    def log10(self) -> float:
        """The decimal logarithm of the probability P of the whole text."""
        return self.total / math.log(10)

    @property
    def probability(self) -> str:
        """P as a decimal with two digits, such as `3.2e-145`; it may be too small for a float."""
        if self.log10 > -4:
            return f"{10**self.log10:.2g}"
        exponent = math.floor(self.log10)
        digits = f"{10 ** (self.log10 - exponent):.1f}"
        return f"1.0e{exponent + 1}" if digits == "10.0" else f"{digits}e{exponent}"

    @property
    def bits_per_byte(self) -> float:
        """Cross entropy in bits per byte of text, comparable between tokenizers."""
        return -self.total / math.log(2) / self.bytes


def score(model: TrainedModel, text: str) -> Score:
    """Computes the log-probability of every token of a text.

    The text is one document, so a document mask has no effect. A text longer than the context is
    read in windows that overlap by half, so that every token after the first window is predicted
    from at least half a context.

    Raises:
      InputError: the model is an encoder.
      ValueError: the text is empty.
      NonFiniteError: the logits of a token or its log-probability are NaN or infinite.
    """
    refuse_encoder(model)
    ids = model.tokenizer.encode(text)
    if not len(ids):
        raise ValueError("there is no text to score")
    stream = np.concatenate([[model.tokenizer.start_of_document], ids]).astype(np.int32)
    context = model.config.context
    window_scores = _window_scores(model.phase)
    scores: list[float] = []
    stride = max(context // 2, 1)
    for start in range(0, max(len(ids) - context, 0) + stride, stride):
        part = stream[start : start + context + 1]
        padded = np.zeros((1, context + 1), np.int32)
        padded[0, : len(part)] = part
        with stages.stage("scoring the text"):
            window = window_scores(model.params, padded[:, :-1], padded[:, 1:])
        window = np.asarray(window, np.float64)[0, : len(part) - 1]
        scores += window[len(scores) - start :].tolist()
        if not all(map(math.isfinite, scores)):
            first = next(i for i, value in enumerate(scores) if not math.isfinite(value))
            raise not_finite(model, f"the logits of token {first + 1} of the text")
    return Score(
        tokens=tuple(model.tokenizer.decode([token]) for token in ids),
        log_probabilities=tuple(scores),
        pieces=tuple(_pieces(model.tokenizer, ids.tolist(), scores)),
        bytes=len(text.encode()),
    )


@functools.lru_cache(maxsize=4)
def _window_scores(phase: Phase) -> Any:
    """The compiled `(params, inputs, targets) -> log-probabilities`, `[1, context]` each.

    A log-probability is NaN if any of the logits that it is computed from is not finite.
    """
    model, sites = phase.config.model, phase.sites

    def window_scores(params: Params, inputs: jax.Array, targets: jax.Array) -> jax.Array:
        logits = apply(params, inputs, config=model, sites=sites)
        found = log_probabilities(logits, targets, sites["loss"])
        return jnp.where(jnp.isfinite(logits).all(axis=-1), found, jnp.nan)

    return exact.jit(window_scores)


def _pieces(tokenizer: Tokenizer, ids: Sequence[int], scores: Sequence[float]) -> Iterator[Piece]:
    """Groups the tokens of a text into the shortest runs that form whole characters."""
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    text, first = "", 0
    for index, token in enumerate(ids):
        text += decoder.decode(tokenizer.bytes_of([token]))
        incomplete, _ = decoder.getstate()
        if not incomplete:
            yield Piece(text, index + 1 - first, math.fsum(scores[first : index + 1]))
            text, first = "", index + 1
