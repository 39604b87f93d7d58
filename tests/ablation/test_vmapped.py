"""Seeds of an arm at once: what each would be alone, whatever becomes of the others."""

from __future__ import annotations

import dataclasses
import json
import types
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import tiny_ablation
from run_helpers import TIMINGS, home, result, rows, strict_loads, tiny, untimed

from lmjax import ablation_cli, cli, reproduce, verbs
from lmjax.ablation import grid, runner, worker
from lmjax.ablation.grid import Ablation
from lmjax.train import loop, seeds, start
from lmjax.train.signals import StopRequest

__all__ = ["home"]

SEEDS = (0, 1, 2)


def ablation(home: Path, **changes: Any) -> Ablation:
    """Two texts, for one program is enough, with three seeds each and no checkpoint on the way."""
    base = tiny(
        home,
        steps=20,
        loss_scale={"max_consecutive_skips": 3},
        evaluation={"every": 10},
        checkpoint={"every": 20},
    )
    half = dataclasses.replace(base.data, files=(str(home / "texts" / "*[02468].txt"),))
    values = {
        "name": "texts",
        "question": "Is half of the text enough?",
        "base": base,
        "arms": {"all": base, "half": dataclasses.replace(base, data=half)},
        "varies": ("data.files", "precision"),
        "control": "all",
        "seeds": SEEDS,
    }
    return Ablation(**values | changes)


def one_arm(home: Path) -> Ablation:
    """The first of the arms alone."""
    base = ablation(home).base
    return ablation(home, arms={"all": base})


def work(chosen: Ablation, directory: Path, stop: StopRequest | None = None) -> None:
    """Runs what is left, seeds at once."""
    worker.work(directory, [chosen], stop or StopRequest(), patient=False, vmap_seeds=True)


def runs(chosen: Ablation, directory: Path, arm: str = "all") -> dict[int, Path]:
    """The run directories of an arm, by seed."""
    keys = grid.keys_by_arm(chosen)[arm]
    return {seed: grid.cells_directory(directory) / key for seed, key in keys.items()}


class Seen:
    """What the loops were given: initial parameters and batches, by text and seed."""

    def __init__(self, patch: pytest.MonkeyPatch):
        self.params: dict[tuple[Any, int], Any] = {}
        self.batches: dict[tuple[Any, int], list[Any]] = {}
        alone, at_once = loop._next_batch, seeds._Group.next_batch

        def noted_alone(run: Any, step: int) -> Any:
            batch = alone(run, step)
            self._note(run.config, run.state.params, batch)
            return batch

        def noted_at_once(group: Any) -> Any:
            batch = at_once(group)
            for place, run in enumerate(group.runs):
                own = lambda leaf, place=place: leaf[place]
                params, rows = jax.tree.map(own, (group.state.params, batch))
                self._note(run.config, params, rows)
            return batch

        patch.setattr(loop, "_next_batch", noted_alone)
        patch.setattr(seeds._Group, "next_batch", noted_at_once)

    def _note(self, config: Any, params: Any, batch: Any) -> None:
        cell = (config.data.files, config.seed)
        if cell not in self.params:
            self.params[cell] = jax.tree.map(np.array, params)
        self.batches.setdefault(cell, []).append(jax.tree.map(np.array, batch))


