"""Decoding computes what training's forward pass does; scores of texts and files under policies."""

from __future__ import annotations

import dataclasses
import importlib
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from run_helpers import strict_loads

from lmjax.cli import verbs
from lmjax.data.tokenizers import ByteTokenizer
from lmjax.inference import TrainedModel, parity, perplexity, score
from lmjax.precision.grammar import PRESETS
from lmjax.runs.resolved import phase_of

CONTEXT = 16
TEXT = "the quick Ж fox"

module = importlib.import_module("lmjax.inference.parity")
verbs_module = importlib.import_module("lmjax.cli.inference")


@pytest.fixture(scope="module")
def model(tiny: Callable[..., Any], draw_params: Callable[..., Any]) -> TrainedModel:
    config = tiny("f32", "llama", model={"vocab_size": 256})
    return TrainedModel(phase_of(config), draw_params(config, std=0.3), 0, ByteTokenizer())


@pytest.fixture
def loaded(model: TrainedModel, monkeypatch: pytest.MonkeyPatch) -> TrainedModel:
    """Verbs load this model, whatever the run is called."""
    monkeypatch.setattr(verbs_module, "load_model", lambda run: model)
    return model


def lmjax(*arguments: str) -> int:
    with pytest.raises(SystemExit) as error:
        verbs.main(arguments)
    return int(error.value.code or 0)


SOME = ("f32", "mixed_bf16; **/scores: kv=e4m3@channel")


@pytest.mark.parametrize(
    "policy",
    [*SOME, *(pytest.param(name, marks=pytest.mark.long) for name in PRESETS)],
)
def test_decoding_agrees_with_training_and_with_reading_again(
    policy: str, model: TrainedModel
) -> None:
    found = parity(model.under(policy), TEXT)
    assert found.holds
    assert len(found.forward) == len(found.decoded) == len(found.rerun) == len(TEXT.encode())
    assert found.bound < {"f32": 1e-5, "fp8": 0.7}.get(policy, 4)
    assert np.ptp(found.forward) > 0.5
    expected = score(model.under(policy), TEXT).log_probabilities
    np.testing.assert_array_equal(found.forward, expected)


