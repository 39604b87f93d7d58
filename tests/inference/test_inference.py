"""Using a run: generate, score and evaluate agree with training and with each other."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from run_helpers import result, tiny

from lmjax.inference import TrainedModel, evaluate, generate, load_model, score
from lmjax.inference import generate as generate_function
from lmjax.train import InputError, make_eval_step, train
from lmjax.train.checkpoint import CheckpointError

CONTEXT = 16


@pytest.fixture(scope="module")
def workdir(home: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run in bf16: a forward pass in any other format gives other numbers."""
    folder = tmp_path_factory.mktemp("inference") / "run"
    train(tiny(home, "mixed_bf16", steps=60), folder, progress=False)
    return folder


@pytest.fixture(scope="module")
def model(workdir: Path) -> TrainedModel:
    return load_model(workdir)


class Scripted:
    """Logits of a model that says x three times and ends the document, whatever it reads."""

    def __init__(self, end: int):
        self.windows: list[list[int]] = []
        self._end = end

    def logits(self, params: Any, tokens: np.ndarray) -> jax.Array:
        """f32[1, T, 256], and a note of what was read."""
        self.windows.append(tokens[0].tolist())
        said = self._end if len(self.windows) > 3 else ord("x")
        return jnp.where(jnp.arange(256) == said, 0.0, -jnp.inf) + jnp.zeros((*tokens.shape, 1))


@pytest.fixture
def scripted(model: TrainedModel, monkeypatch: pytest.MonkeyPatch) -> Scripted:
    """Puts a script in the place of the parameters."""
    script = Scripted(model.tokenizer.end_of_document)
    monkeypatch.setattr(TrainedModel, "logits_function", lambda _: script.logits)
    return script


# --- The model ---


def test_the_newest_parameters_in_their_stored_formats(model: TrainedModel, workdir: Path) -> None:
    from lmjax.train.run_directory import parameters_sha256

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
    with pytest.raises(InputError, match="no run directory"):
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


# --- Generate ---


def test_the_seed_decides_the_text(model: TrainedModel) -> None:
    texts = [generate(model, "the", tokens=12, temperature=2.0, seed=seed) for seed in (0, 0, 1)]
    assert texts[0] == texts[1] != texts[2]


def test_temperature_0_takes_the_likeliest_token_at_every_step(model: TrainedModel) -> None:
    """Against a loop by hand, past the context, where the oldest tokens fall out of the window."""
    logits_of = model.logits_function()
    prompt = "the quick brown "
    ids = [model.tokenizer.end_of_document, *map(int, model.tokenizer.encode(prompt))]
    assert len(ids) > CONTEXT
    expected = []
    for _ in range(6):
        window = np.asarray([ids[-CONTEXT:]], np.int32)
        ids.append(int(np.argmax(np.asarray(logits_of(model.params, window))[0, -1])))
        expected.append(ids[-1])
    text = generate(model, prompt, tokens=6, temperature=0.0)
    assert text == model.tokenizer.decode(expected)
    assert text == generate(model, prompt, tokens=6, temperature=1.0, top_k=1, seed=3)


def test_a_prompt_longer_than_the_context_is_read_from_its_last_tokens(
    scripted: Scripted, model: TrainedModel
) -> None:
    prompt = "the quick brown fox"
    generate(model, prompt, tokens=2)
    assert [bytes(window).decode() for window in scripted.windows] == [
        prompt[-CONTEXT:],
        prompt[-CONTEXT + 1 :] + "x",
    ]


def test_a_short_prompt_is_not_changed_by_padding(model: TrainedModel) -> None:
    ids = [model.tokenizer.end_of_document, *map(int, model.tokenizer.encode("the qu"))]
    alone = model.logits_function()(model.params, np.asarray([ids], np.int32))[0, -1]
    likeliest = model.tokenizer.decode([int(np.argmax(np.asarray(alone)))])
    assert generate(model, "the qu", tokens=1, temperature=0.0) == likeliest


def test_stops_where_the_document_ends(scripted: Scripted, model: TrainedModel) -> None:
    assert generate(model, "", tokens=50) == "xxx"
    assert len(scripted.windows) == 4


def test_no_more_tokens_than_asked_for(model: TrainedModel) -> None:
    assert generate(model, "the", tokens=0) == ""
    assert len(generate(model, "the", tokens=5, temperature=0.0)) <= 5


@pytest.mark.parametrize("name", ["tokens", "temperature", "top_k", "seed"])
def test_negative_numbers_are_refused(name: str, model: TrainedModel) -> None:
    with pytest.raises(ValueError, match="must not be negative"):
        generate_function(model, "the", **{name: -1})


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
