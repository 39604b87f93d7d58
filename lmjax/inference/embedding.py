"""Sentence embeddings: what an encoder makes of whole texts. Knows JAX and the encoder."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lmjax.data import document_rows
from lmjax.inference.run import TrainedModel
from lmjax.model import ANYWHERE, assembled, in_evaluation
from lmjax.precision import exact
from lmjax.precision.exact import at_least_f32
from lmjax.train import InputError, Phase

_ROWS = 32
_MULTIPLE = 32
"""Rows are as long as the longest of their texts, rounded up to this: few shapes to compile."""


def sentence_embeddings(
    model: TrainedModel, texts: Sequence[str], *, length: int = 256
) -> np.ndarray:
    """The mean of what leaves the last block over the tokens of each text, divided by its norm.

    As sentence-transformers do (Reimers and Gurevych 2019, section 3): the tokens include those
    before and after the text, padding does not count, and longer texts are cut.

    Args:
      model: an encoder, from `load_model`.
      texts: any number of them.
      length: most tokens of a text, at most those that the model has positions for.

    Returns:
      f32 `[len(texts), width]`, rows of norm 1.

    Raises:
      InputError: the model is a decoder.
      ValueError: `length` is below 2.
    """
    if model.config.model.family != "encoder":
        raise InputError("the model is a decoder, which does not embed texts; import an encoder")
    if length < 2:
        raise ValueError(f"length is {length}; it must be at least 2, the tokens around a text")
    length = min(length, model.config.model.max_positions)
    embed = _program(model.phase)
    start, end = model.tokenizer.start_of_document, model.tokenizer.end_of_document
    documents = [
        np.concatenate([[start], ids[: length - 2], [end]])
        for ids in model.tokenizer.encode_batch(texts)
    ]
    # Texts of like length together, so that little is padding.
    order = sorted(range(len(texts)), key=lambda index: len(documents[index]))
    found = np.zeros((len(texts), model.config.model.width), np.float32)
    for first in range(0, len(order), _ROWS):
        chosen = order[first : first + _ROWS]
        longest = max(len(documents[index]) for index in chosen)
        rows = [documents[index] for index in chosen] + [documents[chosen[0]]] * _ROWS
        inputs, lengths = document_rows(rows[:_ROWS], -(-longest // _MULTIPLE) * _MULTIPLE)
        found[chosen] = np.asarray(embed(model.evaluated, inputs, lengths))[: len(chosen)]
    return found


@functools.lru_cache(maxsize=4)
def _program(phase: Phase) -> jax.stages.Wrapped:
    """The compiled `(params, inputs, lengths) -> f32[B, D]`."""
    config, sites = phase.config.model, phase.sites

    def embed(params: Any, inputs: jax.Array, lengths: jax.Array) -> jax.Array:
        """The mean over the tokens of each row, divided by its norm."""
        own, context = in_evaluation(params)
        x = assembled(own, config).trunk(
            {"inputs": inputs, "lengths": lengths},
            sites=sites,
            context=context,
            cotangent_scales=None,
            constrain=ANYWHERE,
        )
        x = x.astype(at_least_f32(x.dtype))
        seen = jnp.arange(x.shape[1], dtype=jnp.int32) < lengths[:, None]
        mean = jnp.sum(jnp.where(seen[..., None], x, jnp.zeros_like(x)), axis=1)
        mean = mean / lengths[:, None].astype(x.dtype)
        return mean / jnp.linalg.norm(mean, axis=-1, keepdims=True)

    return exact.jit(embed)