@pytest.fixture(scope="module", autouse=True)
def _no_curves() -> Iterator[None]:
    """Drawing would be a third of the time of these tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lmjax.train.records.draw_curves", lambda *_: None)
        yield


@pytest.fixture(scope="module")
def both(home: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Seen]]:
    """The ablation run at once and in turn: directories, and what the loops were given."""
    found = {}
    for name in ("at once", "in turn"):
        directory = tmp_path_factory.mktemp(name.replace(" ", "-"))
        with pytest.MonkeyPatch.context() as patch:
            seen = Seen(patch)
            worker.work(directory, [ablation(home)], StopRequest(), vmap_seeds=name == "at once")
        found[name] = (directory, seen)
    return found


def pairs(home: Path, both: dict[str, tuple[Path, Seen]]) -> list[tuple[Path, Path]]:
    """The directories of each cell, at once and in turn."""
    keys = grid.plan(ablation(home))
    folders = [grid.cells_directory(both[name][0]) for name in ("at once", "in turn")]
    return [(folders[0] / key, folders[1] / key) for key in keys]


def files(run: Path) -> set[str]:
    """What is in a run directory and in its checkpoints, whose arrays have names by chance."""
    names = (path.relative_to(run).as_posix() for path in run.rglob("*"))
    return {name for name in names if "events" not in name and "/state/" not in name}


def environment(run: Path) -> dict[str, Any]:
    """The content of `environment.json`."""
    return strict_loads((run / "environment.json").read_text(encoding="utf-8"))


def test_each_seed_starts_and_reads_as_alone_bit_for_bit(both: dict[str, Any]) -> None:
    (_, ours), (_, theirs) = both["at once"], both["in turn"]
    assert len(ours.params) == 2 * len(SEEDS)
    for cell, params in theirs.params.items():
        jax.tree.map(np.testing.assert_array_equal, ours.params[cell], params)
        assert len(ours.batches[cell]) == 20
        jax.tree.map(np.testing.assert_array_equal, ours.batches[cell], theirs.batches[cell])
    first = [batches[0]["inputs"].tobytes() for batches in ours.batches.values()]
    assert len(set(first)) == 2 * len(SEEDS)


def test_losses_are_those_in_turn_but_for_rounding(home: Path, both: dict[str, Any]) -> None:
    finals = set()
    for ours, theirs in pairs(home, both):
        mine, others = rows(ours), rows(theirs)
        assert [list(row) for row in mine] == [list(row) for row in others]
        assert [row["step"] for row in mine] == [row["step"] for row in others]
        for row, other in zip(mine, others, strict=True):
            for name in {"loss", "eval_loss", "learning_rate"} & set(row):
                assert row[name] == pytest.approx(other[name], rel=1e-5)
        assert mine[-1]["eval_loss"] < mine[0]["loss"] - 0.3
        finals.add(result(ours)["eval_loss"])
    assert len(finals) == 2 * len(SEEDS)


def test_a_run_directory_is_that_of_a_run_alone_and_says_so(
    home: Path, both: dict[str, Any]
) -> None:
    for ours, theirs in pairs(home, both):
        assert files(ours) == files(theirs)
        assert (ours / "config.json").read_bytes() == (theirs / "config.json").read_bytes()
        said, alone = (
            strict_loads((run / "environment.json").read_text()) for run in (ours, theirs)
        )
        assert said.pop("vmapped")["seeds"] == list(SEEDS)
        assert said == alone
        assert set(result(ours)) == set(result(theirs))
        for timing in TIMINGS:
            assert rows(ours)[0][timing] > 0


def test_what_is_done_is_not_run_again(
    home: Path, both: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing of a finished ablation; of one with a cell missing that cell, as any other run."""
    chosen = one_arm(home)
    folder = grid.cells_directory(tmp_path)
    folder.mkdir()
    for run in runs(chosen, both["at once"][0]).values():
        (folder / run.name).symlink_to(run)
    called: list[Any] = []
    monkeypatch.setattr(worker, "train_seeds", lambda _, dirs, **__: called.append(set(dirs)) or {})
    monkeypatch.setattr(worker, "train", lambda config, *_, **__: called.append(config.seed))
    work(chosen, tmp_path)
    assert called == []
    runs(chosen, tmp_path)[1].unlink()
    work(chosen, tmp_path)
    runs(chosen, tmp_path)[2].unlink()
    work(chosen, tmp_path)
    assert called == [1, {1, 2}]


