"""Which text is held out: said, and chosen by whoever wants to."""

from __future__ import annotations

import json
import threading
import urllib.error

import pytest
from test_names import verb

from lmjax.cli import common as cli
from lmjax.data import DataConfig, DataError, network, prepare, tokenized_corpus
from lmjax.data.network import refuse_unreachable

TEXTS = [f"Document {number} is about the number {number}. " * 8 for number in range(6)]


def named(text_files, tmp_path, *held_out, **fields):
    return text_files(
        TEXTS, validation_files=tuple(str(tmp_path / "held" / name) for name in held_out), **fields
    )


@pytest.fixture
def held(tmp_path):
    """Two files outside the folder of the training text."""
    (tmp_path / "held").mkdir()
    for name in ("a[v2].txt", "b.txt"):
        (tmp_path / "held" / name).write_text(f"Held out in {name}. " * 8)
    return tmp_path / "held"


@pytest.mark.parametrize("tokenizer", ["bytes", "bpe"])
def test_the_held_out_text_is_what_was_named(text_files, tmp_path, held, tokenizer):
    config = named(text_files, tmp_path, "a[v2].txt", "b*", tokenizer=tokenizer, vocab_size=300)
    corpus = tokenized_corpus(config, window=9)
    assert corpus.tokenizer.decode(corpus.train) == "".join(TEXTS)
    expected = "".join((held / name).read_text() for name in ("a[v2].txt", "b.txt"))
    assert corpus.tokenizer.decode(corpus.validation) == expected
    assert (corpus.train_documents, corpus.validation_documents) == (6, 2)
    assert corpus.validation_bytes == len(expected)
    assert corpus.held_out == ("2 of 8 documents, the validation files: held/a[v2].txt, held/b.txt")
    assert tokenized_corpus(config, window=9).held_out == corpus.held_out, "from the cache"


def test_a_single_training_file_is_whole(text_files, tmp_path, held):
    config = text_files(TEXTS[:1], validation_files=(str(held / "b.txt"),))
    assert tokenized_corpus(config, window=9).train.size == len(TEXTS[0]) + 1


def test_which_side_a_file_is_on_is_part_of_the_key(text_files, tmp_path, held):
    one = named(text_files, tmp_path, "b.txt")
    other = DataConfig(dataset="text_files", files=one.validation_files, validation_files=one.files)
    assert tokenized_corpus(one, window=9).train.size > tokenized_corpus(other, window=9).train.size


def test_text_is_not_trained_on_and_held_out(text_files, tmp_path):
    first = str(tmp_path / "texts" / "000.txt")
    config = text_files(TEXTS, validation_files=(first,))
    with pytest.raises(DataError, match=r"000\.txt is named by --data.files and by --data.valid"):
        tokenized_corpus(config, window=9)


def test_what_names_nothing_is_refused(text_files, tmp_path):
    with pytest.raises(DataError, match=r"--data.validation-files '.*none' matches no file"):
        tokenized_corpus(named(text_files, tmp_path, "none"), window=9)
    with pytest.raises(DataError, match=r"read only by --data\.dataset text_files"):
        DataConfig(validation_files=("a.txt",))


def test_documents_that_were_chosen_are_named(text_files):
    alone = tokenized_corpus(text_files(TEXTS[:1], validation_fraction=0.2), window=9)
    assert alone.held_out == "the last 20% of the only document"
    corpus = tokenized_corpus(text_files(TEXTS), window=9)
    assert corpus.held_out.startswith("1 of 6 documents, 16.7% of the text, chosen by a hash of ")
    assert corpus.held_out.endswith(".txt")


def test_prepare_says_what_it_made_and_where(text_files, tmp_path, held, capsys):
    text_files(TEXTS)
    flags = ("--data.dataset", "text_files", "--data.files", tmp_path / "texts" / "*.txt")
    held_out = ("--data.validation-files", held / "b.txt")
    assert verb("prepare", *flags, *held_out) == cli.DONE
    said = capsys.readouterr().out
    assert "training  6 files, " in said
    assert "held out  1 files, " in said
    assert "the validation files: held/b.txt" in said
    (folder,) = (tmp_path / "cache" / "tokens").iterdir()
    assert f"{folder}, 0.0" in said
    assert verb("prepare", *flags, *held_out, "--json") == cli.DONE
    made = json.loads(capsys.readouterr().out)
    assert made["directory"] == str(folder)
    assert made["bytes"] == sum(path.stat().st_size for path in folder.iterdir())
    assert (made["train_documents"], made["validation_documents"]) == (6, 1)


# --- Without a network ---


def test_a_dataset_to_download_fails_at_once_without_a_network(no_network, tmp_path):
    with pytest.raises(DataError, match=r"tfds:lm1b is downloaded from www.statmt.org, which can"):
        prepare(DataConfig(dataset="tfds:lm1b"))
    assert not (tmp_path / "tensorflow_datasets").exists()


def test_a_host_that_says_nothing_is_waited_for_seconds_only(monkeypatch):
    ended = threading.Event()
    monkeypatch.setattr(network, "SECONDS", 0.05)
    monkeypatch.setattr("urllib.request.urlopen", lambda *_, **__: ended.wait(60))
    with pytest.raises(DataError, match="no answer in"):
        refuse_unreachable("x", ["http://a.example/1", "http://a.example/2", "http://b.example/1"])
    ended.set()


def test_one_host_that_answers_is_enough_even_by_a_refusal(monkeypatch):
    def answer(request, **_):
        if "there" in request.full_url:
            raise urllib.error.HTTPError(request.full_url, 405, "Not Allowed", {}, None)
        raise urllib.error.URLError("Name or service not known")

    monkeypatch.setattr("urllib.request.urlopen", answer)
    refuse_unreachable("x", ["http://gone.example/1", "http://there.example/1"])
    refuse_unreachable("x", [])
    with pytest.raises(DataError, match=r"gone\.example, .*\(Name or service not known\)"):
        refuse_unreachable("x", ["http://gone.example/1"])
