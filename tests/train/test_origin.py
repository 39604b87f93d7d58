"""A run that starts from the parameters of another, and one that is prolonged."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from run_helpers import result, rows, strict_loads, tiny

from lmjax.data.tokenizers import train_bpe
from lmjax.errors import InputError
from lmjax.inference import load_model
from lmjax.optim.optimizer import learning_rate_schedule
from lmjax.precision import paths
from lmjax.runs.config import extended, unextended
from lmjax.train import read_config, train

STEPS, MORE = 6, 4


@pytest.fixture(autouse=True)
def _no_curves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lmjax.train.records.draw_curves", lambda *_: None)


@pytest.fixture(scope="module")
def config(home: Path) -> Any:
    return tiny(home, steps=STEPS, log_every=1, optimizer={"warmup_steps": 2})


@pytest.fixture(scope="module")
def finished(config: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    workdir = tmp_path_factory.mktemp("finished") / "run"
    train(config, workdir, progress=False)
    return workdir


def test_a_run_starts_from_the_parameters_of_another(config: Any, finished: Path, tmp_path: Path):
    """With a learning rate of nearly nothing, it ends where it began: at those, rounded."""
    still = dataclasses.replace(config.optimizer, learning_rate=1e-30, weight_decay=0.0)
    changes = {"steps": 1, "optimizer": still, "init_from": str(finished)}
    tuned = dataclasses.replace(config, precision="p=bf16,c=f32", seed=5, **changes)
    train(tuned, tmp_path / "tuned", progress=False)
    before, after = (
        paths.flatten(load_model(run).params) for run in (finished, tmp_path / "tuned")
    )
    for path, leaf in before.items():
        np.testing.assert_array_equal(after[path], leaf.astype(after[path].dtype), err_msg=path)
    record = strict_loads((tmp_path / "tuned" / "origin.json").read_text())
    assert record == {
        "from": str(finished),
        "step": STEPS,
        "parameters_sha256": result(finished)["parameters_sha256"],
        "casts": ["all cast from f32 to bf16"],
    }


def test_an_origin_that_does_not_fit_is_refused(config: Any, finished: Path, tmp_path: Path):
    def refused(origin: Path, message: str, **model: Any) -> None:
        own = dataclasses.replace(config.model, **model)
        changed = dataclasses.replace(config, init_from=str(origin), model=own)
        with pytest.raises(InputError, match=message):
            train(changed, tmp_path / "run", progress=False)
        assert not (tmp_path / "run").exists()

    wider = r"mlp/down/kernel is \[1, 64, 16\] there and \[1, 65, 16\] here"
    refused(finished, wider, mlp_width=65)
    refused(tmp_path / "nowhere", "nowhere is not a run directory")
    shutil.copytree(finished, tmp_path / "other")
    train_bpe(["another text"], 257).save(tmp_path / "other" / "tokenizer.json")
    refused(tmp_path / "other", "other was trained with another, bpe of 257 tokens; add --data.tok")


def test_a_finished_run_is_prolonged_on_record(config: Any, home: Path, tmp_path: Path):
    workdir = tmp_path / "run"
    train(config, workdir, stop_after=3, progress=False)
    longer = extended(config, MORE, "constant")
    with pytest.raises(InputError, match="is not finished, so it cannot be prolonged"):
        train(longer, workdir, progress=False)
    train(config, workdir, progress=False)
    first = rows(workdir)
    outcome = train(longer, workdir, stop_after=2, progress=False)
    assert (outcome.step, outcome.result) == (STEPS + 2, None)
    outcome = train(longer, workdir, progress=False)
    assert outcome.result is not None
    assert outcome.result["steps"] == result(workdir)["steps"] == STEPS + MORE
    assert result_of(workdir, f"result.until-{STEPS}.json")["steps"] == STEPS
    assert result_of(workdir, f"config.until-{STEPS}.json")["steps"] == STEPS
    assert read_config(workdir).optimizer.extensions == (f"{STEPS}:constant",)
    (line,) = (workdir / "history.jsonl").read_text().splitlines()
    change = strict_loads(line)
    assert change["step"] == STEPS
    assert change["changed"]["steps"] == {"was": STEPS, "is": STEPS + MORE}
    assert rows(workdir)[: len(first)] == first
    rates = [row["learning_rate"] for row in rows(workdir) if "learning_rate" in row][STEPS:]
    last = config.optimizer.learning_rate * config.optimizer.final_fraction
    assert rates == pytest.approx([last] * MORE, rel=1e-6)
    with pytest.raises(InputError, match="holds another run"):
        train(dataclasses.replace(config, steps=20), workdir, progress=False)


def result_of(workdir: Path, name: str) -> Any:
    return strict_loads((workdir / name).read_text())


@pytest.mark.parametrize(("schedule", "end"), [("cosine", 0.1), ("wsd", 0.1), ("constant", 1.0)])
def test_the_rate_stays_or_rises_again(config: Any, schedule: str, end: float):
    shape = dataclasses.replace(
        config.optimizer, schedule=schedule, learning_rate=1.0, warmup_steps=10
    )
    plain = dataclasses.replace(config, steps=100, optimizer=shape)
    stays = extended(extended(plain, 50, "constant"), 50, "rewarm")
    assert (stays.steps, unextended(unextended(stays))) == (200, plain)
    rate = learning_rate_schedule(stays.optimizer, stays.steps)
    alone = learning_rate_schedule(shape, 100)
    assert [float(rate(s)) for s in (0, 5, 50, 99)] == [float(alone(s)) for s in (0, 5, 50, 99)]
    assert float(rate(100)) == float(rate(149)) == pytest.approx(end)
    assert float(rate(150)) == pytest.approx(end + (1 - end) / 10)
    assert float(rate(159)) == pytest.approx(1.0)
    assert float(rate(200)) == pytest.approx(end)


@pytest.mark.parametrize("text", ["6", "6:linear", "x:constant", "60:constant"])
def test_extensions_of_another_form_are_refused(config: Any, text: str):
    with pytest.raises(ValueError, match="--extend-steps"):
        dataclasses.replace(
            config, optimizer=dataclasses.replace(config.optimizer, extensions=(text,))
        )