def test_a_seed_that_fails_is_a_result_and_leaves_the_others_alone(
    home: Path, both: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The others are, bit for bit, what they are beside a healthy seed."""
    create = start.create_state

    def poisoned(config: Any, mesh: Any) -> Any:
        state = create(config, mesh)
        if config.seed != 1:
            return state
        return state._replace(params=jax.tree.map(lambda leaf: leaf * np.nan, state.params))

    monkeypatch.setattr(start, "create_state", poisoned)
    chosen = one_arm(home)
    work(chosen, tmp_path)
    cells = grid.read_cells(chosen, tmp_path)
    assert [cell.status for cell in cells] == ["finished", "failed", "finished"]
    assert "the gradients of the last 5 steps up to step 5 were not finite" in cells[1].reason
    assert [row["skipped_steps"] for row in rows(cells[1].directory)] == [5]
    undisturbed = runs(chosen, both["at once"][0])
    for seed in (0, 2):
        ours = cells[seed].directory
        assert untimed(ours) == untimed(undisturbed[seed])
        digests = [result(run)["parameters_sha256"] for run in (ours, undisturbed[seed])]
        assert digests[0] == digests[1]


class StopAfter(StopRequest):
    """A request to stop that comes while some batch is fetched."""

    def __init__(self, batches: int, monkeypatch: pytest.MonkeyPatch):
        super().__init__()
        fetch, left = seeds._Group.next_batch, iter(range(batches - 1))

        def counted(group: Any) -> Any:
            if next(left, None) is None:
                self.received = "SIGTERM"
            return fetch(group)

        monkeypatch.setattr(seeds._Group, "next_batch", counted)


def test_seeds_that_were_stopped_go_on_together_bit_for_bit(
    home: Path, both: dict[str, Any], tmp_path: Path
) -> None:
    chosen = one_arm(home)
    with pytest.MonkeyPatch.context() as patch:
        work(chosen, tmp_path, StopAfter(12, patch))
    for run in runs(chosen, tmp_path).values():
        assert not grid.is_done(run)
        assert [path.name for path in (run / "checkpoints").iterdir()] == ["12"]
    work(chosen, tmp_path)
    undisturbed = runs(chosen, both["at once"][0])
    for seed, run in runs(chosen, tmp_path).items():
        assert untimed(run) == untimed(undisturbed[seed])
        digest = result(run)["parameters_sha256"]
        assert digest == result(undisturbed[seed])["parameters_sha256"]


def test_seeds_that_were_stopped_together_go_on_alone(
    home: Path, both: dict[str, Any], tmp_path: Path
) -> None:
    """A checkpoint of one of them is that of a run alone, at a step of what it would have done."""
    chosen = one_arm(home)
    with pytest.MonkeyPatch.context() as patch:
        work(chosen, tmp_path, StopAfter(12, patch))
    worker.work(tmp_path, [chosen], StopRequest(), patient=False)
    together, in_turn = (runs(chosen, both[name][0]) for name in ("at once", "in turn"))
    for seed, run in runs(chosen, tmp_path).items():
        assert "vmapped" not in environment(run)
        before = [row for row in untimed(run) if row["step"] <= 12]
        assert before == [row for row in untimed(together[seed]) if row["step"] <= 12]
        assert [row["step"] for row in rows(run)] == [row["step"] for row in rows(in_turn[seed])]
        final, alone = (result(directory)["eval_loss"] for directory in (run, in_turn[seed]))
        assert final == pytest.approx(alone, rel=1e-5)


def test_seeds_that_got_differently_far_go_on_from_where_each_is(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    groups: list[list[tuple[int, int]]] = []

    def noted(together: Sequence[Any], stop: StopRequest) -> dict[int, Any]:
        groups.append([(run.config.seed, run.step) for run in together])
        return {}

    def arrived(config: Any, corpus: Any, mesh: Any, workdir: Path, *rest: Any) -> Any:
        step = 10 if config.seed == 1 else 20
        run = begin(config, corpus, mesh, workdir, *rest)
        return dataclasses.replace(run, state=run.state._replace(step=np.int32(step)))

    begin = seeds.start_run
    monkeypatch.setattr(seeds, "start_run", arrived)
    monkeypatch.setattr(seeds, "_train_group", noted)
    work(one_arm(home), tmp_path)
    assert groups == [[(0, 20), (2, 20)], [(1, 10)]]


def test_too_little_memory_means_one_after_another(
    home: Path,
    both: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """It is found out when directories are there already: they then are those of runs alone.

    A request to stop is met between them.
    """
    train, stop, trained = worker.train, StopRequest(), []

    def stopped_after(config: Any, *arguments: Any, **options: Any) -> None:
        train(config, *arguments, **options)
        trained.append(config.seed)
        stop.received = "SIGTERM"

    monkeypatch.setattr(seeds, "free_bytes", lambda device: 1)
    monkeypatch.setattr(worker, "train", stopped_after)
    chosen = one_arm(home)
    work(chosen, tmp_path, stop)
    assert "one after another, because a step of all needs" in capsys.readouterr().err
    assert trained == [0]
    alone, expected = (runs(chosen, d)[0] for d in (tmp_path, both["in turn"][0]))
    assert untimed(alone) == untimed(expected)
    assert files(alone) == files(expected)
    assert result(alone)["parameters_sha256"] == result(expected)["parameters_sha256"]
    assert "vmapped" not in environment(alone)


# --- From the command to the workers ---


class Pool:
    """A worker that knows the outcome of every cell at once; notes how it was started."""

    started: list[tuple[int, bool]]

    def __init__(
        self,
        directory: Path,
        definitions: Sequence[Path],
        processes: int,
        threads: int,
        vmap_seeds: bool,
    ):
        self.started.append((processes, vmap_seeds))
        (definition,) = definitions
        for key in grid.plan(grid.read_ablation(definition)):
            run = grid.cells_directory(directory) / key
            run.mkdir(parents=True)
            (run / "result.json").write_text(json.dumps({"steps": 20, "eval_loss": 1.0}))

    def alive(self) -> bool:
        return False

    def failure(self) -> None:
        return None

    def stop(self) -> None:
        pass

    kill = stop


def test_arms_that_cannot_are_named_and_divided_among_workers(
    home: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    base = ablation(home).base
    arms = {"all": base, "phased": dataclasses.replace(base, precision="0: f32 | 5: bf16")}
    chosen = ablation(home, arms=arms)
    monkeypatch.setattr(Pool, "started", [], raising=False)
    monkeypatch.setattr(runner, "LocalPool", Pool)
    runner.run(chosen, tmp_path / "vmapped", processes=9, vmap_seeds=True)
    why = (
        "phased: its seeds are trained one after another, because the policy changes with the step"
    )
    err = capsys.readouterr().err
    assert err.count("one after another") == 1
    assert why in err
    runner.run(chosen, tmp_path / "in-turn", processes=9)
    assert "one after another" not in capsys.readouterr().err
    assert Pool.started == [(1 + 3, True), (6, False)]


@pytest.mark.parametrize("flags", [(), ("--vmap-seeds",)])
def test_the_flag_reaches_the_runner(
    flags: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[bool] = []

    def noted(*_: Any, vmap_seeds: bool = False, **__: Any) -> None:
        asked.append(vmap_seeds)
        raise runner.AblationError("not run")

    def each_noted(*_: Any, **options: Any) -> Any:
        yield noted(**options)

    monkeypatch.setattr(ablation_cli, "run", noted)
    monkeypatch.setattr(reproduce, "run_each", each_noted)
    arguments = ("--workdir", str(tmp_path), *flags)
    code = ablation_cli._run_ablation("tiny_ablation", tiny_ablation.ablation, arguments)
    assert code == cli.FAILED
    claim = types.SimpleNamespace(ablation=tiny_ablation.ablation())
    monkeypatch.setattr(reproduce, "choose", lambda *_, **__: [claim])
    with pytest.raises(SystemExit):
        verbs.main(["reproduce", "a-claim", *arguments])
    assert asked == [bool(flags)] * 2
