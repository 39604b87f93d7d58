"""Running cells: each once, by one worker at a time, whatever becomes of it."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from run_helpers import ROOT, home, result, tiny

from lmjax.ablation import grid, worker
from lmjax.ablation.grid import Ablation, Cell
from lmjax.console.signals import StopRequest
from lmjax.train import phase_of, programs, train

__all__ = ["home"]


def ablation(home: Path, **changes: Any) -> Ablation:
    """Two learning rates of one program, the larger of which diverges, with one seed."""
    base = tiny(home, steps=20, loss_scale={"max_consecutive_skips": 3})
    explodes = dataclasses.replace(base.optimizer, learning_rate=1e30)
    values = {
        "name": "rates",
        "question": "Which rate is too large?",
        "base": base,
        "arms": {"steady": base, "explodes": dataclasses.replace(base, optimizer=explodes)},
        "varies": ("optimizer.learning_rate",),
        "control": "steady",
        "seeds": (0,),
    }
    return Ablation(**values | changes)


def work(chosen: Ablation, directory: Path) -> list[Cell]:
    """The cells after a worker ran what was left of them."""
    directory.mkdir(exist_ok=True)
    worker.work(directory, [chosen], StopRequest())
    return grid.read_cells(chosen, directory)


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The keys of the cells that `train` is called for, in order."""
    keys: list[str] = []
    train = worker.train

    def noted(config: Any, run: Path, **options: Any) -> Any:
        keys.append(run.name)
        return train(config, run, **options)

    monkeypatch.setattr(worker, "train", noted)
    return keys


@pytest.mark.long
def test_a_worker_compiles_an_arm_once_and_the_seeds_are_those_of_runs_alone(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, trained: list[str]
) -> None:
    made: list[str] = []
    make = programs.make_train_step

    def noted(phase: Any, mesh: Any, **options: Any) -> Any:
        made.append(phase.config.precision)
        return make(phase, mesh, **options)

    monkeypatch.setattr(programs, "make_train_step", noted)
    base = tiny(home, steps=3)
    arms = {p: dataclasses.replace(base, precision=p) for p in ("f32", "mixed_bf16")}
    chosen = ablation(
        home, base=base, arms=arms, varies=("precision",), control="f32", seeds=(0, 1)
    )
    cells = work(chosen, tmp_path)
    assert len(cells) == 4
    assert made == [arm.resolved().precision for arm in arms.values()]
    alone = train(dataclasses.replace(base, seed=1), tmp_path / "alone", progress=False)
    of_worker = grid.keys_by_arm(chosen)["f32"][1]
    assert alone.result is not None
    digest = result(grid.cells_directory(tmp_path) / of_worker)["parameters_sha256"]
    assert alone.result["parameters_sha256"] == digest


def test_programs_that_were_not_asked_for_lately_are_dropped(home: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(programs, "make_eval_step", lambda config, mesh: object())
    base = tiny(home)
    one, two, three = (dataclasses.replace(base, context=length) for length in (4, 8, 16))
    kept = programs.Programs(capacity=2)
    of = lambda config, seed: phase_of(dataclasses.replace(config, seed=seed))
    ask = lambda config, seed=0: kept.evaluation(of(config, seed), None)
    first, second = ask(one), ask(two)
    assert ask(one, seed=1) is first, "the seed is not part of the program"
    third = ask(three)
    assert [ask(one), ask(three)] == [first, third]
    assert ask(two) is not second


def test_seeds_stay_in_turn_and_a_worker_takes_arms_that_it_has_compiled_first() -> None:
    ahead = ["b-seed1", "c-seed1", "c-seed0"]
    assert worker._first(ahead, compiled=()) == "b-seed1"
    assert worker._first(ahead, compiled=("c",)) == "c-seed1"
    assert worker._first(ahead[2:], compiled=("b",)) == "c-seed0"


def test_cells_run_once_and_failures_are_results(
    home: Path, tmp_path: Path, trained: list[str]
) -> None:
    chosen = ablation(home)
    steady, explodes = (keys[0] for keys in grid.keys_by_arm(chosen).values())
    first, second = work(chosen, tmp_path)
    assert trained == [steady, explodes]
    assert first.status == "finished"
    assert first.value == result(first.directory)["eval_loss"]
    assert second.status == "failed"
    assert "were not finite" in second.reason

    assert work(chosen, tmp_path) == [first, second]
    assert trained == [steady, explodes]

    # A changed arm runs, the other does not; the cell whose arm was removed stays.
    gentle = dataclasses.replace(chosen.base.optimizer, learning_rate=1e-4)
    arms = {**chosen.arms, "explodes": dataclasses.replace(chosen.base, optimizer=gentle)}
    changed = work(dataclasses.replace(chosen, arms=arms), tmp_path)
    assert changed[0] == first
    assert changed[1].status == "finished"
    assert trained[2:] == [changed[1].directory.name]
    assert grid.read_cells(chosen, tmp_path) == [first, second]


def test_only_failed_cells_are_retried(home: Path, tmp_path: Path, trained: list[str]) -> None:
    chosen = ablation(home)
    before = work(chosen, tmp_path)
    # Somebody was killed while discarding.
    (grid.cells_directory(tmp_path) / ".discarded-0-seed0").mkdir()
    del trained[:]
    worker.discard_failed(tmp_path, chosen)
    assert [c.status for c in grid.read_cells(chosen, tmp_path)] == ["finished", "missing"]
    assert not list(grid.cells_directory(tmp_path).glob(".discarded-*"))
    assert work(chosen, tmp_path) == before
    assert trained == [before[1].directory.name]


HOLD = """
import sys
from pathlib import Path
from lmjax.ablation.worker import cell_lock
with cell_lock(Path(sys.argv[1]), sys.argv[2]) as mine:
    print(mine, flush=True)
    sys.stdin.read()
"""


def test_a_cell_belongs_to_one_worker_until_that_dies(
    home: Path, tmp_path: Path, trained: list[str]
) -> None:
    chosen = ablation(home)
    steady, explodes = grid.plan(chosen)
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path), steady],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
    )
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "True\n"
        worker.work(tmp_path, [chosen], StopRequest(), patient=False)
        assert trained == [explodes]
    finally:
        holder.kill()
        holder.wait()
    worker.work(tmp_path, [chosen], StopRequest(), patient=False)
    assert trained == [explodes, steady]


def test_a_request_to_stop_stops_the_run_and_those_to_come(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also a request that came while nothing was trained."""
    chosen = ablation(home)
    steady, explodes = grid.plan(chosen)
    stop, train = StopRequest(), worker.train

    def stopped_before(config: Any, run: Path, **options: Any) -> Any:
        stop.received = "SIGTERM"
        return train(config, run, **options)

    monkeypatch.setattr(worker, "train", stopped_before)
    worker.work(tmp_path, [chosen], stop)
    cells = grid.cells_directory(tmp_path)
    assert [path.name for path in (cells / steady / "checkpoints").iterdir()] == ["1"]
    assert not grid.is_done(cells / steady)
    assert not (cells / explodes).exists()
