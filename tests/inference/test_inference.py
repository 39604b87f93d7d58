"""Using a run: generate, score and evaluate agree with training and with each other."""

from __future__ import annotations

import dataclasses
import importlib
import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from run_helpers import result, tiny

from lmjax.inference import TrainedModel, evaluate, generate, load_model, score
from lmjax.runs.checkpoint import CheckpointError
from lmjax.train import InputError, make_eval_step, train

CONTEXT = 16

reading = importlib.import_module("lmjax.inference.reading")


@pytest.fixture(scope="module")
def workdir(home: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run in bf16: a forward pass in any other format gives other numbers."""
    folder = tmp_path_factory.mktemp("inference") / "run"
    train(tiny(home, "mixed_bf16", steps=60), folder, progress=False)
    return folder


@pytest.fixture(scope="module")
def model(workdir: Path) -> TrainedModel:
    return load_model(workdir)


# --- The model ---


def test_the_newest_parameters_in_their_stored_formats(model: TrainedModel, workdir: Path) -> None:
    from lmjax.runs.run_directory import parameters_sha256

    assert model.step == 60
    assert parameters_sha256(model.params) == result(workdir)["parameters_sha256"]


@pytest.mark.parametrize(("precision", "dtype"), [(None, "bfloat16"), ("c=f16", "float16")])
def test_computes_in_the_formats_of_the_policy(
    precision: str | None,
    dtype: str,
    workdir: Path,
    equations: Callable[..., list[Any]],
) -> None:
    model = load_model(workdir, precision=precision)
    jaxpr = model.logits_function().trace(model.params, np.zeros((1, CONTEXT), np.int32)).jaxpr
    operands = {v.aval.dtype.name for e in equations(jaxpr, "dot_general") for v in e.invars}
    assert operands == {dtype}


def test_no_run_no_checkpoint_another_model(workdir: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is not a run directory"):
        load_model(tmp_path)
    config = json.loads((workdir / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match="no checkpoint yet"):
        load_model(tmp_path)
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(InputError, match="no complete checkpoint"):
        load_model(tmp_path)
    (tmp_path / "checkpoints").rmdir()
    (tmp_path / "checkpoints").symlink_to(workdir / "checkpoints")
    config["model"]["mlp_width"] = 32
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="blocks"):
        load_model(tmp_path)


def test_a_damaged_checkpoint_is_not_used_and_nothing_is_moved(
    workdir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    shutil.copytree(workdir, run)
    (run / "checkpoints" / "60" / "state" / "manifest.ocdbt").write_bytes(b"")
    before = sorted(run.rglob("*"))
    assert load_model(run).step == 50
    assert "checkpoint 60 is damaged: state/manifest.ocdbt" in capsys.readouterr().err
    (run / "checkpoints" / "50" / "data.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"no checkpoint .* is intact"):
        load_model(run)
    assert sorted(run.rglob("*")) == before


# --- Generate ---


def test_the_seed_decides_the_text(model: TrainedModel) -> None:
    texts = [generate(model, "the", tokens=12, temperature=2.0, seed=seed) for seed in (0, 0, 1)]
    assert texts[0] == texts[1] != texts[2]


def test_seeds_that_share_their_low_word_are_different_texts(model: TrainedModel) -> None:
    seeds = (1, 2**32 + 1, 2**64 - 2**32 + 1)
    texts = {generate(model, "the", tokens=12, temperature=2.0, seed=seed) for seed in seeds}
    assert len(texts) == 3


@pytest.mark.parametrize("seed", [-1, 2**64, 0.5, True])
def test_a_number_that_is_not_a_seed_is_refused(seed: Any, model: TrainedModel) -> None:
    with pytest.raises(ValueError, match=r"seed is .* at most 2\*\*64 - 1"):
        generate(model, "the", seed=seed)


@pytest.fixture(scope="module")
def exact(workdir: Path) -> TrainedModel:
    """The model in f32, where no likeliest token hangs on a rounding."""
    return load_model(workdir, precision="f32")


def read_whole(model: TrainedModel, prompt: str, tokens: int) -> str:
    """Greedy decoding without a cache: every token from a forward pass over its whole window."""
    logits_of = model.logits_function()
    ids = [model.tokenizer.end_of_document, *map(int, model.tokenizer.encode(prompt))]
    said, first = len(ids), max(len(ids) - CONTEXT, 0)
    for _ in range(tokens):
        if len(ids) - first > CONTEXT:
            first = len(ids) - CONTEXT // 2
        window = np.zeros((1, CONTEXT), np.int32)
        window[0, : len(ids) - first] = ids[first:]
        logits = np.asarray(logits_of(model.params, window))[0, len(ids) - first - 1]
        ids.append(int(np.argmax(logits)))
    return model.tokenizer.decode(ids[said:])


@pytest.mark.parametrize("prompt", ["", "the qu", "the quick brown", "the quick brown fox jumps"])
@pytest.mark.parametrize("chunk", [64, 4])
def test_temperature_0_takes_the_likeliest_token_at_every_step(
    prompt: str, chunk: int, exact: TrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Past the context too, and from prompts shorter, as long, and longer than it."""
    monkeypatch.setattr(reading, "CHUNK", chunk)
    expected = read_whole(exact, prompt, 40)
    assert len(expected) == 40
    assert generate(exact, prompt, tokens=40, temperature=0.0) == expected
    assert generate(exact, prompt, tokens=40, top_k=1, seed=3) == expected


@pytest.mark.parametrize("precision", ["f32", "mixed_bf16"])
def test_every_token_is_read_once_until_the_context_is_full(
    precision: str, workdir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reading, "CHUNK", 4)
    reader = reading.Reader(load_model(workdir, precision=precision), 6)
    ids = list(range(1, 7))
    seen = []
    for token in range(7, 20):
        reader.logits(ids)
        seen.append((reader.first, reader.length))
        ids.append(token)
    assert seen[:11] == [(0, length) for length in range(6, 17)]
    assert seen[11:] == [(9, 8), (9, 9)], "half of the context is left when it overflows"


def test_programs_are_compiled_once_for_all_prompts_and_settings(exact: TrainedModel) -> None:
    generate(exact, "the", tokens=2)
    programs = reading.programs_of(exact)
    compiled = programs.read._cache_size(), programs.draw._cache_size()
    for prompt in ("a", "the lazy", "the quick brown fox jumps over"):
        more = {"top_p": 0.5, "top_k": 3, "repetition_penalty": 1.5, "window": 3}
        generate(dataclasses.replace(exact), prompt, tokens=7, seed=1, **more)
    assert (programs.read._cache_size(), programs.draw._cache_size()) == compiled


def test_the_cache_is_that_of_the_phase_the_run_ended_in(
    workdir: Path, exact: TrainedModel
) -> None:
    ids = [exact.tokenizer.end_of_document, *map(int, exact.tokenizer.encode("the quick"))]
    logits = lambda model: np.asarray(reading.Reader(model, len(ids)).logits(ids))
    coarse = load_model(workdir, precision="0: f32 | 30: f32,kv=int4@channel")
    difference = np.abs(logits(coarse) - logits(exact)).max()
    assert 1e-3 < difference < 2.0


def test_no_more_tokens_than_asked_for(model: TrainedModel) -> None:
    assert generate(model, "the", tokens=0) == ""
    assert len(generate(model, "the", tokens=5, temperature=0.0)) <= 5


@pytest.mark.parametrize("name", ["tokens", "temperature", "top_k"])
def test_negative_numbers_are_refused(name: str, model: TrainedModel) -> None:
    with pytest.raises(ValueError, match=rf"^{name} is -1(\.0)?; it must be at least 0"):
        generate(model, "the", **{name: -1})


# --- Score ---


def test_a_score_is_the_negative_loss_of_the_eval_step(model: TrainedModel) -> None:
    text = "the lazy dog"
    ids = np.asarray([model.tokenizer.end_of_document, *model.tokenizer.encode(text)], np.int32)
    rows = np.zeros((2, CONTEXT), np.int32)
    rows[0, : len(text)] = ids[:-1]
    targets = np.zeros((2, CONTEXT), np.int32)
    targets[0, : len(text)] = ids[1:]
    weights = np.zeros((2, CONTEXT), np.float32)
    weights[0, : len(text)] = 1
    config = dataclasses.replace(model.config, batch_size=2)
    batch = {"inputs": rows, "targets": targets, "weights": weights}
    nats, tokens = make_eval_step(config)(model.params, batch)
    scored = score(model, text)
    assert float(tokens) == len(scored.tokens) == len(text)
    assert scored.total == pytest.approx(-float(nats), rel=1e-6)


def test_the_parts_of_a_score(model: TrainedModel) -> None:
    scored = score(model, "the fox")
    assert scored.tokens == tuple("the fox")
    assert scored.total == math.fsum(scored.log_probabilities)
    assert scored.bits_per_byte == pytest.approx(-scored.total / 7 / math.log(2))
    assert all(value < 0 for value in scored.log_probabilities)


def test_a_likely_text_scores_higher(model: TrainedModel) -> None:
    assert score(model, "the quick").total > score(model, "qqq zzz @").total + 5


@pytest.mark.parametrize("length", [1, 15, 16, 17, 24, 25, 100])
def test_every_token_of_a_long_text_is_scored_from_at_least_half_a_context(
    length: int, model: TrainedModel
) -> None:
    text = ("the quick brown fox jumps over a lazy dog and then some more " * 2)[:length]
    scored = score(model, text)
    assert len(scored.log_probabilities) == length
    assert all(math.isfinite(value) for value in scored.log_probabilities)
    # The last token, predicted by hand from the window that ends with it.
    ids = np.asarray([model.tokenizer.end_of_document, *model.tokenizer.encode(text)], np.int32)
    stride = CONTEXT // 2
    first = max(-(-(length - CONTEXT) // stride) * stride, 0)
    context = ids[first:-1]
    assert length < CONTEXT or len(context) >= stride
    logits = np.asarray(model.logits_function()(model.params, context[None]), np.float64)[0, -1]
    expected = logits[ids[-1]] - np.log(np.sum(np.exp(logits)))
    assert scored.log_probabilities[-1] == pytest.approx(expected, abs=1e-3)


def test_an_empty_text_is_refused(model: TrainedModel) -> None:
    with pytest.raises(ValueError, match="no text"):
        score(model, "")


# --- Evaluate ---


def test_evaluation_gives_the_loss_of_the_result(model: TrainedModel, workdir: Path) -> None:
    evaluation = evaluate(model, progress=False)
    assert evaluation.eval_loss == result(workdir)["eval_loss"]
    assert evaluation.step == 60
    assert evaluation.perplexity == math.exp(evaluation.eval_loss)
    assert 0 < evaluation.bits_per_byte < 8


def test_evaluation_obeys_another_policy(workdir: Path) -> None:
    own = result(workdir)["eval_loss"]
    wide = evaluate(load_model(workdir, precision="f32"), progress=False).eval_loss
    assert wide != own
    assert wide == pytest.approx(own, abs=0.02)
