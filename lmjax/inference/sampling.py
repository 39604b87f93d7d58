"""Draws the next token from logits.

Logits go through these steps, in this order, each of which leaves them as they are by default:

1. The logit of each token that the text already holds is divided by `repetition_penalty` if it is
   positive and multiplied by it if not (Keskar et al. 2019, section 4.1, with the sign of
   Hugging Face's `RepetitionPenaltyLogitsProcessor`).
2. They are divided by `temperature`.
3. The `top_k` likeliest tokens are kept.
4. Of those, the fewest of the likeliest whose probabilities sum to at least `top_p` (nucleus
   sampling, Holtzman et al. 2020, section 3.1).
5. Of those, all that are at least `min_p` times as likely as the likeliest (Nguyen et al. 2024).

One of what is left is drawn. Of equally likely tokens, lower ids are preferred, so exactly `top_k`
are kept. Limits are exact: temperature 0 and `top_k` 1 both take the likeliest token. So does a
temperature too small for f32, unless several tokens are equally likely. Non-finite logits are never
sampled. Probabilities are computed and summed in f32.

All settings are arguments of one compiled program. Knows JAX and how settings are checked.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Annotated, Any, Final, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lmjax import checks
from lmjax.checks import above, at_least
from lmjax.precision import exact
from lmjax.precision.exact import at_least_f32
from lmjax.train import refuse_no_seed, seed_key

NOT_FINITE: Final = -1
"""What is drawn instead of a token if logits are not finite."""


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn."""

    temperature: Annotated[float, at_least(0, f64=True)] = 0.8
    """Divides the logits; 0 takes the likeliest token."""
    top_k: Annotated[int, at_least(0)] = 0
    """Sample from this many likeliest tokens only; 0, or more than there are: from all."""
    top_p: Annotated[float, above(0, most=1)] = 1.0
    """Sample only from the fewest likeliest tokens whose probabilities sum to this; 1: from all."""
    min_p: Annotated[float, at_least(0, most=1)] = 0.0
    """Sample only from tokens at least this many times as likely as the likeliest; 0: from all."""
    repetition_penalty: Annotated[float, above(0)] = 1.0
    """Makes tokens less likely that prompt or text hold already: divides positive logits and
    multiplies others; 1: none; below 1 makes them likelier."""

    def __post_init__(self) -> None:
        """Rejects values of another type or out of range (ValueError)."""
        checks.validate(self)

    @property
    def limits(self) -> Limits:
        """The settings as arrays."""
        return Limits(
            np.asarray(self.temperature == 0),
            np.float32(self.temperature),
            np.float32(self.top_k),
            np.float32(self.top_p),
            np.float32(self.min_p),
            np.float32(self.repetition_penalty),
        )


class Limits(NamedTuple):
    """`Sampling` as arguments of a program: a bool[] that says whether to take the likeliest token,
    and f32[] each.
    """

    greedy: Any
    temperature: Any
    top_k: Any
    top_p: Any
    min_p: Any
    repetition_penalty: Any


@dataclass(frozen=True)
class Sampler:
    """Draws one token at a time.

    Attributes:
      vocabulary: number of tokens to draw from; logits beyond them are padding.
      sampling: how.
      seed: seed of the draws, in [0, 2**64); anything else is a ValueError.
    """

    vocabulary: int
    sampling: Sampling
    seed: int

    def __post_init__(self) -> None:
        """Checks the seed."""
        refuse_no_seed("seed", self.seed)

    @functools.cached_property
    def key(self) -> jax.Array:
        """The random key of the seed."""
        return seed_key(self.seed)

    def draw(self, logits: jax.Array, index: int, seen: np.ndarray | None = None) -> int:
        """Draws a token; returns `NOT_FINITE` if the logit of any token is NaN or infinite.

        Args:
          logits: `[V]`, V at least the vocabulary, in any floating format.
          index: index of the draw; each has its own random stream.
          seen: bool[vocabulary], the tokens that the text holds already; None: none.
        """
        seen = np.zeros(self.vocabulary, bool) if seen is None else seen
        return int(_draw(self.key, np.uint32(index), logits, seen, self.sampling.limits))


