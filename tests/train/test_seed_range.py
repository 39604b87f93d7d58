"""Each seed in [0, 2**64) is a run of its own, and those below 2**32 are the runs they always were.

`jax.random.key` keeps 32 bits of a Python integer unless 64-bit types are enabled: seeds 1 and
2**32 + 1 were one run, and 2**64 was accepted, wrote files and ended in a traceback.
"""

from __future__ import annotations

import jax
import numpy as np
import pytest

from lmjax.model.layers import dropout
from lmjax.parallel import sharding
from lmjax.precision import paths
from lmjax.runs.config import from_json, to_json
from lmjax.runs.state import KEY_KIND
from lmjax.train import create_state, seed_key

FAR_APART = (1, 2**32 + 1, 2**33 + 1, 2**63 + 1, 2**64 - 1)
"""Seeds with the same low word, and the largest one."""


@pytest.mark.parametrize("seed", [0, 1, 2**31, 2**32 - 1])
def test_the_key_of_a_32_bit_seed_is_that_of_jax(seed: int) -> None:
    key = np.asarray(jax.random.key_data(seed_key(seed)))
    np.testing.assert_array_equal(key, jax.random.key_data(jax.random.key(seed, impl=KEY_KIND)))


def test_the_key_holds_all_bits_of_a_seed() -> None:
    words = [np.asarray(jax.random.key_data(seed_key(seed))).tolist() for seed in FAR_APART]
    assert words == [[0, 1], [1, 1], [2, 1], [2**31, 1], [2**32 - 1, 2**32 - 1]]
    with jax.enable_x64(True):
        key = jax.random.key_data(jax.random.key(2**32 + 1, impl=KEY_KIND))
    assert np.asarray(key).tolist() == words[1], "as with 64-bit types"


def test_seeds_that_share_their_low_word_are_different_runs(tiny) -> None:
    mesh = sharding.make_mesh(sharding.MeshConfig(), jax.devices()[:1])
    first, other = (create_state(tiny(seed=seed).resolved(), mesh) for seed in FAR_APART[:2])
    weights = (paths.flatten(state.params)["embed/table"] for state in (first, other))
    assert not np.array_equal(*weights)
    ones = np.ones((8, 64), np.float32)
    masks = (
        dropout(ones, 0.5, jax.random.wrap_key_data(state.key, impl=KEY_KIND))
        for state in (first, other)
    )
    assert not np.array_equal(*masks)


@pytest.mark.parametrize("seed", [-1, 2**64, 2**70, 1.0, 1.5, float("nan"), True, "1", None])
def test_anything_else_is_refused(seed: object, tiny) -> None:
    with pytest.raises(ValueError, match=r"^seed is .*; it must be .*at most 2\*\*64 - 1$"):
        tiny(seed=seed)
    with pytest.raises(ValueError, match="seed is"):
        from_json(to_json(tiny()) | {"seed": seed})


@pytest.mark.parametrize("seed", FAR_APART)
def test_a_seed_survives_json(seed: int, tiny) -> None:
    assert from_json(to_json(tiny(seed=seed))).seed == seed
