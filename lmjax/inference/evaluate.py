"""Evaluates a run on the validation split of its own data."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from lmjax.console import stages
from lmjax.data import tokenized_corpus
from lmjax.inference.finite import not_finite
from lmjax.inference.run import TrainedModel
from lmjax.inference.score import bits_per_byte, perplexity_of
from lmjax.parallel import sharding
from lmjax.train import make_eval_step, phase_of
from lmjax.train.classes import held_out_classes
from lmjax.train.evaluate import held_out_loss
from lmjax.train.start import refuse_running_text


@dataclass(frozen=True)
class Evaluation:
    """Loss over the whole validation split.

    Attributes:
      step: training step of the parameters.
      tokens: number of tokens that follow another; an encoder predicts some of them.
      eval_loss: mean cross entropy, nats per token.
      perplexity: exp(eval_loss).
      bits_per_byte: cross entropy per byte of text, comparable between tokenizers; None for an
        encoder, which does not predict every token.
      accuracy, f1: of a model that tells classes apart; see `Confusion`.
    """

    step: int
    tokens: int
    eval_loss: float
    perplexity: float
    bits_per_byte: float | None
    accuracy: float | None = None
    f1: float | None = None


def evaluate(model: TrainedModel, *, progress: bool = True) -> Evaluation:
    """Evaluates a model on the whole validation split that its run held out.

    Raises:
      InputError: the model needs more than running text.
      NonFiniteError: the loss of a batch is NaN or infinite.
    """
    refuse_running_text(model.config, model.tokenizer)
    phase = phase_of(dataclasses.replace(model.config, mesh=sharding.MeshConfig()))
    config = phase.config
    with stages.stage("reading the text"):
        corpus = tokenized_corpus(config.data, window=config.context + 1, progress=progress)
    mesh = sharding.make_mesh(config.mesh, config.reductions.devices(jax.devices()))
    with stages.stage("evaluating on the whole validation split"):
        scores: tuple[float | None, float | None] = None, None
        if config.model.classes:
            loss, classes = held_out_classes(phase, model.evaluated, corpus, mesh)
            scores = classes.accuracy, classes.f1
        else:
            eval_step = _refusing_non_finite(make_eval_step(phase, mesh), model)
            loss = held_out_loss(eval_step, model.evaluated, corpus, config, mesh)
    tokens = len(corpus.validation) - 1
    bits = None
    if config.model.family == "decoder":
        bits = bits_per_byte(loss * tokens, corpus.validation_bytes)
    return Evaluation(model.step, tokens, loss, perplexity_of(loss), bits, *scores)


def _refusing_non_finite(eval_step: Callable[..., Any], model: TrainedModel) -> Callable[..., Any]:
    """Wraps the evaluation step so that it names the first batch with a non-finite loss."""
    numbers = itertools.count(1)

    def checked(params: Any, batch: Any) -> Any:
        number, (nats, tokens) = next(numbers), eval_step(params, batch)
        if not np.isfinite(np.asarray(nats)):
            raise not_finite(model, f"the losses in batch {number} of the validation split")
        return nats, tokens

    return checked
