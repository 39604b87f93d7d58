"""How likely a text is to a model."""

from __future__ import annotations

import math
from dataclasses import dataclass

import jax
import numpy as np

from lmjax import stages
from lmjax.inference.run import TrainedModel
from lmjax.model import Params, apply, log_probabilities
from lmjax.precision import exact


@dataclass(frozen=True)
class Score:
    """Log-probabilities of a text as a document's beginning.

    Attributes:
      tokens: the text of each token.
      log_probabilities: of each token given all before it (within the context), in nats.
      bytes: length of the text in UTF-8.
    """

    tokens: tuple[str, ...]
    log_probabilities: tuple[float, ...]
    bytes: int

    @property
    def total(self) -> float:
        """Log-probability of the whole text, in nats."""
        return math.fsum(self.log_probabilities)

    @property
    def bits_per_byte(self) -> float:
        """Cross entropy in bits per byte of text, comparable between tokenizers."""
        return -self.total / math.log(2) / self.bytes


def score(model: TrainedModel, text: str) -> Score:
    """Log-probability of every token of a text.

    A text longer than the context is read in windows that overlap by half, so that every token but
    those of the first window is predicted from at least half a context.

    Raises:
      ValueError: the text is empty.
    """
    ids = model.tokenizer.encode(text)
    if not len(ids):
        raise ValueError("there is no text to score")
    stream = np.concatenate([[model.tokenizer.end_of_document], ids]).astype(np.int32)
    config, sites, context = model.config.model, model.sites, model.config.context

    def window_scores(params: Params, inputs: jax.Array, targets: jax.Array) -> jax.Array:
        logits = apply(params, inputs, config=config, sites=sites)
        return log_probabilities(logits, targets, sites["loss"])

    compiled = exact.jit(window_scores)
    scores = np.full(len(ids), np.nan, np.float64)
    stride = max(context // 2, 1)
    for start in range(0, max(len(ids) - context, 0) + stride, stride):
        part = stream[start : start + context + 1]
        padded = np.zeros((1, context + 1), np.int32)
        padded[0, : len(part)] = part
        with stages.stage("scoring the text"):
            window = compiled(model.params, padded[:, :-1], padded[:, 1:])
        window = np.asarray(window, np.float64)[0, : len(part) - 1]
        fresh = np.isnan(scores[start : start + len(window)])
        scores[start : start + len(window)][fresh] = window[fresh]
    return Score(
        tokens=tuple(model.tokenizer.decode([token]) for token in ids),
        log_probabilities=tuple(float(value) for value in scores),
        bytes=len(text.encode()),
    )
