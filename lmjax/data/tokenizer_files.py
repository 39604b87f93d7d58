"""Tokenizers as people have them: any `tokenizer.json`, alone or in a folder beside its settings.

The folder of a model on Hugging Face, of one of our runs, or one with GPT-2's two files. May import
the room's errors, store and tokenizers.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer as Backend
from tokenizers import models, pre_tokenizers

from lmjax import strict_json
from lmjax.data.errors import DataError
from lmjax.data.store import json_sha256
from lmjax.data.tokenizers import (
    BPETokenizer,
    ByteTokenizer,
    Ids,
    Tokenizer,
    byte_level,
    one_line,
    unspelled,
)
from lmjax.files.filenames import expanded, plain

FILE = "tokenizer.json"
PAIRS = (("vocab.json", "merges.txt"), ("encoder.json", "vocab.bpe"))
"""GPT-2's vocabulary and merges, by the names that they go by."""
ENDS = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "[EOS]", "[SEP]")
"""Ends of a document where no setting names one."""

_BYTE_FALLBACK = re.compile(r"<0x([0-9A-F]{2})>")
_SPACE = "\u2581"
_TOGETHER = 64


class FileTokenizer(Tokenizer):
    """The tokenizer of a `tokenizer.json`, with whatever model it has.

    Texts are encoded without the tokens that its post-processor adds: documents are put between
    `start_of_document` and `end_of_document` instead.
    """

    name = "file"
    _cut = re.compile(r"(?<=\S)(?= )")  # where patterns like those of Llama 3 and Qwen cut, too

    def __init__(self, content: Mapping[str, Any]):
        """Of what `_content` returns: the file, and the name of the end of a document.

        Raises:
          DataError: the file is damaged, or has no such token.
        """
        self._backend = _backend(content["tokenizer"])
        self._saved = {name: content[name] for name in ("tokenizer", "end_of_document")}
        vocabulary = self._backend.get_vocab(with_added_tokens=True)
        self.vocab_size = max(vocabulary.values(), default=-1) + 1
        if (end := vocabulary.get(content["end_of_document"])) is None:
            raise DataError(
                f"the tokenizer has no token {content['end_of_document']!r} to end documents with; "
                f"name one with --data.end-of-document{_listed(content['tokenizer'])}"
            )
        self.end_of_document = end
        self.start_of_document = self._prefix() or end

    def _prefix(self) -> int | None:
        """The token that the post-processor puts before a text, if it is one."""
        for probe in ("a", "0", "the"):
            bare = self._backend.encode(probe, add_special_tokens=False).ids
            ids = self._backend.encode(probe, add_special_tokens=True).ids
            for start in range(len(ids) - len(bare) + 1) if bare else ():
                if ids[start : start + len(bare)] == bare:
                    return ids[0] if start == 1 else None
        return None

    def _chunks(self, text: str) -> list[str]:
        """Whole texts, unless pieces are known to begin where there is a space."""
        pieces = strict_json.dumps(self._saved["tokenizer"].get("pre_tokenizer"))
        by_word = '"Split"' in pieces or '"use_regex": true' in pieces
        known = self._spelling == "bytes" and by_word and '"add_prefix_space": true' not in pieces
        return super()._chunks(text) if known else [text] if text else []

    @cached_property
    def _encoder(self) -> Backend:
        """The backend, with special tokens called what no text holds.

        Models that look up whole pieces would find `</s>` in their vocabulary; merges of a BPE
        never make it.
        """
        file = self._saved["tokenizer"]
        model, added = file["model"], file.get("added_tokens", ())
        special = {token["content"] for token in added if token.get("special")}
        if "merges" in model and not model.get("ignore_merges"):
            return self._backend
        name = lambda word: f"\uffff{word}" if word in special else word
        listed = model["vocab"]
        own: dict[str, Any] = {
            "vocab": {name(word): number for word, number in listed.items()}
            if isinstance(listed, Mapping)
            else [[name(word), score] for word, score in listed]
        }
        own |= {"unk_token": name(model["unk_token"])} if model.get("unk_token") else {}
        hidden = [token | {"content": name(token["content"])} for token in added]
        return _backend(
            file | {"model": model | own, "added_tokens": hidden, "post_processor": None}
        )

    @cached_property
    def _spelling(self) -> str:
        """How tokens spell text: as bytes, with a sign for spaces, or as words."""
        parts = strict_json.dumps([self._saved["tokenizer"].get("decoder")])
        for kind, name in (("bytes", "ByteLevel"), ("words", "WordPiece")):
            if f'"{name}"' in parts:
                return kind
        signed = f'"{_SPACE}"' in strict_json.dumps(parts, ensure_ascii=False)
        return "sign" if signed or "Metaspace" in parts or "ByteFallback" in parts else "words"

    def _encode(self, chunks: Sequence[str]) -> Iterator[Ids]:
        waiting = iter(chunks)
        while group := list(islice(waiting, _TOGETHER)):
            for encoding in self._encoder.encode_batch_fast(group, add_special_tokens=False):
                yield np.asarray(encoding.ids, dtype=np.int32)

    def decode(self, ids: Sequence[int] | npt.NDArray[np.integer[Any]]) -> str:
        """See `Tokenizer`; the space before the first word, if words carry it, is not text."""
        text = super().decode(ids)
        return text if self._spelling == "bytes" else text.removeprefix(" ")

    def _bytes(self, ids: npt.NDArray[np.int64]) -> bytes:
        return b"".join(self._bytes_by_id.get(token, b"\xef\xbf\xbd") for token in ids.tolist())

    @cached_property
    def _bytes_by_id(self) -> dict[int, bytes]:
        vocabulary = self._backend.get_vocab(with_added_tokens=True)
        added = self._backend.get_added_tokens_decoder()
        return {
            token: text.encode()
            if token in added and not _BYTE_FALLBACK.fullmatch(text)
            else self._spelled(text)
            for text, token in vocabulary.items()
        }

    def _spelled(self, token: str) -> bytes:
        if self._spelling == "bytes":
            return unspelled(token)
        if self._spelling == "words":
            return (token[2:] if token.startswith("##") else f" {token}").encode()
        if match := _BYTE_FALLBACK.fullmatch(token):
            return bytes.fromhex(match[1])
        return token.replace(_SPACE, " ").encode()

    def _content(self) -> Any:
        return self._saved

    def _exported(self) -> Any:
        return self._saved["tokenizer"]


