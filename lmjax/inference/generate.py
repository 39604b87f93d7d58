"""Continuing a text, one token at a time."""

from __future__ import annotations

from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np

from lmjax.inference.run import TrainedModel
from lmjax.precision import exact


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

    It ends after `tokens` tokens or where the model ends the document. Each token is drawn from the
    logits of a whole forward pass over the last `context` tokens, in the formats of the policy.

    Args:
      model: what `load_model` gives.
      prompt: text to go on from; empty: the start of a document.
      tokens: most tokens to generate.
      temperature: divides the logits; 0 takes the likeliest token.
      top_k: draw from this many likeliest tokens only; 0: from all.
      seed: of the draws.

    Raises:
      ValueError: a negative number.
    """
    if min(tokens, temperature, top_k, seed) < 0:
        raise ValueError("tokens, temperature, top_k and seed must not be negative")
    drawn = _draw(model, prompt, temperature, top_k, seed)
    ids = [token for _, token in zip(range(tokens), drawn, strict=False)]
    return model.tokenizer.decode(np.asarray(ids, np.int32))


def _draw(
    model: TrainedModel, prompt: str, temperature: float, top_k: int, seed: int
) -> Iterator[int]:
    logits_of = model.logits_function()
    choose = exact.jit(lambda key, logits: _choose(key, logits, temperature, top_k))
    context, end = model.config.context, model.tokenizer.end_of_document
    ids = [end, *map(int, model.tokenizer.encode(prompt))]
    params = jax.device_put(model.params)
    key = jax.random.key(seed, impl="threefry2x32")
    for index in range(2**31 - 1):
        # One shape for all lengths: what stands behind the last token cannot be seen from it.
        window = np.full((1, context), end, np.int32)
        recent = ids[-context:]
        window[0, : len(recent)] = recent
        logits = logits_of(params, window)[0, len(recent) - 1]
        token = int(choose(jax.random.fold_in(key, index), logits[: model.tokenizer.vocab_size]))
        if token == end:
            return
        ids.append(token)
        yield token


def _choose(key: jax.Array, logits: jax.Array, temperature: float, top_k: int) -> jax.Array:
    logits = logits.astype(jnp.float32)
    if temperature == 0:
        return jnp.argmax(logits)
    if top_k:
        least = jax.lax.top_k(logits, min(top_k, logits.size))[0][-1]
        logits = jnp.where(logits >= least, logits, -jnp.inf)
    return jax.random.categorical(key, logits / temperature)
