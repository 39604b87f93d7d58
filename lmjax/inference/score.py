"""Scores texts: the log-probability of every token under a model."""

from __future__ import annotations

import codecs
import dataclasses
import functools
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lmjax import checks
from lmjax.checks import at_least
from lmjax.console import stages
from lmjax.data import Tokenizer
from lmjax.data.tokenizers import Ids
from lmjax.inference.finite import not_finite
from lmjax.inference.reading import padded_length
from lmjax.inference.run import TrainedModel, refuse_encoder
from lmjax.model import apply, in_evaluation, log_probabilities
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
        return bits_per_byte(-self.total, self.bytes)


@dataclass(frozen=True)
class Perplexity:
    """How well a model predicts a text, as the beginning of a document.

    Attributes:
      tokens: number of tokens of the text.
      bytes: length of the text in UTF-8.
      nats: the negative logarithm of its probability.
    """

    tokens: int
    bytes: int
    nats: float

    @property
    def nats_per_token(self) -> float:
        """Cross entropy, nats per token."""
        return self.nats / self.tokens

    @property
    def perplexity(self) -> float:
        """exp(nats per token)."""
        return perplexity_of(self.nats_per_token)

    @property
    def bits_per_byte(self) -> float:
        """Cross entropy in bits per byte of text, comparable between tokenizers."""
        return bits_per_byte(self.nats, self.bytes)

    def __add__(self, other: Perplexity) -> Perplexity:
        """Of both texts, each a document of its own."""
        pairs = zip(dataclasses.astuple(self), dataclasses.astuple(other), strict=True)
        return Perplexity(*(a + b for a, b in pairs))


def perplexity_of(nats: float) -> float:
    """Exp of a cross entropy in nats per token."""
    # Beyond exp(709) Python raises, where IEEE 754 gives infinity.
    return math.exp(nats) if not nats > 709 else math.inf


def bits_per_byte(nats: float, length: int) -> float:
    """A cross entropy in nats of a text of so many bytes, in bits per byte."""
    return nats / math.log(2) / length


def score(model: TrainedModel, text: str, *, stride: int = 0) -> Score:
    """Computes the log-probability of every token of a text.

    The text is one document, so a document mask has no effect. A text longer than the context is
    read in windows, each `stride` tokens after the one before; a token is predicted from the first
    window that holds it, so from at least `context - stride` tokens after the first window.

    Args:
      model: from `load_model`.
      text: as the beginning of a document.
      stride: from 1, the most exact, to the context; 0: half a context.

    Raises:
      InputError: the model is an encoder.
      ValueError: the text is empty, or the stride out of range.
      NonFiniteError: the logits of a token or its log-probability are NaN or infinite.
    """
    ids, scores = _scores(model, text, stride)
    return Score(
        tokens=tuple(model.tokenizer.decode([token]) for token in ids),
        log_probabilities=tuple(scores),
        pieces=tuple(_pieces(model.tokenizer, ids.tolist(), scores)),
        bytes=len(text.encode()),
    )


def perplexity(model: TrainedModel, text: str, *, stride: int = 0) -> Perplexity:
    """Computes how well a model predicts a text; see `score`."""
    ids, scores = _scores(model, text, stride)
    return Perplexity(len(ids), len(text.encode()), -math.fsum(scores))


def _scores(model: TrainedModel, text: str, stride: int) -> tuple[Ids, list[float]]:
    """The tokens of a text, and the log-probability of each."""
    refuse_encoder(model)
    context = model.config.context
    checks.validate_value("stride", stride, Annotated[int, at_least(0, most=context)])
    stride = stride or max(context // 2, 1)
    ids = model.tokenizer.encode(text)
    if not len(ids):
        raise ValueError("there is no text to score")
    tokens = np.concatenate([[model.tokenizer.start_of_document], ids]).astype(np.int32)
    starts = range(0, max(len(ids) - context, 0) + stride, stride)
    scores: list[float] = []
    with stages.stage("scoring the text"):
        windows = (tokens[start : start + context + 1] for start in starts)
        for start, scored in zip(starts, scored_windows(model, windows), strict=True):
            scores += scored.log_probabilities[len(scores) - start :].tolist()
            if not all(map(math.isfinite, scores[start:])):
                first = next(i for i, value in enumerate(scores) if not math.isfinite(value))
                raise not_finite(model, f"the logits of token {first + 1} of the text")
    return ids, scores


class ScoredWindow(NamedTuple):
    """What a model predicts in a window of N tokens.

    Attributes:
      log_probabilities: of all tokens but the first given those before, f64[N - 1], in nats; NaN if
        any of the logits that one is computed from is not finite.
      likeliest: whether each is the likeliest token, bool[N - 1].
    """

    log_probabilities: np.ndarray
    likeliest: np.ndarray


def scored_windows(model: TrainedModel, windows: Iterable[Ids]) -> Iterator[ScoredWindow]:
    """Scores windows of 2 to `context + 1` tokens.

    Each is read by itself, so that windows share no factors of activations.
    """
    program, context = _window_scores(model.phase), model.config.context
    for window in windows:
        count = len(window) - 1
        padded = np.zeros((1, padded_length(count, context) + 1), np.int32)
        padded[0, : len(window)] = window
        found, likeliest = program(model.evaluated, padded[:, :-1], padded[:, 1:])
        yield ScoredWindow(
            np.asarray(found, np.float64)[0, :count], np.asarray(likeliest)[0, :count]
        )


@functools.lru_cache(maxsize=4)
def _window_scores(phase: Phase) -> Any:
    """The compiled `(params, inputs, targets) -> log-probabilities, likeliest`, `[1, T]` each."""
    model, sites = phase.config.model, phase.sites

    def window_scores(params: Any, inputs: jax.Array, targets: jax.Array) -> Any:
        own, context = in_evaluation(params)
        logits = apply(own, inputs, config=model, sites=sites, context=context)
        found = log_probabilities(logits, targets, sites["loss"])
        found = jnp.where(jnp.isfinite(logits).all(axis=-1), found, jnp.nan)
        return found, jnp.argmax(logits, axis=-1) == targets

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
