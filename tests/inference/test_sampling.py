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

from lmjax.inference.sampling import NOT_FINITE, Sampler

DRAWS = range(40)


def drawn(
    logits: Any, temperature: float = 1.0, top_k: int = 0, seed: int = 0, vocabulary: int = 0
) -> set[int]:
    """All tokens of forty draws."""
    logits = jnp.asarray(logits, None if hasattr(logits, "dtype") else jnp.float32)
    sampler = Sampler(vocabulary or logits.size, temperature, top_k, seed)
    return {sampler.draw(logits, index) for index in DRAWS}


@pytest.mark.parametrize("temperature", [0.0, 5e-324, 1e-320, 1e-45, 1e-38, 1e-30, 1e-9, 0.01])
def test_a_temperature_near_0_takes_the_likeliest_token(temperature: float) -> None:
    """At 1e-38 the logits used to overflow to infinities, of which the first was taken."""
    assert drawn([3.0, 4.0, 9.0, 1.0], temperature) == {2}
    assert drawn([-3e38, 3e38, 0.0], temperature) == {1}


@pytest.mark.parametrize("temperature", [1e30, 1e300, 1.7e308])
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


@pytest.mark.parametrize("k", [0, 4, 5, 2**70])
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
    token = Sampler(8, temperature, k, 0).draw(jnp.asarray(logits, jnp.float32), index)
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
    assert [Sampler(256, 0.8, 0, 7).draw(logits, index) for index in DRAWS] == expected


def test_f64_logits_are_compared_in_f64() -> None:
    with jax.enable_x64(True):
        logits = jnp.asarray([1e300, 1e300 * (1 + 1e-15)], jnp.float64)
        assert drawn(logits, temperature=0.0) == drawn(logits, top_k=1) == {1}


@pytest.mark.parametrize(
    "change",
    [
        *({"temperature": value} for value in (-1, -1e-300, math.nan, math.inf, "1", None, True)),
        *({"top_k": value} for value in (-1, 2.0, 2.5, math.nan, "2", None, True)),
        *({"seed": value} for value in (-1, 2**64, 1.0, None)),
    ],
    ids=str,
)
def test_other_settings_are_refused(change: dict[str, Any]) -> None:
    settings = {"vocabulary": 4, "temperature": 1.0, "top_k": 0, "seed": 0} | change
    (name,) = change
    with pytest.raises(ValueError, match=f"^{name} is "):
        Sampler(**settings)
