"""A run that was stopped and resumed is the run that was not: bit for bit, in every format."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from run_helpers import result, rows, tiny, untimed, write_texts

POLICIES = (
    pytest.param("f32", marks=pytest.mark.long),
    pytest.param("mixed_bf16", marks=pytest.mark.long),
    pytest.param("mixed_f16", marks=pytest.mark.long),
    pytest.param("nvfp4,p=bf16.sr", marks=pytest.mark.long),
    pytest.param("p=bf16.kahan,c=bf16,o=f32,mu=mxfp4,nu=int8@block16", marks=pytest.mark.long),
)


@pytest.fixture(autouse=True)
def _no_curves(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawing would be a fifth of the time of these tests."""
    monkeypatch.setattr("lmjax.train.records.draw_curves", lambda *_: None)


@pytest.fixture(scope="module")
def config(home: Path) -> Callable[[str], Any]:
    """Dropout, micro-batches, and a loss scale that overflows at first and grows again soon."""
    return lambda precision: tiny(
        home,
        precision,
        micro_batches=2,
        model={"dropout": 0.1},
        loss_scale={"initial": 2.0**24, "growth_interval": 7},
    )


@pytest.fixture(scope="module")
def uninterrupted(
    config: Callable[[str], Any], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Path]:
    """The run directory of the undisturbed run of a policy, trained once."""
    from lmjax.train import train

    done: dict[str, Path] = {}

    def run(precision: str) -> Path:
        if precision not in done:
            workdir = tmp_path_factory.mktemp("uninterrupted") / "run"
            train(config(precision), workdir, progress=False)
            done[precision] = workdir
        return done[precision]

    return run


@pytest.mark.parametrize("precision", POLICIES)
def test_stopped_twice_equals_uninterrupted(
    precision: str,
    config: Callable[[str], Any],
    uninterrupted: Callable[[str], Path],
    tmp_path: Path,
) -> None:
    from lmjax.train import train

    workdir = tmp_path / "run"
    first = train(config(precision), workdir, stop_after=23, progress=False)
    assert (first.step, first.result) == (23, None)
    second = train(config(precision), workdir, stop_after=4, progress=False)
    assert (second.step, second.result) == (27, None)
    last = train(config(precision), workdir, progress=False)

    reference = uninterrupted(precision)
    assert last.step == 40
    assert untimed(workdir) == untimed(reference)
    for name in ("parameters_sha256", "eval_loss", "tokens", "steps"):
        assert result(workdir)[name] == result(reference)[name]
    assert len({(row["step"], "eval_loss" in row) for row in rows(workdir)}) == 8 + 3


@pytest.mark.long
def test_the_loss_scale_changes_on_both_sides_of_the_interruption(
    uninterrupted: Callable[[str], Path],
) -> None:
    """Otherwise the test above would say nothing about the state of the loss scale."""
    logged = [row for row in rows(uninterrupted("mixed_f16")) if "loss" in row]
    before = {row["loss_scale"] for row in logged if row["step"] <= 20}
    after = {row["loss_scale"] for row in logged if row["step"] >= 25}
    assert len(before) > 1
    assert len(after) > 1
    assert 0 < logged[0]["skipped_steps"] < logged[-1]["skipped_steps"] < 20


