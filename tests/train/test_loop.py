"""A whole run: its files, its end, and its end when nothing can be learned."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import matplotlib.image
import pytest
from run_helpers import RESULT_KEYS, result, rows, tiny

from lmjax.runs.checkpoint import Checkpoints
from lmjax.train import InputError, TrainingFailed, train

LOGGED = {
    "step",
    "loss",
    "learning_rate",
    "grad_norm",
    "loss_scale",
    "skipped_steps",
    "tokens_per_second",
    "step_seconds",
    "mfu",
    "peak_memory_bytes",
}


@pytest.fixture(scope="module")
def finished(home: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a run that is done."""
    workdir = tmp_path_factory.mktemp("finished") / "run"
    outcome = train(tiny(home, steps=32), workdir, progress=False)
    assert outcome.step == 32
    assert outcome.result == result(workdir)
    return workdir


def test_the_files_of_a_run(finished: Path) -> None:
    assert {path.name for path in finished.iterdir()} == {
        "config.json",
        "environment.json",
        "metrics.jsonl",
        "result.json",
        "tokenizer.json",
        "checkpoints",
        "tensorboard",
        "curves.png",
        ".lock",
    }
    assert sorted(int(path.name) for path in (finished / "checkpoints").iterdir()) == [30, 32]


def test_rows_at_every_fifth_step_and_the_last(finished: Path) -> None:
    logged = [row for row in rows(finished) if "loss" in row]
    assert [row["step"] for row in logged] == [5, 10, 15, 20, 25, 30, 32]
    assert all(set(row) == LOGGED for row in logged)
    evaluated = [row for row in rows(finished) if "eval_loss" in row]
    assert [row["step"] for row in evaluated] == [15, 30, 32]
    assert all(set(row) == {"step", "eval_loss"} for row in evaluated)


def test_the_result(finished: Path) -> None:
    recorded = result(finished)
    assert list(recorded) == RESULT_KEYS
    assert recorded["steps"] == 32
    assert recorded["tokens"] == 32 * 4 * 16
    assert recorded["eval_loss"] == rows(finished)[-1]["eval_loss"]
    assert 0 < recorded["train_seconds"] < 100
    int(recorded["parameters_sha256"], 16)


def test_something_was_learned(finished: Path) -> None:
    losses = [row["loss"] for row in rows(finished) if "loss" in row]
    assert losses[-1] < losses[0] - 1


def test_the_curves_are_not_blank(finished: Path) -> None:
    picture = matplotlib.image.imread(finished / "curves.png")
    assert picture.std() > 0.01
    assert (finished / "curves.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


@pytest.mark.parametrize("log_every", [5, 1000])
def test_gradients_that_stay_non_finite_fail_the_run(
    log_every: int, home: Path, tmp_path: Path
) -> None:
    """Ten steps that learn, then a forward pass that overflows: the checkpoint before is intact."""
    config = tiny(home, "mixed_f16", log_every=log_every, loss_scale={"max_consecutive_skips": 10})
    train(config, tmp_path / "run", stop_after=10, progress=False)
    _overflow(tmp_path / "run")
    before = _parameters(tmp_path / "run")
    with pytest.raises(TrainingFailed, match=r"not finite, at loss scale .*learning rate"):
        train(config, tmp_path / "run", progress=False)
    assert not (tmp_path / "run" / "result.json").exists()
    assert _parameters(tmp_path / "run") == before


def test_a_short_run_that_skipped_every_step_is_not_a_success(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Shorter than the limit of consecutive skips, so that only its end can notice."""
    from lmjax.model import head

    losses = head.token_losses
    monkeypatch.setattr(
        head,
        "token_losses",
        lambda *a, **more: losses(*a, **more)._replace(cross_entropy=a[0][..., 0] / 0.0),
    )
    with pytest.raises(TrainingFailed, match="last 6 steps up to step 6"):
        train(tiny(home, steps=6), tmp_path / "run", progress=False)
    assert not (tmp_path / "run" / "result.json").exists()
    assert json.loads(json.dumps(rows(tmp_path / "run")))[-1]["skipped_steps"] == 6
    assert (tmp_path / "run" / "curves.png").exists(), "a run that diverged still draws its curves"


def _overflow(workdir: Path) -> None:
    """Rewrites the newest checkpoint with an embedding that f16 cannot hold."""
    import jax

    state, step, restored = _restored(workdir)
    params = jax.tree.map(lambda leaf: leaf, state.params)
    params["embed"] = jax.tree.map(lambda leaf: leaf + 1e6, params["embed"])
    checkpoints = Checkpoints(workdir / "checkpoints", 2)
    later = state._replace(params=params, step=state.step + 1)
    checkpoints.save(step + 1, later, restored.data, restored.progress)
    checkpoints.close()


def _restored(workdir: Path) -> Any:
    from lmjax.parallel import sharding
    from lmjax.train import abstract_state, read_config

    checkpoints = Checkpoints(workdir / "checkpoints")
    step = checkpoints.latest()
    assert step is not None
    mesh = sharding.make_mesh(sharding.MeshConfig())
    restored = checkpoints.restore(step, abstract_state(read_config(workdir), mesh))
    checkpoints.close()
    return restored.state, step, restored


def _parameters(workdir: Path) -> str:
    from lmjax.runs.run_directory import parameters_sha256

    return parameters_sha256(_restored(workdir)[0].params)


def test_a_non_finite_evaluation_is_recorded_in_strict_json(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lmjax.train.loop.held_out_loss", lambda *_, **__: float("inf"))
    outcome = train(tiny(home, steps=2), tmp_path / "run", progress=False)
    assert result(tmp_path / "run")["eval_loss"] == "inf"
    assert outcome.result == result(tmp_path / "run")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": {"vocab_size": 100}}, "raise --model.vocab-size"),
        ({"precision": "p=f64"}, "JAX_ENABLE_X64=1"),
        ({"mesh": {"tensor": 3}}, "do not divide"),
        ({"context": 10_000, "model": {"positions": "rope"}}, "too short for a window"),
    ],
)
def test_what_does_not_fit_together_is_refused_before_anything_is_written(
    changes: dict[str, Any], message: str, home: Path, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=message):
        train(tiny(home, **changes), tmp_path / "run", progress=False)
    assert not (tmp_path / "run").exists()


def test_stopping_after_no_step_is_refused(home: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="at least 1"):
        train(tiny(home), tmp_path / "run", stop_after=0)
    assert not (tmp_path / "run").exists()


def test_a_run_on_a_backend_that_drops_roundings_does_not_start(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lmjax.precision import exact

    def fail(backend: str) -> None:
        raise exact.ExcessPrecisionError(backend)

    monkeypatch.setattr(exact, "check_canary", fail)
    with pytest.raises(exact.ExcessPrecisionError):
        train(tiny(home), tmp_path / "run", progress=False)
    assert not (tmp_path / "run").exists()
