"""Several ablations with the same workers: judged one by one, during the work."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path

import pytest
from run_helpers import home, tiny

from lmjax.ablation import grid, runner
from lmjax.ablation.grid import Ablation
from lmjax.ablation.pools import Failure

__all__ = ["home"]


def ablation(home: Path, name: str, *rates: float) -> Ablation:
    """Arms that differ in the learning rate, with two seeds."""
    base = tiny(home)
    of_rate = lambda rate: dataclasses.replace(base.optimizer, learning_rate=rate)
    arms = {str(rate): dataclasses.replace(base, optimizer=of_rate(rate)) for rate in rates}
    return Ablation(
        name=name,
        question="Which rate?",
        base=base,
        arms=arms,
        varies=("optimizer.learning_rate",),
        control=str(rates[0]),
        seeds=(0, 1),
    )


class Pool:
    """Workers that end one cell whenever somebody looks, and none from `last` on."""

    started: list[Pool]
    last = 100

    def __init__(self, directory: Path, definitions: Sequence[Path], *_: object):
        plans = [grid.plan(grid.read_ablation(definition)) for definition in definitions]
        cells = grid.cells_directory(directory)
        keys = dict.fromkeys(key for plan in plans for key in plan)
        self.left = [cells / key for key in keys if not grid.is_done(cells / key)]
        self.ended: list[Path] = []
        self.killed = self.asked = False
        self.started.append(self)

    def alive(self) -> bool:
        if not self.left or self.asked:
            return False
        run = self.left.pop(0)
        run.mkdir(parents=True)
        (run / "result.json").write_text(json.dumps({"steps": 40, "eval_loss": 1.0}))
        self.ended.append(run)
        return True

    def failure(self) -> Failure | None:
        return Failure("a worker was ended", False) if len(self.ended) >= self.last else None

    def stop(self) -> None:
        self.asked = True

    def kill(self) -> None:
        self.killed = True


@pytest.fixture
def pools(monkeypatch: pytest.MonkeyPatch) -> list[Pool]:
    """The pools that were started, in order."""
    monkeypatch.setattr(Pool, "started", [], raising=False)
    monkeypatch.setattr(runner, "LocalPool", Pool)
    monkeypatch.setattr(runner, "SECONDS_BETWEEN_LOOKS", 0)
    return Pool.started


def test_an_outcome_is_handed_out_while_the_next_cells_are_run(
    home: Path, tmp_path: Path, pools: list[Pool]
) -> None:
    """The second ablation shares an arm with the first; the third has nothing left to run."""
    asked = [ablation(home, "a", 0.1, 0.2), ablation(home, "b", 0.1, 0.3), ablation(home, "c", 0.3)]
    outcomes = runner.run_each(asked, tmp_path, progress=False)
    first = next(outcomes)
    (pool,) = pools
    assert first.ablation == asked[0]
    assert {cell.status for cell in first.cells} == {"finished"}
    assert set(pool.ended) == {cell.directory for cell in first.cells}
    assert len(pool.left) == 2
    rest = list(outcomes)
    assert [outcome.ablation for outcome in rest] == asked[1:]
    assert {cell.status for outcome in rest for cell in outcome.cells} == {"finished"}
    assert pool.killed
    assert len(pools) == 1
    assert list(runner.run_each(asked, tmp_path, progress=False)) == [first, *rest]
    assert len(pools) == 1, "nothing was left"


def test_workers_end_with_whoever_asked_for_them(
    home: Path, tmp_path: Path, pools: list[Pool]
) -> None:
    asked = [ablation(home, "a", 0.1), ablation(home, "b", 0.2)]
    with contextlib.closing(runner.run_each(asked, tmp_path, progress=False)) as outcomes:
        next(outcomes)
        assert not pools[0].killed
    assert pools[0].killed
    assert len(pools[0].left) == 2


def test_a_worker_that_fails_ends_the_ablation_that_it_was_at(
    home: Path, tmp_path: Path, pools: list[Pool], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Pool, "last", 3)
    asked = [ablation(home, "a", 0.1), ablation(home, "b", 0.2)]
    outcomes = runner.run_each(asked, tmp_path, progress=False)
    assert next(outcomes).stopped_by is None
    with pytest.raises(runner.AblationError, match="a worker was ended"):
        next(outcomes)
    assert pools[0].asked
    assert pools[0].killed
