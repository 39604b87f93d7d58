"""Compares the log-probabilities of training's forward pass with those of decoding.

A text is read three ways: whole, as training and evaluation do; token by token from a cache of keys
and values, as `generate` does; and again from its start for every token.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np

from lmjax.inference.finite import not_finite
from lmjax.inference.reading import Reader, Rows, padded_length, programs_of
from lmjax.inference.run import TrainedModel, refuse_encoder
from lmjax.inference.sampling import Sampler, Sampling
from lmjax.inference.score import scored_windows
from lmjax.precision.formats import Format

_ROUNDINGS: Final = 8
"""How many roundings of the compute format the log-probability of a token may differ by."""


@dataclass(frozen=True)
class Parity:
    """Log-probabilities of the tokens of a text, in nats, by the ways that they were computed.

    Attributes:
      forward: of training's forward pass over the whole text.
      decoded: of decoding from a cache.
      rerun: of the forward pass over the text before each token.
      bound: how far `decoded` may be from `forward`.
      why: what makes them differ beyond the order of sums; empty: nothing.
    """

    forward: np.ndarray
    decoded: np.ndarray
    rerun: np.ndarray
    bound: float
    why: str

    @property
    def difference(self) -> float:
        """The largest of a token between training and decoding."""
        return float(np.abs(self.forward - self.decoded).max())

    @property
    def rerun_difference(self) -> float:
        """The largest of a token between decoding and reading all before it again."""
        return float(np.abs(self.rerun - self.decoded).max())

    @property
    def equal(self) -> int:
        """How many tokens have the same log-probability, to the bit, in training and decoding."""
        return int((self.forward == self.decoded).sum())

    @property
    def holds(self) -> bool:
        """Whether both differences are within the bound."""
        return max(self.difference, self.rerun_difference) <= self.bound


def parity(model: TrainedModel, text: str) -> Parity:
    """Computes the log-probabilities of a text in three ways.

    The bound is 8 roundings, in the narrowest format that the model computes in, of numbers as
    large as the largest log-probability; or one in the narrowest format that activations are
    quantized to, if that is more.

    Raises:
      InputError: the model is an encoder.
      ValueError: the text is shorter than two tokens, or longer than the context.
      NonFiniteError: logits are NaN or infinite.
    """
    refuse_encoder(model)
    start = model.tokenizer.start_of_document
    ids = np.asarray([start, *model.tokenizer.encode(text)], np.int32)
    context = model.config.context
    if not 3 <= len(ids) <= context + 1:
        raise ValueError(
            f"the text has {len(ids) - 1} tokens; it must have at least 2 and at most as many as "
            f"the context, {context}"
        )
    (whole,) = scored_windows(model, [ids])
    forward = whole.log_probabilities
    prefixes = (np.r_[ids[:n], np.zeros(len(ids) - n, np.int32)] for n in range(2, len(ids) + 1))
    rerun = [found.log_probabilities[n] for n, found in enumerate(scored_windows(model, prefixes))]
    if not np.isfinite(forward).all():
        raise not_finite(model, "the logits of the text")
    rounding, why = _rounding(model)
    bound = rounding * max(float(np.abs(forward).max()), 1.0)
    return Parity(forward, _decoded(model, ids), np.asarray(rerun), bound, why)


def _decoded(model: TrainedModel, ids: np.ndarray) -> np.ndarray:
    """The log-probability of all tokens but the first, from a cache; f64[N - 1]."""
    positions = padded_length(len(ids), model.config.context)
    programs = programs_of(model)
    params = programs.prepare(model.evaluated)
    reader = Reader(model, 1, positions=positions, params=params)
    logits = np.asarray(reader.logits(ids[:1].tolist()), np.float64)
    first = logits[ids[1]] - logits.max() - np.log(np.exp(logits - logits.max()).sum())
    sampler = Sampler(model.tokenizer.vocab_size, Sampling(), 0)
    rows = Rows(
        keys=sampler.key[None],
        pending=ids[1:2],
        length=np.ones(1, np.int32),
        document=np.zeros(1, np.int32),
        drawn=np.zeros(1, np.uint32),
        left=np.ones(1, np.int32),
        seen=np.zeros((1, sampler.vocabulary), bool),
    )
    rest, _ = programs.follow(params, reader.cache, rows, ids[1:])
    return np.concatenate([[first], np.asarray(rest, np.float64)])


def _rounding(model: TrainedModel) -> tuple[float, str]:
    """The bound relative to the largest number, and why sums are not all that differs."""
    sites = model.sites.values()
    bound = _ROUNDINGS * max(max(_unit(site.compute), _unit(site.output)) for site in sites)
    quantized = [site.activations.quantizer for site in sites if site.activations]
    quantized += [site.cache for site in sites if site.cache]
    if not quantized:
        return bound, ""
    shared = any(quantizer.spans_tensor for quantizer in quantized)
    why = "tokens share factors" if shared else "roundings of activations"
    return max(bound, *(_unit(quantizer.format) for quantizer in quantized)), why


def _unit(number_format: Format) -> float:
    """Half the distance of numbers next to 1 relative to 1; of integers, next to the largest."""
    if number_format.is_integer:
        return 0.5 / 2 ** (number_format.bits - 1)
    return 2.0 ** -(number_format.mantissa_bits + 1)