def _backend(file: Mapping[str, Any]) -> Backend:
    """The library's tokenizer of a file.

    Raises:
      DataError: the file is damaged.
    """
    try:
        backend = Backend.from_str(strict_json.dumps(file))
    except Exception as error:  # the library raises bare Exceptions
        raise DataError(f"the tokenizer cannot be read: {one_line(error)}") from error
    # A document that contains a marker as text must not end there.
    backend.encode_special_tokens = True
    backend.no_truncation()
    backend.no_padding()
    return backend


def load_tokenizer(path: Path) -> Tokenizer:
    """Reads a file written by `Tokenizer.save`.

    Raises:
      DataError: the file is missing or differs from what was written.
    """
    try:
        document = strict_json.loads(Path(path).read_text(encoding="utf-8"))
        content = {"name": document["name"], "tokenizer": document["tokenizer"]}
        intact = document["sha256"] == json_sha256(content)
    except OSError as error:
        raise DataError(f"cannot read the tokenizer {path}: {error.strerror}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise _damaged(path) from error
    if not intact:
        raise _damaged(path)
    if content["name"] == ByteTokenizer.name:
        return ByteTokenizer()
    if content["name"] == FileTokenizer.name:
        return FileTokenizer(content["tokenizer"])
    return BPETokenizer(content["name"], Backend.from_str(strict_json.dumps(content["tokenizer"])))


def _damaged(path: Path) -> DataError:
    return DataError(f"the tokenizer file {path} is damaged: restore it, or prepare its data again")


def read_tokenizer(name: str, end_of_document: str = "") -> Tokenizer:
    """The tokenizer of a file or folder.

    Args:
      name: a `tokenizer.json`, of ours or any other, or a folder that holds one.
      end_of_document: the token that follows each document; empty: what settings beside the file
        name, or else one that is usual.

    Raises:
      DataError: there is none, it is damaged, or no token ends a document.
    """
    path = expanded(name)
    if path.is_dir():
        if not holds_tokenizer(path):
            names = " nor ".join(" and ".join(names) for names in PAIRS)
            raise DataError(f"{path} holds no tokenizer: neither {FILE} nor {names}")
        path = path / FILE if (path / FILE).exists() else path
    try:
        file = _from_pair(path) if path.is_dir() else strict_json.read_object(path)
    except OSError as error:
        raise DataError(f"cannot read the tokenizer {path}: {error.strerror}") from error
    except ValueError as error:
        raise DataError(f"the tokenizer {path} is damaged: {error}") from error
    if file.keys() == {"sha256", "name", "tokenizer"}:
        return load_tokenizer(path)
    folder = path if path.is_dir() else path.parent
    end = end_of_document or _named_end(folder, file) or _usual_end(path, file)
    try:
        return FileTokenizer({"tokenizer": file, "end_of_document": end})
    except DataError as error:
        raise DataError(f"{path}: {error}") from error


def holds_tokenizer(folder: Path) -> bool:
    """Whether a folder holds a tokenizer that `read_tokenizer` looks at."""
    return (folder / FILE).exists() or _pair(folder) is not None


def _pair(folder: Path) -> tuple[Path, Path] | None:
    """GPT-2's files in a folder."""
    for vocabulary, merges in PAIRS:
        if (folder / vocabulary).exists() and (folder / merges).exists():
            return folder / vocabulary, folder / merges
    return None


def _from_pair(folder: Path) -> Any:
    """The `tokenizer.json` of GPT-2's two files."""
    pair = _pair(folder)
    assert pair is not None
    try:
        model = models.BPE.from_file(*(f"{plain(folder)}/{path.name}" for path in pair))
        backend = byte_level(model, pre_tokenizers.ByteLevel(add_prefix_space=False))
    except Exception as error:  # the library raises bare Exceptions
        raise ValueError(one_line(error)) from error
    return strict_json.loads(backend.to_str())


def _named_end(folder: Path, file: Mapping[str, Any]) -> str:
    """The end of a document that the settings beside a tokenizer name."""
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        token = _setting(folder / name, "eos_token")
        token = token.get("content") if isinstance(token, Mapping) else token
        if isinstance(token, str) and token:
            return token
    number = _setting(folder / "config.json", "eos_token_id")
    number = number[0] if isinstance(number, list) and number else number
    names = {token["id"]: token["content"] for token in file.get("added_tokens", ())}
    vocabulary = file.get("model", {}).get("vocab", {})
    words = vocabulary.items() if isinstance(vocabulary, Mapping) else ()
    return names.get(number) or next((word for word, index in words if index == number), "")


def _setting(path: Path, name: str) -> Any:
    with contextlib.suppress(OSError, ValueError, AttributeError):
        return strict_json.read(path).get(name)
    return None


def _usual_end(path: Path, file: Mapping[str, Any]) -> str:
    known = {token["content"] for token in file.get("added_tokens", ())}
    vocabulary = file.get("model", {}).get("vocab", {})
    known |= set(vocabulary) if isinstance(vocabulary, Mapping) else {t for t, _ in vocabulary}
    for end in ENDS:
        if end in known:
            return end
    raise DataError(
        f"{path} does not say which token ends a document; name it with --data.end-of-document"
        f"{_listed(file)}"
    )


def _listed(file: Mapping[str, Any]) -> str:
    special = [token["content"] for token in file.get("added_tokens", ()) if token.get("special")]
    more = f" and {len(special) - 8} more" if len(special) > 8 else ""
    return f"; its special tokens are {', '.join(special[:8])}{more}" if special else ""
