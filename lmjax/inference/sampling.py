"""Draws the next token from logits.

At most `top_k` of the tokenizer's tokens are kept, and one of them is drawn from
`softmax(logits / temperature)`. Limits are exact: temperature 0 and `top_k` 1 both take the
likeliest token, the first of equally likely ones. So does a temperature too small for f32, unless
several tokens are equally likely. Non-finite logits are never sampled.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from lmjax.precision import exact
from lmjax.precision.exact import at_least_f32
from lmjax.train import refuse_no_seed, seed_key

_LARGEST = float(np.finfo(np.float32).max)

NOT_FINITE = -1
"""What `Sampler.draw` returns instead of a token if logits are not finite."""


@dataclass(frozen=True)
class Sampler:
    """How tokens are drawn.

    Attributes:
      vocabulary: number of tokens to draw from; logits beyond them are padding.
      temperature: divides the logits; 0 takes the likeliest token.
      top_k: how many of the likeliest tokens may be drawn; all if 0 or above the vocabulary.
      seed: seed of the draws, in [0, 2**64).
    """

    vocabulary: int
    temperature: float
    top_k: int
    seed: int

    def __post_init__(self) -> None:
        """Validates the fields.

        Raises:
          ValueError: the temperature is negative, infinite or NaN; `top_k` is negative or not an
            integer; or the seed is not a valid seed.
        """
        if not _is_number(self.temperature) or not 0 <= self.temperature < math.inf:
            raise ValueError(
                f"temperature is {self.temperature!r}; it must be finite and must not be negative"
            )
        refuse_no_count("top_k", self.top_k)
        refuse_no_seed("seed", self.seed)

    @functools.cached_property
    def _key(self) -> jax.Array:
        return seed_key(self.seed)

    def draw(self, logits: jax.Array, index: int) -> int:
        """Draws a token; returns `NOT_FINITE` if the logit of any token is NaN or infinite.

        Args:
          logits: `[V]`, V at least the vocabulary, in any floating format.
          index: index of the draw; each has its own random stream.
        """
        return int(
            _draw(
                self._key,
                np.uint32(index),
                logits,
                np.float32(min(self.temperature, _LARGEST)),
                vocabulary=self.vocabulary,
                top_k=self.top_k if 0 < self.top_k < self.vocabulary else None,
                greedy=self.temperature == 0,
            )
        )


def refuse_no_count(name: str, value: object) -> None:
    """Checks that a value is a count.

    Raises:
      ValueError: it is negative or not an integer.
    """
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise ValueError(f"{name} is {value!r}; it must be a whole number and must not be negative")


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


@functools.partial(exact.jit, static_argnames=("vocabulary", "top_k", "greedy"))
def _draw(
    key: jax.Array,
    index: jax.Array,
    logits: jax.Array,
    temperature: jax.Array,
    *,
    vocabulary: int,
    top_k: int | None,
    greedy: bool,
) -> jax.Array:
    """int32[]; see `Sampler.draw`. One program serves all temperatures except 0."""
    logits = logits[:vocabulary]
    logits = logits.astype(at_least_f32(logits.dtype))
    finite = jnp.all(jnp.isfinite(logits))
    logits = jnp.where(logits == 0, 0, logits)  # -0 is as likely as 0
    if greedy:
        token = jnp.argmax(logits)
    else:
        below = (logits - jnp.max(logits)).astype(jnp.float32)
        # A temperature that is subnormal in f32 may act as 0: -x / 0 is -inf, as intended, but
        # 0 / 0 would be NaN.
        scaled = jnp.where(below == 0, 0, below / temperature)
        if top_k is not None:
            _, first = jax.lax.top_k(logits, top_k)  # of equal ones, those with lower indices
            kept = jnp.zeros(vocabulary, bool).at[first].set(True)
            scaled = jnp.where(kept, scaled, -jnp.inf)
        token = jax.random.categorical(jax.random.fold_in(key, index), scaled)
    return jnp.where(finite, token.astype(jnp.int32), NOT_FINITE)