@pytest.mark.long
def test_batches_continue_where_the_run_stopped(
    config: Callable[[str], Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lmjax.parallel import sharding
    from lmjax.train import train

    seen: list[bytes] = []
    place = sharding.global_batch

    def record(mesh: Any, batch: Any, processes: int) -> Any:
        if "weights" not in batch:  # held-out batches carry weights
            seen.append(batch["inputs"].tobytes() + batch["targets"].tobytes())
        return place(mesh, batch, processes)

    monkeypatch.setattr(sharding, "global_batch", record)
    train(config("f32"), tmp_path / "whole", progress=False)
    whole, seen[:] = list(seen), []
    train(config("f32"), tmp_path / "parts", stop_after=23, progress=False)
    train(config("f32"), tmp_path / "parts", progress=False)
    assert len(set(whole)) == 40
    assert seen == whole


def test_rows_beyond_the_checkpoint_and_half_rows_are_dropped(
    config: Callable[[str], Any], uninterrupted: Callable[[str], Path], tmp_path: Path
) -> None:
    """What a killed process leaves: rows of steps that will be repeated, the last cut short."""
    from lmjax.train import train

    workdir = tmp_path / "run"
    train(config("f32"), workdir, stop_after=23, progress=False)
    with (workdir / "metrics.jsonl").open("a") as file:
        file.write('{"step": 25, "loss": 0.5}\n{"step": 30, "eval_loss": 0.5}\n{"step": 30, "lo')
    train(config("f32"), workdir, progress=False)
    assert untimed(workdir) == untimed(uninterrupted("f32"))


def test_killed_between_the_last_evaluation_and_the_result(
    config: Callable[[str], Any], uninterrupted: Callable[[str], Path], tmp_path: Path
) -> None:
    from lmjax.train import train

    workdir = tmp_path / "run"
    finished = train(config("f32"), workdir, progress=False)
    (workdir / "result.json").unlink()
    again = train(config("f32"), workdir, progress=False)
    assert again.result == finished.result
    assert untimed(workdir) == untimed(uninterrupted("f32"))


def test_training_time_accumulates_to_the_very_step(
    config: Callable[[str], Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A clock that moves one second a reading: steps after the last logged one count too."""
    from lmjax.runs.checkpoint import Checkpoints
    from lmjax.train import train

    saved: list[float] = []
    save = Checkpoints.save

    def record(self: Any, step: int, state: Any, data: Any, progress: Any, **options: Any) -> None:
        saved.append(progress["train_seconds"])
        save(self, step, state, data, progress, **options)

    monkeypatch.setattr(Checkpoints, "save", record)
    monkeypatch.setattr("lmjax.train.log.time.perf_counter", iter(range(10**6)).__next__)
    # Step 3 comes after the last logged row (none): only saving can count its time.
    train(config("f32"), tmp_path / "run", stop_after=3, progress=False)
    train(config("f32"), tmp_path / "run", stop_after=3, progress=False)
    assert 0 < saved[0] < saved[1]


def test_a_finished_run_is_left_as_it_is(
    config: Callable[[str], Any], uninterrupted: Callable[[str], Path]
) -> None:
    from lmjax.train import train

    workdir = uninterrupted("f32")
    kept = ("result.json", "metrics.jsonl", "config.json", "environment.json", "tokenizer.json")
    before = {name: (workdir / name).stat().st_mtime_ns for name in kept}
    outcome = train(config("f32"), workdir, progress=False)
    assert outcome.result == result(workdir)
    assert {name: (workdir / name).stat().st_mtime_ns for name in kept} == before


def test_another_text_is_refused_and_nothing_is_overwritten(home: Path, tmp_path: Path) -> None:
    """The copy of the tokenizer must stay the one that the checkpoints were trained with."""
    from lmjax.train import InputError, train

    texts = write_texts(tmp_path / "texts")
    bpe = {"files": (str(texts / "*.txt"),), "tokenizer": "bpe", "vocab_size": 280}
    config = tiny(home, model={"vocab_size": 280}, data=bpe)
    train(config, tmp_path / "run", stop_after=2, progress=False)
    before = {path: path.read_bytes() for path in (tmp_path / "run").iterdir() if path.is_file()}
    for path in texts.iterdir():
        path.write_text(path.read_text().upper())
    with pytest.raises(InputError, match="another text"):
        train(config, tmp_path / "run", progress=False)
    assert {path: path.read_bytes() for path in before} == before


@pytest.mark.long
def test_a_run_resumes_in_another_precision_if_it_may_cast(home: Path, tmp_path: Path) -> None:
    from lmjax.runs.checkpoint import CheckpointError
    from lmjax.train import InputError, train

    run = tmp_path / "run"
    train(tiny(home), run, stop_after=2, progress=False)
    with pytest.raises(InputError, match=r"--restore\.allow-cast"):
        train(tiny(home, "pure_bf16"), run, progress=False)
    cast = tiny(home, "pure_bf16", restore={"allow_cast": True})
    assert train(cast, run, stop_after=2, progress=False).step == 4
    assert (run / "config.until-2.json").exists()
    assert train(tiny(home, "pure_bf16"), run, stop_after=1, progress=False).step == 5
    with pytest.raises(CheckpointError, match=r"stores opt_state.* but the run needs nothing"):
        train(tiny(home, "pure_bf16,mu=mxfp4", restore={"allow_cast": True}), run, progress=False)
    assert train(tiny(home, "pure_bf16"), run, stop_after=1, progress=False).step == 6


@pytest.mark.parametrize("name", ["mesh", "data.cache_dir"])
def test_where_a_run_is_computed_is_not_its_identity(name: str, home: Path, tmp_path: Path) -> None:
    from lmjax.train import train

    elsewhere = {
        "mesh": {"mesh": {"data": 1}},
        "data.cache_dir": {"data": {"cache_dir": str(home / "cache")}},
    }[name]
    train(tiny(home), tmp_path / "run", stop_after=2, progress=False)
    assert train(tiny(home, **elsewhere), tmp_path / "run", stop_after=1, progress=False).step == 3
