"""Gradients that stay non-finite: stop, skip on, or go back and leave the text out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from run_helpers import result, rows, tiny, untimed

from lmjax.data import tokenized_corpus, train_iterator
from lmjax.parallel import sharding
from lmjax.train import TrainingFailed, train

POISON = 7
"""A token that no text has; what it is embedded as overflows in f16."""


@pytest.fixture(autouse=True)
def _no_curves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lmjax.train.records.draw_curves", lambda *_: None)


def config(home: Path, non_finite: str, **faults: Any) -> Any:
    """A run in f16 without loss scaling, so that only poison makes gradients non-finite."""
    return tiny(
        home,
        "mixed_f16",
        log_every=1,
        model={"tied": False},
        loss_scale={"kind": "static", "initial": 1.0, "max_consecutive_skips": 4},
        faults={"non_finite": non_finite, **faults},
    )


@pytest.fixture
def batches(home: Path) -> list[Any]:
    """The first 80 batches of the run, number 0 first."""
    chosen = config(home, "stop").resolved()
    corpus = tokenized_corpus(chosen.data, window=chosen.context + 1, progress=False)
    data = train_iterator(
        corpus, length=chosen.context, batch_size=chosen.batch_size, seed=chosen.seed
    )
    return [next(data) for _ in range(80)]


@pytest.fixture
def poison(batches: list[Any], monkeypatch: pytest.MonkeyPatch) -> Any:
    """`poison(first, last)`: from now on, batches with these numbers (from 1) are poisonous."""
    import lmjax.train.start as start

    create, place = start.create_state, sharding.global_batch

    def create_with_poison(*arguments: Any) -> Any:
        state = create(*arguments)
        table = state.params["embed"]["table"]
        state.params["embed"]["table"] = table.at[POISON].set(1e8)
        return state

    def use(first: int, last: int) -> None:
        poisoned = {batch["inputs"].tobytes() for batch in batches[first - 1 : last]}

        def place_with_poison(mesh: Any, batch: Any, processes: int) -> Any:
            if "weights" not in batch and batch["inputs"].tobytes() in poisoned:
                batch = batch | {"inputs": np.full_like(batch["inputs"], POISON)}
            return place(mesh, batch, processes)

        monkeypatch.setattr(sharding, "global_batch", place_with_poison)

    monkeypatch.setattr(start, "create_state", create_with_poison)
    return use


def test_a_run_rewinds_and_leaves_the_text_out(
    home: Path, tmp_path: Path, poison: Any, batches: list[Any]
) -> None:
    """Step 20 is the last that was applied, and the first suspect: so back to 10, not to 20."""
    poison(21, 26)
    run = tmp_path / "run"
    train(config(home, "rewind"), run, progress=False)
    assert [row["step"] for row in rows(run) if "loss" in row] == list(range(1, 41))
    skipped = [row["skipped_steps"] for row in rows(run) if "loss" in row]
    assert skipped[9:13] == [0, 1, 2, 2], "batches 25 and 26 follow step 10"
    assert skipped[-1] == 2
    assert [path.name for path in (run / "checkpoints" / "rewound").iterdir()] == ["20"]

    with np.load(run / "rewound" / "batches-24.npz") as recorded:
        np.testing.assert_array_equal(recorded["steps"], range(20, 25))
        for name in ("inputs", "targets"):
            expected = np.stack([batch[name] for batch in batches[19:24]])
            np.testing.assert_array_equal(recorded[name], expected)


@pytest.mark.long
def test_stopped_amid_the_skips_and_after_the_rewind_it_is_the_same_run(
    home: Path, tmp_path: Path, poison: Any
) -> None:
    poison(21, 26)
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    train(config(home, "rewind"), whole, progress=False)
    for steps in (22, 6, 40):
        train(config(home, "rewind"), parts, stop_after=steps, progress=False)
    assert untimed(parts) == untimed(whole)
    assert result(parts)["parameters_sha256"] == result(whole)["parameters_sha256"]


@pytest.mark.long
def test_where_no_text_helps_the_run_stops_after_some_rewinds(
    home: Path, tmp_path: Path, poison: Any
) -> None:
    poison(21, 80)
    with pytest.raises(TrainingFailed, match=r"last 4 steps up to step 14 .*rewound 2 times"):
        train(config(home, "rewind", max_rewinds=2), tmp_path / "run", progress=False)
    recorded = sorted(path.name for path in (tmp_path / "run" / "rewound").iterdir())
    assert recorded == ["batches-14.npz", "batches-24.npz"]


@pytest.mark.long
def test_without_an_older_checkpoint_it_stops_and_says_what_would_help(
    home: Path, tmp_path: Path, poison: Any
) -> None:
    poison(10, 20)
    with pytest.raises(TrainingFailed, match=r"before 9 is left .*checkpoint\.every"):
        train(config(home, "rewind"), tmp_path / "run", progress=False)


def test_a_run_that_stopped_may_resume_by_skipping_or_rewinding(
    home: Path, tmp_path: Path, poison: Any
) -> None:
    """What to do about faults is not a run's identity."""
    poison(21, 28)
    with pytest.raises(TrainingFailed, match=r"--faults\.non-finite rewind"):
        train(config(home, "stop"), tmp_path / "run", progress=False)
    train(config(home, "skip"), tmp_path / "run", progress=False)
    logged = [row for row in rows(tmp_path / "run") if "loss" in row]
    assert [row["step"] for row in logged] == list(range(1, 41))
    assert logged[-1]["skipped_steps"] == 8
