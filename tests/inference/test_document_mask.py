"""A run with a document mask: what it learned of a document is what `score` and `generate` read."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
from run_helpers import result, tiny

from lmjax.data import document_starts, tokenized_corpus
from lmjax.inference import TrainedModel, evaluate, load_model, score
from lmjax.inference.reading import Reader
from lmjax.model import log_probabilities
from lmjax.train import InputError, train

CONTEXT = 16
WORDS = ("fox", "dog", "quick", "lazy", "over")


@pytest.fixture(scope="module")
def short_texts(home: Path) -> dict:
    """Flags of a corpus of documents that are shorter than a window."""
    folder = home / "short"
    folder.mkdir()
    draw = random.Random(0)
    for number in range(400):
        (folder / f"{number:03d}.txt").write_text(draw.choice(WORDS), encoding="utf-8")
    return {"dataset": "text_files", "files": (f"{folder}/*.txt",)}


@pytest.fixture(scope="module")
def workdir(home: Path, short_texts: dict, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("documents") / "run"
    config = tiny(home, "f32", steps=30, data=short_texts | {"document_mask": True})
    train(config, folder, progress=False)
    return folder


@pytest.fixture(scope="module")
def model(workdir: Path) -> TrainedModel:
    return load_model(workdir)


@pytest.fixture(scope="module")
def windows(model: TrainedModel) -> np.ndarray:
    """Windows of held-out text, `int32[N, CONTEXT + 1]`."""
    corpus = tokenized_corpus(model.config.data, window=CONTEXT + 1, progress=False)
    count = (len(corpus.validation) - 1) // CONTEXT
    starts = np.arange(count)[:, None] * CONTEXT
    return np.asarray(corpus.validation)[starts + np.arange(CONTEXT + 1)].astype(np.int32)


def test_a_text_scores_as_it_does_in_the_middle_of_a_window(
    model: TrainedModel, windows: np.ndarray
) -> None:
    inputs, targets = windows[:, :-1], windows[:, 1:]
    end = model.tokenizer.end_of_document
    starts = document_starts(inputs, end)
    logits = model.logits_function()(model.params, inputs, starts)
    found = np.asarray(log_probabilities(logits, targets, model.sites["loss"]), np.float64)
    compared = 0
    for row in range(len(windows)):
        first, last = np.flatnonzero(inputs[row] == end)[:2]
        text = model.tokenizer.decode(inputs[row, first + 1 : last])
        alone = score(model, text).log_probabilities
        np.testing.assert_allclose(found[row, first : last - 1], alone, rtol=1e-5, atol=1e-6)
        compared += first > 0
    assert compared > 1, "some stand behind another document"


def test_evaluation_reads_documents_apart(
    model: TrainedModel, windows: np.ndarray, workdir: Path
) -> None:
    inputs, targets = windows[:, :-1], windows[:, 1:]
    starts = document_starts(inputs, model.tokenizer.end_of_document)
    site = model.sites["loss"]

    def loss(starts: np.ndarray | None) -> float:
        logits = model.logits_function()(model.params, inputs, starts)
        return -float(np.mean(log_probabilities(logits, targets, site)))

    found = evaluate(model, progress=False)
    assert found.eval_loss == result(workdir)["eval_loss"]
    # All but the last window, which is not whole.
    assert found.eval_loss == pytest.approx(loss(starts), rel=0.02)
    assert loss(None) > found.eval_loss + 0.1, "without the mask the model reads what it never saw"


def test_a_prompt_of_several_documents_is_read_with_the_mask(
    model: TrainedModel, windows: np.ndarray
) -> None:
    tokens = windows[:1, :CONTEXT]
    starts = document_starts(tokens, model.tokenizer.end_of_document)
    expected = model.logits_function()(model.params, tokens, starts)[0]
    ids = tokens[0].tolist()
    reader = Reader(model, 12)
    for length in range(12, CONTEXT + 1):
        np.testing.assert_allclose(
            reader.logits(ids[:length]), expected[length - 1], rtol=1e-4, atol=1e-5
        )


def test_a_run_without_the_mask_is_another_run(
    home: Path, short_texts: dict, workdir: Path
) -> None:
    with pytest.raises(InputError, match=r"data\.document_mask"):
        train(tiny(home, "f32", steps=30, data=short_texts), workdir, progress=False)
