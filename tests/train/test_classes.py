"""A run that tells classes apart: trained on a table, from a model without a head, and scored."""

from __future__ import annotations

import dataclasses
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from run_helpers import RESULT_KEYS, result, strict_loads, tiny

from lmjax.cli import verbs
from lmjax.data import tokenized_corpus
from lmjax.errors import InputError
from lmjax.inference import evaluate, load_model
from lmjax.model import ModelConfig, structure
from lmjax.precision import paths
from lmjax.train import train
from lmjax.train.classes import Confusion

MODEL = {"family": "encoder", "max_positions": 24, "vocab_size": 257}


@pytest.fixture(scope="module")
def config(home: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Texts of a few letters in any order; those of one class have a z among them."""
    draw, rows = random.Random(0), ["text,label"]
    for index in range(400):
        letters = [draw.choice("abcdef") for _ in range(draw.randrange(4, 20))]
        letters[draw.randrange(len(letters))] = "z" if index % 2 else "y"
        rows.append(f"{''.join(letters)},{'with' if index % 2 else 'without'}")
    path = tmp_path_factory.mktemp("table") / "letters.csv"
    path.write_text("\n".join(rows) + "\n")
    data = {"dataset": "labelled_files", "files": (str(path),)}
    evaluation = {"every": 0, "batch_size": 16}  # which pads the last batch
    return tiny(home, steps=60, context=24, batch_size=16, data=data, evaluation=evaluation,
                model=MODEL | {"classes": 2})  # fmt: skip


def test_a_run_learns_classes_and_says_how_many_it_tells(
    config: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    train(config, tmp_path / "run", progress=False)
    found = result(tmp_path / "run")
    assert list(found) == [*RESULT_KEYS, "accuracy", "error_rate", "f1", "labels", "confusion"]
    counts = np.array(found["confusion"])
    assert found["labels"] == ["with", "without"]
    texts = tokenized_corpus(config.data, window=25).validation_classes
    assert texts is not None
    assert len(texts) % 16
    assert counts.sum(1).tolist() == np.bincount(texts).tolist(), "rows of padding do not count"
    assert found["accuracy"] == np.trace(counts) / counts.sum() > 0.9
    assert (tmp_path / "run" / "confusion.png").read_bytes().startswith(b"\x89PNG")
    again = evaluate(load_model(tmp_path / "run"), progress=False)
    assert (again.accuracy, again.f1) == (found["accuracy"], found["f1"])
    assert again.eval_loss == pytest.approx(found["eval_loss"], rel=1e-6)
    words = f"nats per text, accuracy {again.accuracy:.4f} and F1 {again.f1:.4f}"
    for verb in ("evaluate", "resume"):
        with pytest.raises(SystemExit, match="0"):
            verbs.main([verb, str(tmp_path / "run")])
        assert words in capsys.readouterr().out


@pytest.mark.long
def test_another_number_of_classes_gets_a_new_head(config: Any, tmp_path: Path):
    train(dataclasses.replace(config, steps=1), tmp_path / "run", progress=False)
    more = dataclasses.replace(config.model, classes=3)
    own = dataclasses.replace(config, init_from=str(tmp_path / "run"), model=more, steps=1)
    train(own, tmp_path / "more", progress=False)
    origin = strict_loads((tmp_path / "more" / "origin.json").read_text())
    assert origin["heads"] == ["head: new, drawn from the seed"]
    still = load_model(tmp_path / "more").params["embed"]["table"]
    assert np.abs(still - load_model(tmp_path / "run").params["embed"]["table"]).max() < 0.02


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ({"classes": 0}, "the text has 2 classes, but the model tells 0 apart"),
        ({"headless": True, "classes": 0}, "the model has no head, so it predicts nothing"),
    ],
)
def test_a_model_that_does_not_fit_the_classes_is_refused(
    config: Any, tmp_path: Path, model: dict[str, Any], message: str
):
    changed = dataclasses.replace(config, model=dataclasses.replace(config.model, **model))
    with pytest.raises(InputError, match=message):
        train(changed, tmp_path / "run", progress=False)
    assert not (tmp_path / "run").exists()


def test_scores_are_those_of_the_counts():
    made = Confusion(np.array([[6, 2, 0], [1, 3, 0], [0, 0, 0]]), ("a", "b", "c"))
    assert made.accuracy == 9 / 12
    assert made.f1 == pytest.approx((12 / 15 + 6 / 9 + 0) / 3)


def test_a_headless_encoder_has_a_pooled_token_and_no_head():
    places = {path.partition("/")[0] for path in paths.flatten(structure(headless())[1])}
    assert places == {"embed", "positions", "norm", "blocks", "pool"}
    with pytest.raises(ValueError, match=r"model\.classes is 2, but model\.headless"):
        dataclasses.replace(headless(), classes=2)


def headless() -> ModelConfig:
    return ModelConfig(**MODEL, width=16, heads=2, headless=True)