def test_a_difference_is_found(
    loaded: TrainedModel, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    decoded = module._decoded
    off = lambda *given: decoded(*given) + np.eye(1, len(TEXT.encode()), 3)[0] * 1e-4
    capsys.readouterr()
    assert lmjax("parity", "run", "--text", TEXT, "--precision", "f32", "--json") == 0
    (row,) = strict_loads(capsys.readouterr().out)["policies"]
    assert row["holds"]
    assert row["difference"] < 1e-5
    monkeypatch.setattr(module, "_decoded", off)
    assert lmjax("parity", "run", "--text", TEXT, "--precision", "f32") == 1
    assert "exceeded" in capsys.readouterr().out


def test_a_text_without_a_window_is_refused(loaded: TrainedModel) -> None:
    for text in ("", "a", "x" * 17):
        assert lmjax("parity", "run", "--text", text, "--precision", "f32") == 2


# --- Scores ---


def test_a_probability_is_the_product_of_conditionals(model: TrainedModel) -> None:
    """P(w1..wn) = P(w1) P(w2 | w1) ..., each from the logits after the tokens before."""
    scored = score(model, "fox")
    ids = np.asarray([[255, *b"fox"]], np.int32)
    logits = np.asarray(model.logits_function()(model.params, ids), np.float64)[0]
    p = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    product = math.prod(p[i, ids[0, i + 1]] for i in range(3))
    assert math.exp(scored.total) == pytest.approx(product, rel=1e-5)
    found = perplexity(model, "fox")
    assert found.perplexity == pytest.approx(product ** (-1 / 3), rel=1e-5)
    assert found.bits_per_byte == scored.bits_per_byte


@pytest.mark.parametrize("stride", [1, 5, 16])
def test_a_window_slides_by_the_stride(stride: int, model: TrainedModel) -> None:
    text = "a lazy dog jumps over the quick brown fox"
    scored = score(model, text, stride=stride).log_probabilities
    ids = np.asarray([255, *text.encode()], np.int32)
    logits_of = model.logits_function()
    for target in (1, 16, 17, 20, len(text)):
        first = max(-(-(target - CONTEXT) // stride), 0) * stride
        window = np.zeros((1, CONTEXT), np.int32)
        window[0, : target - first] = ids[first:target]
        logits = np.asarray(logits_of(model.params, window), np.float64)[0, target - first - 1]
        expected = logits[ids[target]] - np.log(np.exp(logits).sum())
        assert scored[target - 1] == pytest.approx(expected, abs=1e-5)
    assert perplexity(model, text, stride=stride).nats == -math.fsum(scored)


@pytest.mark.parametrize("stride", [-1, 17, 1.5, math.nan])
def test_other_strides_are_refused(stride: Any, model: TrainedModel) -> None:
    with pytest.raises(ValueError, match=r"^stride "):
        score(model, "fox", stride=stride)


def test_policies_side_by_side(loaded: TrainedModel, capsys: pytest.CaptureFixture[str]) -> None:
    policies = ["--precision", "f32", "--precision", "mixed_bf16"]
    capsys.readouterr()
    assert lmjax("score", "run", "--text", "Жx", *policies) == 0
    out = capsys.readouterr().out.splitlines()
    assert out[0].split() == ["text", "tokens", "f32", "mixed_bf16"]
    both = [score(loaded.under(policy), "Жx") for policy in ("f32", "mixed_bf16")]
    assert out[1].split() == ["'Ж'", "2", *(f"{s.pieces[0].log_probability:.4f}" for s in both)]
    assert f"mixed_bf16: log P = {both[1].total:.4f} nats over 3 tokens" in "\n".join(out)
    assert lmjax("score", "run", "--text", "Жx", *policies, "--json") == 0
    found = strict_loads(capsys.readouterr().out)["policies"]
    assert [row["log_probability"] for row in found] == [s.total for s in both]
    assert lmjax("score", "run", "--text", "x", "--precision", "float3") == 2


def test_files_are_documents(
    loaded: TrainedModel, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    texts = {"a": "the quick brown fox jumps over", "b": "Ж dog"}
    for name, text in texts.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
    flags = [part for name in texts for part in ("--file", str(tmp_path / name))]
    capsys.readouterr()
    assert lmjax("score", "run", *flags, "--precision", "f32", "--precision", "fp8", "--json") == 0
    rows = strict_loads(capsys.readouterr().out)["scores"]
    assert [row["precision"] for row in rows] == ["f32", "fp8"] * 3
    for row in rows[:4]:
        text = texts[Path(row["file"]).name]
        own = perplexity(loaded.under(row["precision"]), text)
        assert row["nats"] == own.nats
        assert row["bits_per_byte"] == own.nats / math.log(2) / len(text.encode())
    assert rows[4]["nats"] == rows[0]["nats"] + rows[2]["nats"]
    assert rows[4]["tokens"] == rows[4]["bytes"] == 36
    assert lmjax("score", "run", *flags, "--precision", "f32", "--precision", "fp8") == 0
    assert capsys.readouterr().out.count("fp8") == 3


def test_bad_texts_are_one_line(
    loaded: TrainedModel, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty").write_text("")
    (tmp_path / "latin").write_bytes(b"caf\xe9")
    cases = {
        "is empty": ["--file", str(tmp_path / "empty")],
        "byte 3 is invalid": ["--file", str(tmp_path / "latin")],
        "cannot read": ["--file", str(tmp_path / "none")],
        "cannot read ": ["--file", str(tmp_path)],
        "either --text or --file": [],
        "either --text or": ["--text", "x", "--file", str(tmp_path / "latin")],
        "no text": ["--text", ""],
    }
    for words, flags in cases.items():
        capsys.readouterr()
        assert lmjax("score", "run", *flags) == 2
        out, err = capsys.readouterr()
        assert (out, len(err.splitlines())) == ("", 1)
        assert words in err


def test_a_model_under_another_policy_keeps_its_parameters(model: TrainedModel) -> None:
    narrow = model.under("mixed_bf16")
    assert narrow.params is model.params
    assert narrow.sites["head"].compute.name == "bf16"
    assert dataclasses.replace(narrow, phase=model.phase) == model
