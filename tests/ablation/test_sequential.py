"""Seeds that are added until every question is settled: which, and that no state is kept."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from run_helpers import home, tiny

from lmjax.ablation import grid, runner
from lmjax.ablation.grid import Ablation
from lmjax.cli import ablation as ablation_cli
from lmjax.cli import common as cli
from lmjax.cli import verbs
from lmjax.train import Config

__all__ = ["home"]

NOISE = (0.004, -0.003, 0.005, -0.004, 0.002, -0.005, 0.001, 0.003)


def ablation(home: Path) -> Ablation:
    """Two arms against their control, three seeds to begin with, eight at most."""
    base = tiny(home)
    arms = {p: dataclasses.replace(base, precision=p) for p in ("f32", "mixed_bf16", "mixed_f16")}
    return Ablation(
        name="sequential",
        question="How many seeds does it take?",
        base=base,
        arms=arms,
        varies=("precision",),
        control="f32",
        seeds=(0, 1, 2),
        max_seeds=8,
    )


def value(config: Config) -> float:
    """What a run comes to: bf16 is clearly worse, f16 noisily the same."""
    if "c=bf16" in config.precision:
        return 1.5 + NOISE[config.seed] / 100
    return 1.0 + NOISE[config.seed] * ("c=f16" in config.precision)


class Pool:
    """Workers that need no time: by the time they are looked at, every cell has a result."""

    started: list[list[tuple[str, int]]]

    def __init__(self, directory: Path, definitions: Sequence[Path], *_: object):
        ran = []
        (definition,) = definitions
        for key, config in grid.plan(grid.read_ablation(definition)).items():
            run = grid.cells_directory(directory) / key
            if not grid.is_done(run):
                run.mkdir(parents=True)
                result = {"steps": config.steps, "eval_loss": value(config)}
                (run / "result.json").write_text(json.dumps(result))
                ran.append((config.precision.split(",")[1], config.seed))
        self.started.append(ran)

    def alive(self) -> bool:
        return False

    def failure(self) -> None:
        return None

    def stop(self) -> None:
        pass

    kill = stop


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[list[tuple[str, int]]]:
    """The cells that each start of workers runs, as compute format and seed."""
    rounds: list[list[tuple[str, int]]] = []
    monkeypatch.setattr(Pool, "started", rounds, raising=False)
    monkeypatch.setattr(runner, "LocalPool", Pool)
    return rounds


def go(chosen: Ablation, directory: Path) -> runner.AblationOutcome:
    """Runs it without a display."""
    return runner.run(chosen, directory, progress=False)


def test_undecided_arms_and_their_control_get_more_seeds(
    home: Path, tmp_path: Path, started: list
) -> None:
    outcome = go(ablation(home), tmp_path)
    first, *later = started
    assert first == [(f"c={f}", seed) for seed in range(3) for f in ("f32", "bf16", "f16")]
    # Four seeds settle bf16, which stops; f16 runs to the last.
    assert [len(cells) for cells in later] == [3 + 1 + 3, 2 + 2]
    more = [(f"c={f}", seed) for seed in range(3, 8) for f in ("f32", "bf16", "f16")]
    assert [cell for cells in later for cell in cells] == [
        (f, seed) for f, seed in more if f != "c=bf16" or seed == 3
    ]
    assert outcome.ablation.seed_counts == {"f32": 8, "mixed_bf16": 4, "mixed_f16": 8}
    assert len(outcome.cells) == 8 + 4 + 8
    assert grid.read_ablation(tmp_path / grid.DEFINITION) == outcome.ablation


def test_a_second_start_finds_the_same_seeds_and_runs_nothing(
    home: Path, tmp_path: Path, started: list
) -> None:
    outcome = go(ablation(home), tmp_path)
    del started[:]
    assert go(ablation(home), tmp_path) == outcome
    assert started == []


def test_a_larger_budget_continues_and_a_fixed_number_of_seeds_stays(
    home: Path, tmp_path: Path, started: list
) -> None:
    small = dataclasses.replace(ablation(home), max_seeds=4)
    assert go(small, tmp_path).ablation.all_seeds == (0, 1, 2, 3)
    del started[:]
    assert go(ablation(home), tmp_path).ablation.all_seeds == tuple(range(8))
    assert min(seed for cells in started for _, seed in cells) == 4

    fixed = dataclasses.replace(ablation(home), max_seeds=None)
    assert len(go(fixed, tmp_path).cells) == 9


def test_the_report_is_one_of_seeds_that_were_added(
    home: Path, tmp_path: Path, started: list, capsys: pytest.CaptureFixture[str]
) -> None:
    fixed = dataclasses.replace(ablation(home), max_seeds=None)
    flags = ("--workdir", str(tmp_path), "--max-seeds", "8")
    assert ablation_cli._run_ablation("sequential", lambda: fixed, flags) == cli.DONE
    output = capsys.readouterr()
    assert "seeds were added where a question is open: f32 has 6, mixed_bf16 has 4" in output.err
    assert re.search(r"worse by 0\.5\d* ± 0\.0\d* nats \(4 seeds\)", output.out), output.out
    page = (tmp_path / "report.html").read_bytes()
    assert b"anytime-valid" in page
    with pytest.raises(SystemExit):
        verbs.main(["report", str(tmp_path)])
    assert capsys.readouterr().out.splitlines()[-8:] == output.out.splitlines()[-8:]
    assert (tmp_path / "report.html").read_bytes() == page


def test_a_request_to_stop_ends_it_between_rounds(
    home: Path, tmp_path: Path, started: list, monkeypatch: pytest.MonkeyPatch
) -> None:
    watch: Callable[..., None] = runner._watch

    def asked_to_stop(pool, stop, *rest) -> None:
        watch(pool, stop, *rest)
        stop.received = "SIGTERM"

    monkeypatch.setattr(runner, "_watch", asked_to_stop)
    outcome = go(ablation(home), tmp_path)
    assert len(started) == 1
    assert outcome.stopped_by == "SIGTERM"
