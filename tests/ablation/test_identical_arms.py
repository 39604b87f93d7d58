"""A/A: real runs of one config, divided into two arms by their seeds alone, are not told apart."""

from __future__ import annotations

from pathlib import Path

import jax
import numpy as np
import pytest
from run_helpers import home, tiny

from lmjax.ablation.verdict import Criteria, compare_arms
from lmjax.data import tokenized_corpus, train_iterator
from lmjax.parallel import sharding
from lmjax.precision import exact
from lmjax.runs.state import KEY_KIND, initial_state
from lmjax.train import make_eval_step, make_train_step
from lmjax.train.evaluate import held_out_loss

__all__ = ["home"]

pytestmark = pytest.mark.long

PAIRS, SEEDS, STEPS = 20, 3, 30


@pytest.fixture(scope="module")
def runs(home: Path) -> list[float]:
    """The held-out losses of as many short runs as 20 pairs of arms with 3 seeds have."""
    config = tiny(home, steps=STEPS).resolved()
    mesh = sharding.make_mesh(config.mesh, jax.devices()[:1])
    corpus = tokenized_corpus(config.data, window=config.context + 1, progress=False)
    step, evaluate = make_train_step(config, mesh), make_eval_step(config, mesh)
    start = exact.jit(lambda key: initial_state(config, key))

    def trained(seed: int) -> float:
        state = start(jax.random.key(seed, impl=KEY_KIND))
        batches = train_iterator(
            corpus,
            length=config.context,
            batch_size=config.batch_size,
            seed=seed,
            process_index=0,
            process_count=1,
        )
        for _ in range(config.steps):
            state, _ = step(state, sharding.global_batch(mesh, next(batches), 1))
        return held_out_loss(evaluate, state.params, corpus, config, mesh, batches=4)

    return [trained(seed) for seed in range(PAIRS * SEEDS * 2)]


def verdicts(runs: list[float], gap: float = 0.0) -> list[str]:
    """What is said of each pair of arms when the second has a gap added to its losses."""
    kinds = []
    for arms in np.reshape(runs, (PAIRS, 2, SEEDS)) + np.array([[0.0], [gap]]):
        values = {name: dict(enumerate(arm.tolist())) for name, arm in zip("ab", arms, strict=True)}
        kinds.append(compare_arms(values, {"b": "a"}, Criteria(0.005))["b"].verdict.kind)
    return kinds


def test_at_most_one_of_twenty_pairs_of_identical_arms_is_called_different(runs):
    assert len(set(runs)) == len(runs), "each seed is another run"
    kinds = verdicts(runs)
    assert sum(kind in ("worse", "better") for kind in kinds) <= PAIRS * 0.05, kinds


def test_a_gap_of_ten_standard_deviations_is_found_in_most(runs):
    kinds = verdicts(runs, gap=10 * float(np.std(runs)))
    assert sum(kind == "worse" for kind in kinds) >= 0.8 * PAIRS, kinds
