"""What is drawn from logits: limits are exact, and logits that are not finite are refused."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lmjax.inference.sampling import NOT_FINITE, Sampler, Sampling, _kept

DRAWS = range(40)
KEPT = jax.jit(_kept)


def drawn(logits: Any, temperature: float = 1.0, top_k: int = 0, **more: Any) -> set[int]:
    """All tokens of forty draws; `vocabulary`, `seed` and `seen`, and settings."""
    logits = jnp.asarray(logits, None if hasattr(logits, "dtype") else jnp.float32)
    vocabulary, seed = more.pop("vocabulary", logits.size), more.pop("seed", 0)
    seen = more.pop("seen", None)
    sampler = Sampler(vocabulary, Sampling(temperature, top_k, **more), seed)
    return {sampler.draw(logits, index, seen) for index in DRAWS}


@pytest.mark.parametrize("temperature", [0.0, 5e-324, 1e-320, 1e-45, 1e-38, 1e-30, 1e-9, 0.01])
def test_a_temperature_near_0_takes_the_likeliest_token(temperature: float) -> None:
    """At 1e-38 the logits used to overflow to infinities, of which the first was taken."""
    assert drawn([3.0, 4.0, 9.0, 1.0], temperature) == {2}
    assert drawn([-3e38, 3e38, 0.0], temperature) == {1}


@pytest.mark.parametrize("temperature", [1e30, 3e38])
def test_a_huge_temperature_draws_from_all_alike(temperature: float) -> None:
    assert drawn([3.0, 4.0, 9.0, 1.0], temperature) == {0, 1, 2, 3}


def test_the_first_of_equal_tokens_is_the_likeliest() -> None:
    for logits in ([0.0, 5.0, 5.0, 1.0], [-1.0, -0.0, 0.0, -2.0], [-1.0, 0.0, -0.0, -2.0]):
        assert drawn(logits, temperature=0.0) == {1}
        for temperature in (1e-300, 1e-38, 0.5, 1.0, 1e30):
            assert drawn(logits, temperature, top_k=1) == {1}
    assert drawn([0.0, 5.0, 5.0, 1.0], temperature=1e-38) == {1, 2}, "the limit, with two maxima"


@pytest.mark.parametrize("k", [1, 2, 3, 4])
def test_exactly_k_survive(k: int) -> None:
    assert drawn([1.0, 2.0, 2.0, 2.0, 2.0, 0.0], temperature=1e30, top_k=k) == {1, 2, 3, 4} - set(
        range(k + 1, 5)
    )


@pytest.mark.parametrize("k", [0, 4, 5, 2**31 - 1])
def test_no_k_or_more_than_there_are_is_all(k: int) -> None:
    assert drawn([1.0, 2.0, 2.0, 0.0], temperature=1e30, top_k=k) == {0, 1, 2, 3}


@given(
    logits=st.lists(st.integers(-3, 3).map(float), min_size=8, max_size=8),
    k=st.integers(1, 8),
    temperature=st.sampled_from([1e-38, 0.7, 1e30]),
    index=st.integers(0, 2**31 - 1),
)
@settings(max_examples=60)
def test_what_is_drawn_is_among_the_k_first_by_logit_and_index(
    logits: list[float], k: int, temperature: float, index: int
) -> None:
    best = sorted(range(8), key=lambda token: (-logits[token], token))
    sampler = Sampler(8, Sampling(temperature, k), 0)
    token = sampler.draw(jnp.asarray(logits, jnp.float32), index)
    assert token in best[:k]


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize(("temperature", "k"), [(0.0, 0), (1.0, 0), (1.0, 1), (1.0, 2), (1e-38, 2)])
def test_logits_that_are_not_finite_are_never_drawn_from(
    bad: float, temperature: float, k: int
) -> None:
    for place in range(4):
        logits = [1.0, 2.0, 3.0, 0.0]
        logits[place] = bad
        assert drawn(logits, temperature, k) == {NOT_FINITE}
    assert drawn(np.asarray([1, bad, 2], jnp.bfloat16), temperature, k) == {NOT_FINITE}


def test_tokens_that_the_tokenizer_lacks_are_not_drawn_whatever_their_logits() -> None:
    logits = [0.0, 1.0, 99.0, math.nan]
    assert drawn(logits, temperature=0.0, vocabulary=2) == {1}
    assert drawn(logits, temperature=1e30, top_k=3, vocabulary=2) == {0, 1}


def test_draws_are_those_of_jax() -> None:
    logits = jax.random.normal(jax.random.key(1), (256,), jnp.float32)
    key = jax.random.key(7, impl="threefry2x32")
    expected = [
        int(jax.random.categorical(jax.random.fold_in(key, index), logits / 0.8)) for index in DRAWS
    ]
    sampler = Sampler(256, Sampling(0.8), 7)
    assert [sampler.draw(logits, index) for index in DRAWS] == expected


def test_f64_logits_are_compared_in_f64() -> None:
    with jax.enable_x64(True):
        logits = jnp.asarray([1e300, 1e300 * (1 + 1e-15)], jnp.float64)
        assert drawn(logits, temperature=0.0) == drawn(logits, top_k=1) == {1}


# --- Nucleus, minimum, repetition ---

PROBABILITIES = [0.05, 0.4, 0.15, 0.15, 0.15, 0.1]


@pytest.mark.parametrize(
    ("top_p", "kept"),
    [
        (1e-30, {1}),
        (0.39, {1}),
        (0.41, {1, 2}),
        (0.56, {1, 2, 3}),
        (0.84, {1, 2, 3, 4}),
        (0.86, {1, 2, 3, 4, 5}),
        (0.96, {0, 1, 2, 3, 4, 5}),
        (1.0, {0, 1, 2, 3, 4, 5}),
    ],
)
def test_the_fewest_likeliest_tokens_that_sum_to_top_p(top_p: float, kept: set[int]) -> None:
    """Of equally likely tokens, the first; of the distribution that the temperature makes."""
    logits = np.log(np.asarray(PROBABILITIES, np.float32))
    survivors = {i for i in range(6) if math.isfinite(kept_logits(logits, top_p=top_p)[i])}
    assert survivors == kept
    assert drawn(logits, top_p=top_p) <= kept
    # A temperature of 2 halves logits.
    assert np.isfinite(kept_logits(2 * logits, 2.0, top_p=top_p)).sum() == len(kept)


@pytest.mark.parametrize(
    ("min_p", "kept"),
    [(0.0, 6), (0.12, 6), (0.2, 5), (0.3, 4), (0.38, 1), (1.0, 1)],
)
def test_tokens_less_likely_than_a_share_of_the_likeliest_are_left_out(
    min_p: float, kept: int
) -> None:
    logits = np.log(np.asarray(PROBABILITIES, np.float32))
    assert np.isfinite(kept_logits(logits, min_p=min_p)).sum() == kept


def test_top_p_counts_what_top_k_leaves() -> None:
    """0.4 of 0.55 is more than 0.7, so one token reaches it; of all tokens, three do."""
    logits = np.log(np.asarray(PROBABILITIES, np.float32))
    assert np.isfinite(kept_logits(logits, top_p=0.7)).sum() == 3
    assert np.isfinite(kept_logits(logits, top_k=2, top_p=0.7)).sum() == 1


def kept_logits(logits: Any, temperature: float = 1.0, **more: Any) -> np.ndarray:
    return np.asarray(KEPT(np.asarray(logits, np.float32), Sampling(temperature, **more).limits))


@given(
    logits=st.lists(st.integers(-40, 40).map(lambda x: x / 8), min_size=8, max_size=8),
    top_k=st.integers(0, 9),
    top_p=st.floats(0.01, 1.0),
    min_p=st.floats(0.0, 1.0),
)
@settings(max_examples=40)
def test_what_is_kept_is_what_the_definitions_say(
    logits: list[float], top_k: int, top_p: float, min_p: float
) -> None:
    """In f64, by sorting; but for sums within the rounding of f32 of a bound."""
    order = sorted(range(8), key=lambda token: (-logits[token], token))
    best = order[: top_k or 8]
    p = np.exp(np.asarray([logits[token] for token in best]))
    p /= p.sum()
    before = np.cumsum(p) - p
    if top_p < 1 and (np.abs(before - top_p) < 1e-5).any():
        return
    if (np.abs(p - min_p * p.max()) < 1e-6).any() and 0 < min_p < 1:
        return
    within = (before < top_p) | (top_p == 1)
    expected = {t for t, w, own in zip(best, within, p, strict=True) if w and own >= min_p * p[0]}
    found = kept_logits(np.float32(logits), top_k=top_k, top_p=top_p, min_p=min_p)
    assert set(np.flatnonzero(np.isfinite(found))) == expected


def test_a_repetition_penalty_divides_positive_logits_and_multiplies_others() -> None:
    """Of tokens that the text holds alone; a huge one makes no infinity."""
    seen = np.asarray([True, True, False, False])
    likeliest = lambda logits, penalty: drawn(logits, 0.0, repetition_penalty=penalty, seen=seen)
    assert likeliest([3.0, 1.0, 1.6, 0.0], 1.0) == {0}
    assert likeliest([3.0, 1.0, 1.6, 0.0], 1.8) == {0}
    assert likeliest([3.0, 1.0, 1.6, 0.0], 2.0) == {2}
    assert likeliest([-1.0, -5.0, -1.6, -3.0], 1.5) == {0}
    assert likeliest([-1.0, -5.0, -1.6, -3.0], 1.7) == {2}
    assert likeliest([1.0, -1.0, 1.6, 0.0], 0.5) == {0}
    everywhere = np.ones(4, bool)
    huge = drawn([-3e38, -2e38, -1e38, -3e38], 0.0, repetition_penalty=1e30, seen=everywhere)
    assert huge == {0}, "all are clamped to the same number"


@pytest.mark.parametrize(
    "change",
    [
        *(
            {"temperature": value}
            for value in (-1, -1e-300, 1e300, math.nan, math.inf, "1", None, True)
        ),
        *({"top_k": value} for value in (-1, 2.5, math.nan, "2", None, True, 2**70)),
        *({"top_p": value} for value in (0, -0.1, 1.1, 1e-50, math.nan, "1", None, True)),
        *({"min_p": value} for value in (-0.1, 1.1, math.nan, math.inf, None)),
        *({"repetition_penalty": value} for value in (0, -1, math.nan, math.inf, 1e300, None)),
    ],
    ids=str,
)
def test_other_settings_are_refused(change: dict[str, Any]) -> None:
    ((name, value),) = change.items()
    with pytest.raises(ValueError, match=rf"^{name} (is|must)") as error:
        Sampling(**change)
    assert "\n" not in str(error.value)
    assert str(value) in str(error.value)


@pytest.mark.parametrize("seed", [-1, 2**64, 1.0, None])
def test_other_seeds_are_refused(seed: Any) -> None:
    with pytest.raises(ValueError, match=r"^seed is "):
        Sampler(4, Sampling(), seed)
