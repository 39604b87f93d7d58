"""Encoders are quantized and pruned as decoders are, with texts in rows of their own."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from run_helpers import home
from untrained import untrained, verb

from lmjax.cli.common import BAD_INPUT, DONE
from lmjax.compression import Calibration, QuantizeConfig, calibration_batches, quantize
from lmjax.compression.written import write_run
from lmjax.errors import InputError
from lmjax.inference import TrainedModel, load_model

__all__ = ["home"]

ENCODER = {"family": "encoder", "max_positions": 24, "vocab_size": 257, "token_types": 2}


@pytest.fixture(scope="module")
def model(home: Path, tmp_path_factory: pytest.TempPathFactory) -> TrainedModel:
    """One that tells 400 texts of a few letters apart."""
    draw, path = np.random.default_rng(0), tmp_path_factory.mktemp("table") / "letters.csv"
    texts = ["".join(draw.choice(list("abcdef"), draw.integers(4, 20))) for _ in range(400)]
    rows = [f"{text},{'with' if 'a' in text else 'without'}" for text in texts]
    path.write_text("\n".join(["text,label", *rows]) + "\n")
    data = {"dataset": "labelled_files", "files": (str(path),)}
    return untrained(home, context=24, data=data, model=ENCODER | {"classes": 2})


def test_padding_is_not_counted(model: TrainedModel) -> None:
    """Texts in longer rows, beside rows that do not count, are read as without."""
    tokens = np.random.default_rng(0).integers(0, 256, (3, 24)).astype(np.int32)
    lengths, weights = np.array([7, 7, 5], np.int32), np.array([1, 1, 0], np.float32)
    padded = {"inputs": tokens, "lengths": lengths, "weights": weights}
    found = Calibration.of(model.phase, model.params, [padded]).inputs
    alone = Calibration.of(model.phase, model.params, [{"inputs": tokens[:2, :7]}]).inputs
    assert found.keys() == alone.keys() >= {"blocks/0/mlp/down", "pool/dense", "head"}
    for path, own in found.items():
        assert own.count == alone[path].count == (2 if path in ("pool/dense", "head") else 14)
        for one, other in zip(own, alone[path], strict=True):
            np.testing.assert_allclose(one, other, rtol=1e-2, atol=1e-2, err_msg=path)


def test_texts_are_those_of_training_or_lines_of_a_file(
    model: TrainedModel, tmp_path: Path
) -> None:
    first, *others = calibration_batches(model, None, 20)
    assert [len(batch["inputs"]) for batch in (first, *others)] == [8, 8]
    assert set(first) == {"inputs", "lengths", "classes", "weights"}
    (tmp_path / "lines.txt").write_text("abc\n\nde\nfedcba\n")
    (lines,) = calibration_batches(model, tmp_path / "lines.txt", 20)
    framing = int(model.tokenizer.has_start) + 1
    assert lines["lengths"].tolist() == [3 + framing, 2 + framing, 6 + framing]
    (tmp_path / "empty.txt").write_text(" \n")
    with pytest.raises(InputError, match="has no text"):
        calibration_batches(model, tmp_path / "empty.txt", 20)
    config = QuantizeConfig("w=int8@channel", tmp_path / "lines.txt", keep_worst=1)
    with pytest.raises(InputError, match="have no classes"):
        quantize(model, config)


@pytest.mark.long
def test_a_classifier_is_quantized_and_pruned(
    model: TrainedModel, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_run(tmp_path / "run", model)
    for method in ("gptq", "awq", "smoothquant"):
        flags = ["--policy", "w=int4@block8,x=int8@tensor.static", "--method", method, "--json"]
        assert verb("quantize", tmp_path / "run", *flags, "--to", tmp_path / method) == DONE
        said = json.loads(capsys.readouterr().out)
        assert said["after"]["accuracy"] > 0
        assert said["after"]["perplexity"] is None
        assert verb("evaluate", tmp_path / method, "--json") == DONE
        assert json.loads(capsys.readouterr().out)["accuracy"] == said["after"]["accuracy"]
    flags = ["--policy", "w=int2@block8", "--keep-worst", "1", "--json"]
    assert verb("quantize", tmp_path / "run", *flags, "--to", tmp_path / "kept") == DONE
    assert sum(row["format"] == "bf16" for row in json.loads(capsys.readouterr().out)["layers"]) > 0
    flags = ["--pattern", "2:4", "--method", "wanda", "--against", "w=int4@block8"]
    assert verb("prune", tmp_path / "run", *flags, "--to", tmp_path / "sparse") == DONE
    assert "accuracy" in capsys.readouterr().out
    kernel = load_model(tmp_path / "sparse").params["blocks"]["mlp"]["up"]["kernel"]
    assert np.mean(np.asarray(kernel) == 0) == 0.5


@pytest.mark.long
@pytest.mark.parametrize("headless", [False, True])
def test_other_encoders_are_quantized(headless: bool, home: Path, tmp_path: Path) -> None:
    """Of a model that predicts masked tokens, the head reads what stands at these."""
    own = untrained(home, model=ENCODER | {"headless": headless})
    (first, *_) = calibration_batches(own, None, 8)
    inputs = Calibration.of(own.phase, own.params, [first]).inputs
    assert inputs["blocks/0/mlp/up"].count == first["inputs"].size
    if not headless:
        masked = own.config.model.predicted(16) * len(first["inputs"])
        assert inputs["head"].count == inputs["transform/dense"].count == masked
    write_run(tmp_path / "run", own)
    flags = ["--policy", "w=int4@block8", "--method", "gptq"]
    assert verb("quantize", tmp_path / "run", *flags, "--to", tmp_path / "made") == DONE
    if headless:
        worst = [*flags, "--keep-worst", "1", "--to", tmp_path / "kept"]
        assert verb("quantize", tmp_path / "run", *worst) == BAD_INPUT
