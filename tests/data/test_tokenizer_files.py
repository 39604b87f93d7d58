"""Any tokenizer.json: spelled as bytes, with a sign for spaces, or as words."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import (
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

from lmjax.data import DataConfig, DataError, load_tokenizer, read_tokenizer, tokenized_corpus
from lmjax.data.tokenizer_files import FileTokenizer
from lmjax.data.tokenizers import ByteTokenizer, train_bpe

CORPUS = ["the quick brown fox jumps over the lazy dog. hello, world! "] * 10
TEXT = "hello, the quick </s> fox <|end|> jumps\n\n over"


def like_gpt2() -> Tokenizer:
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<|end|>"], initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(CORPUS, trainer)
    return backend


def like_llama() -> Tokenizer:
    """A sign for spaces, bytes for what it does not know, and `<s>` before each text."""
    spelled = {f"<0x{byte:02X}>": 3 + byte for byte in range(256)}
    words = ["\u2581", *"helothquickfx,", "he", "\u2581the"]
    names = ["<unk>", "<s>", "</s>", *spelled, *dict.fromkeys(words)]
    vocabulary = {name: index for index, name in enumerate(names)}
    model = models.BPE(vocabulary, [("h", "e")], unk_token="<unk>", byte_fallback=True)
    backend = Tokenizer(model)
    backend.add_special_tokens(["<unk>", "<s>", "</s>"])
    backend.normalizer = normalizers.Sequence(
        [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
    )
    space = decoders.Replace("\u2581", " ")
    backend.decoder = decoders.Sequence(
        [space, decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", 1)]
    )
    return backend


def like_bert() -> Tokenizer:
    words = ["[UNK]", "[CLS]", "[SEP]", "hello", "qu", "##ick", "fox"]
    backend = Tokenizer(models.WordPiece({w: i for i, w in enumerate(words)}, unk_token="[UNK]"))
    backend.add_special_tokens(words[:3])
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.decoder = decoders.WordPiece()
    backend.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
    )
    return backend


def like_t5() -> Tokenizer:
    """Pieces with scores; those of special tokens, 0, are the best of all."""
    signs = sorted({"\u2581", *TEXT.replace(" ", "\u2581")})
    special = ["<pad>", "</s>", "<unk>"]
    scored = [(piece, 0.0) for piece in special] + [(sign, -2.0) for sign in signs]
    backend = Tokenizer(models.Unigram([*scored, ("\u2581the", -3.0)], 2, False))
    backend.add_special_tokens([*special, "<extra_id_0>"])
    backend.add_tokens(["fox"])
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    return backend


def saved(folder: Path, backend: Tokenizer, settings: Any = None) -> str:
    folder.mkdir()
    backend.save(str(folder / "tokenizer.json"))
    if settings is not None:
        (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return str(folder)


KINDS: dict[str, tuple[Callable[[], Tokenizer], str]] = {
    "gpt2": (like_gpt2, "<|end|>"), "llama": (like_llama, "</s>"), "t5": (like_t5, "</s>"),
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_every_text_survives_and_markers_in_it_are_text(tmp_path: Path, kind: str):
    make, end = KINDS[kind]
    tokenizer = read_tokenizer(saved(tmp_path / "a", make()), end)
    ids = tokenizer.encode(TEXT)
    assert tokenizer.decode(ids) == TEXT
    assert tokenizer.bytes_of(ids).decode().removeprefix(" ") == TEXT
    assert not {tokenizer.start_of_document, tokenizer.end_of_document} & {*ids.tolist()}
    assert max(ids) < tokenizer.vocab_size
    assert tokenizer.decode([tokenizer.vocab_size]) == "\ufffd"
    tokenizer.save(tmp_path / "saved.json")
    again = load_tokenizer(tmp_path / "saved.json")
    assert again.identity == tokenizer.identity
    assert again.encode(TEXT).tolist() == ids.tolist()


def test_documents_stand_between_the_tokens_that_the_file_puts_there(tmp_path: Path):
    gpt2 = read_tokenizer(saved(tmp_path / "g", like_gpt2()), "<|end|>")
    assert (gpt2.start_of_document, gpt2.has_start) == (gpt2.end_of_document, False)
    llama = read_tokenizer(saved(tmp_path / "l", like_llama(), {"eos_token": "</s>"}))
    assert (llama.start_of_document, llama.end_of_document, llama.has_start) == (1, 2, True)
    bert = read_tokenizer(saved(tmp_path / "b", like_bert()))
    assert (bert.start_of_document, bert.end_of_document) == (1, 2)
    assert bert.decode(bert.encode("hello quick")) == "hello quick"

    for name in ("first", "second"):
        (tmp_path / f"{name}.txt").write_text(TEXT + name)
    files = (str(tmp_path / "*.txt"),)
    data = DataConfig(
        dataset="text_files", files=files, tokenizer=str(tmp_path / "l"), validation_fraction=0.5,
        cache_dir=str(tmp_path / "cache"),
    )  # fmt: skip
    corpus = tokenized_corpus(data, window=4, progress=False)
    assert corpus.tokenizer.identity == llama.identity
    for split in (corpus.train, corpus.validation):
        assert (split[0], split[-1], np.count_nonzero(split == 2)) == (1, 2, 1)


def test_long_texts_are_encoded_as_in_one_piece(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    text = "".join(CORPUS) + "   two\n\n  lines of the fox!\n"
    for kind, (make, end) in KINDS.items():
        tokenizer = read_tokenizer(saved(tmp_path / kind, make()), end)
        whole = tokenizer.encode(text).tolist()
        monkeypatch.setattr("lmjax.data.tokenizers._CHUNK", 7)
        assert tokenizer.encode(text).tolist() == whole
        monkeypatch.undo()


def test_the_end_of_a_document_is_named_beside_the_file(tmp_path: Path):
    for number, token in enumerate(("<|end|>", {"content": "<|end|>"})):
        name = saved(tmp_path / str(number), like_gpt2(), {"eos_token": token})
        assert read_tokenizer(f"{name}/tokenizer.json").end_of_document == 0
    name = saved(tmp_path / "id", like_gpt2())
    (tmp_path / "id" / "config.json").write_text('{"eos_token_id": [0, 5]}')
    assert read_tokenizer(name).end_of_document == 0


def test_the_tokenizer_of_a_run_is_its_own(tmp_path: Path):
    bpe = train_bpe(CORPUS, 300)
    bpe.save(tmp_path / "tokenizer.json")
    assert read_tokenizer(str(tmp_path)).identity == bpe.identity
    exported = bpe.exported(64)
    (tmp_path / "out").mkdir()
    for file, text in exported.items():
        (tmp_path / "out" / file).write_text(text)
    again = read_tokenizer(str(tmp_path / "out"))
    (tmp_path / "bytes").mkdir()
    (tmp_path / "bytes" / "tokenizer.json").write_text(
        ByteTokenizer().exported(8)["tokenizer.json"]
    )
    (tmp_path / "bytes" / "config.json").write_text('{"eos_token_id": 255}')
    plain = read_tokenizer(str(tmp_path / "bytes"))
    assert plain.encode(TEXT).tolist() == list(TEXT.encode())
    assert (plain.end_of_document, plain.vocab_size) == (255, 256)
    assert isinstance(again, FileTokenizer)
    assert again.encode(TEXT).tolist() == bpe.encode(TEXT).tolist()
    assert again.end_of_document == bpe.end_of_document


@pytest.mark.parametrize(
    ("content", "end", "message"),
    [
        (None, "", "holds no tokenizer: neither tokenizer.json nor vocab.json and merges.txt"),
        ("{", "", "is damaged"),
        ("[]", "", "is damaged: it holds no object"),
        ('{"model": {}}', "</s>", "cannot be read"),
        ("", "", "does not say which token ends a document; .* its special tokens are <|end|>"),
        ("", "<eot>", "has no token '<eot>' to end documents with"),
    ],
)
def test_other_files_are_refused(tmp_path: Path, content: Any, end: str, message: str):
    if content == "":
        saved(tmp_path / "a", like_gpt2())
    else:
        (tmp_path / "a").mkdir()
    if content:
        (tmp_path / "a" / "tokenizer.json").write_text(content)
    with pytest.raises(DataError, match=message.replace("|", r"\|")):
        read_tokenizer(str(tmp_path / "a"), end)
    with pytest.raises(DataError, match="unknown tokenizer 'words'"):
        DataConfig(tokenizer="words")
    with pytest.raises(DataError, match="the tokenizer bpe has its own"):
        DataConfig(tokenizer="bpe", end_of_document="</s>")