def draw(
    key: jax.Array, index: jax.Array, logits: jax.Array, seen: jax.Array, limits: Limits
) -> jax.Array:
    """int32[]; see `Sampler.draw`, whose vocabulary is the length of `seen`."""
    logits = logits[: seen.size]
    logits = logits.astype(at_least_f32(logits.dtype))
    finite = jnp.all(jnp.isfinite(logits))
    penalty = limits.repetition_penalty
    logits = jax.lax.cond(penalty != 1, _penalised, lambda x, *_: x, logits, seen, penalty)
    logits = jnp.where(logits == 0, 0, logits)  # -0 is as likely as 0
    token = jax.lax.cond(
        limits.greedy,
        lambda *_: _likeliest(logits),
        lambda key: jax.random.categorical(key, _kept(logits, limits)).astype(jnp.int32),
        jax.random.fold_in(key, index),
    )
    return jnp.where(finite, token, NOT_FINITE)


def _likeliest(logits: jax.Array) -> jax.Array:
    """int32[]: the first of the largest logits, which are finite.

    As two reductions that XLA turns into vectors, unlike its `argmax` on a CPU.
    """
    indices = jnp.arange(logits.size, dtype=jnp.int32)
    return jnp.min(jnp.where(logits == jnp.max(logits), indices, logits.size - 1))


_draw = exact.jit(draw)


def _penalised(logits: jax.Array, seen: jax.Array, penalty: jax.Array) -> jax.Array:
    penalty = penalty.astype(logits.dtype)
    changed = jnp.where(logits > 0, logits / penalty, logits * penalty)
    largest = jnp.finfo(logits.dtype).max
    return jnp.where(seen, jnp.clip(changed, -largest, largest), logits)


def _kept(logits: jax.Array, limits: Limits) -> jax.Array:
    """The logits `[V]` over the temperature, f32, and -inf of tokens that are not drawn from."""
    below = (logits - jnp.max(logits)).astype(jnp.float32)
    # A temperature that is subnormal in f32 may act as 0: -x / 0 is -inf, as intended, but 0 / 0
    # would be NaN.
    scaled = jnp.where(below == 0, 0, below / limits.temperature)
    order = _ordered(logits)

    def by_count(scaled: jax.Array) -> jax.Array:
        ones = jnp.ones_like(scaled)
        return jnp.where(_heaviest(order, ones, limits.top_k), scaled, -jnp.inf)

    def by_probability(scaled: jax.Array) -> jax.Array:
        p = jax.nn.softmax(scaled)
        kept = (limits.top_p == 1) | _heaviest(order, p, limits.top_p)
        return jnp.where(kept & (p >= limits.min_p * jnp.max(p)), scaled, -jnp.inf)

    same = lambda scaled: scaled
    scaled = jax.lax.cond(limits.top_k > 0, by_count, same, scaled)
    narrowed = (limits.top_p < 1) | (limits.min_p > 0)
    return jax.lax.cond(narrowed, by_probability, same, scaled)


def _heaviest(order: jax.Array, weights: jax.Array, target: jax.Array) -> jax.Array:
    """The fewest of the first elements by `order` whose weights sum to at least a target, bool[N].

    Sorting takes tens of times longer on CPU than finding the last of them bit by bit.

    Args:
      order: unsigned integers [N], greatest first; of equal ones, those with lower indices.
      weights: f32[N], not negative, equal where the order is.
      target: f32[]; all elements if their weights do not reach it.
    """
    total = lambda last: jnp.sum(jnp.where(order >= last, weights, 0))
    bits = jnp.iinfo(order.dtype).bits

    def lower(bit: jax.Array, last: jax.Array) -> jax.Array:
        with_bit = last | (jnp.ones((), order.dtype) << (bits - 1 - bit).astype(order.dtype))
        return jnp.where(total(with_bit) >= target, with_bit, last)

    last = jax.lax.fori_loop(0, bits, lower, jnp.zeros((), order.dtype))
    before, tied = order > last, order == last
    lacking = target - jnp.sum(jnp.where(before, weights, 0))
    own = jnp.where(tied, weights, 0)
    return before | (tied & (jnp.cumsum(own) - own < lacking))


def _ordered(x: jax.Array) -> jax.Array:
    """Unsigned integers, above 0, in the order of finite floats without -0."""
    signed = jnp.int64 if x.dtype.itemsize == 8 else jnp.int32
    bits = jax.lax.bitcast_convert_type(x, signed)
    lowest = jnp.iinfo(signed).min
    turned = jnp.where(bits < 0, ~bits, bits | lowest)
    return jax.lax.bitcast_convert_type(turned, jnp.uint64 if signed == jnp.int64 else jnp.uint32)
