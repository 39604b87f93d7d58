"""From documents to memory-mapped tokens: built once, checked, then opened in milliseconds.

A cache entry is a directory named by a hash of everything that determines its content: documents,
tokenizer, split and the version of this format. It holds `tokenizer.json`, the ids of each split in
`train.bin` and `validation.bin` (little-endian uint16 where the vocabulary fits, else uint32, an
end-of-document token after each document), and `meta.json`, used to detect damage. May import the
rest of the room except the pipeline.
"""

from __future__ import annotations

import contextlib
import hashlib
import sys
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from lmjax.console import stages
from lmjax.console.progress import progress_over
from lmjax.console.wording import counted
from lmjax.data.config import DataConfig
from lmjax.data.documents import (
    PreparedDataset,
    TextSplits,
    download_and_prepare,
    find_prepared,
    stored_source,
)
from lmjax.data.errors import DataError
from lmjax.data.sources import TextSource, find_source
from lmjax.data.store import json_sha256, seal, sealed_content, storage_explained
from lmjax.data.tokenizer_files import load_tokenizer, read_tokenizer
from lmjax.data.tokenizers import (
    ByteTokenizer,
    Tokenizer,
    gpt2_files,
    load_gpt2,
    train_bpe,
)
from lmjax.files.publishing import discard, published_directory, sole_builder

# Part of every key: increment it when the meaning of a cache entry changes.
FORMAT_VERSION = 1
# Characters tokenised at once, so that even short documents keep all cores busy.
_BATCH_CHARACTERS = 1 << 22

Tokens = npt.NDArray[np.unsignedinteger[Any]]


@dataclass(frozen=True)
class TokenizedCorpus:
    """Both splits of a corpus as token ids."""

    tokenizer: Tokenizer
    train: Tokens
    """uint16 or uint32 [tokens], memory-mapped, read-only."""
    validation: Tokens
    """As `train`."""
    train_documents: int
    validation_documents: int
    validation_bytes: int
    """UTF-8 bytes of the validation text: bits per byte = total nats / ln 2 / validation_bytes."""
    fingerprint: str
    """Hex SHA-256 over tokens and tokenizer: equal fingerprints, equal data, on any machine."""
    held_out: str = ""
    """Which documents are held out, and who chose them; unknown for older caches."""
    directory: Path | None = None
    """Its directory."""
    classes: tuple[str, ...] = ()
    """The labels of its documents, in the order of their numbers; empty where they have none."""
    train_classes: Tokens | None = None
    """uint16 [documents]: the number of each document's class."""
    validation_classes: Tokens | None = None
    """As `train_classes`."""


def tokenized_corpus(config: DataConfig, *, window: int, progress: bool = True) -> TokenizedCorpus:
    """Opens the corpus from the cache, or builds it there first. Never downloads.

    Args:
      config: what to tokenise and how, and the cache folder.
      window: tokens per training window, its length plus one.
      progress: show progress on stderr: a bar on a terminal or in a notebook, else one line.

    Raises:
      DataError: the input is missing or unusable, or a split is shorter than one window, or the
        cache cannot be used. Nothing is left on disk then.
      CacheFailed: the cache could not be written. Nothing is left on disk then either.
    """
    origin = _find_origin(config)
    content = origin.fingerprint()
    directory = config.cache_path / "tokens" / _key(config, content)
    with storage_explained(config.cache_path):
        return _opened_or_built(config, origin, directory, content, window, progress)


def _opened_or_built(
    config: DataConfig,
    origin: TextSource | PreparedDataset,
    directory: Path,
    content: str,
    window: int,
    progress: bool,
) -> TokenizedCorpus:
    # Another process may discard or publish the entry at any moment; a second try settles it.
    for _ in range(3):
        if directory.is_dir():
            corpus = _open(directory)
            if corpus is not None:
                _check_window(corpus.train.size, corpus.validation.size, window)
                return corpus
            print(f"lmjax: the cache {directory} is damaged; rebuilding it", file=sys.stderr)
            discard(directory)
        with sole_builder(directory):
            if directory.is_dir():
                continue
            with (
                _texts(config, origin, content) as texts,
                published_directory(directory) as temporary,
            ):
                _build(config, texts, temporary, window=window, progress=progress)
                if origin.fingerprint() != content:
                    raise DataError(f"the files of {config.dataset} changed while read: run again")
    corpus = _open(directory)
    if corpus is None:
        raise OSError(f"{directory} is damaged as soon as it is written: check the disk")
    return corpus


def prepare(config: DataConfig, *, window: int = 2, progress: bool = True) -> TokenizedCorpus:
    """`tokenized_corpus`, preceded by a TFDS download if a `tfds:` dataset is not prepared yet.

    The only function of lmjax that may use the network for data, and only on request.
    """
    name = config.tfds_name
    if name is not None:
        try:
            find_prepared(config, name)
        except DataError:
            download_and_prepare(name)
    return tokenized_corpus(config, window=window, progress=progress)


# --- Cache keys ---


def _find_origin(config: DataConfig) -> TextSource | PreparedDataset:
    name = config.tfds_name
    return find_source(config) if name is None else find_prepared(config, name)


@contextlib.contextmanager
def _texts(
    config: DataConfig, origin: TextSource | PreparedDataset, content: str
) -> Iterator[TextSplits]:
    if isinstance(origin, PreparedDataset):
        yield origin.splits(config.feature, config.validation_fraction)
        return
    folder = config.cache_path / "tfds" / f"{origin.name}-{content[:32]}"
    with stored_source(origin, folder, config.validation_fraction) as texts:
        yield texts


def _key(config: DataConfig, content: str) -> str:
    """A directory name: the dataset, for readability, and a hash over all inputs."""
    parts = {
        "format_version": FORMAT_VERSION,
        "content": content,
        "feature": config.feature if config.tfds_name else None,
        "tokenizer": _tokenizer_spec(config),
        "validation_fraction": config.validation_fraction,
        **({"labels": config.labels} if config.labels and config.labelled else {}),
    }
    name = config.tfds_name.name if config.tfds_name else config.dataset
    return f"{name}-{config.tokenizer_label}-{json_sha256(parts)[:32]}"


def _tokenizer_spec(config: DataConfig) -> list[Any]:
    if config.tokenizer == "bpe":
        return ["bpe", config.vocab_size]
    if config.tokenizer == "gpt2":
        files = gpt2_files(config.tokenizer_files)
        return ["gpt2", *(hashlib.sha256(path.read_bytes()).hexdigest() for path in files)]
    if config.tokenizer_path:
        return [*read_tokenizer(config.tokenizer, config.end_of_document).identity]
    return [config.tokenizer]


def _make_tokenizer(config: DataConfig, train: Collection[str]) -> Tokenizer:
    if config.tokenizer == "bpe":
        with stages.stage(f"training a bpe tokenizer of {config.vocab_size} tokens"):
            return train_bpe(train, config.vocab_size)
    if config.tokenizer == "gpt2":
        return load_gpt2(config.tokenizer_files)
    if config.tokenizer_path:
        return read_tokenizer(config.tokenizer, config.end_of_document)
    return ByteTokenizer()


# --- Building ---


@dataclass(frozen=True)
class _Written:
    """What was written for one split."""

    tokens: int
    documents: int
    text_bytes: int
    sha256: str


def _build(
    config: DataConfig, texts: TextSplits, directory: Path, *, window: int, progress: bool
) -> None:
    tokenizer = _make_tokenizer(config, texts.train)
    dtype = token_dtype(tokenizer.vocab_size)
    tokenizer.save(directory / "tokenizer.json")
    total = len(texts.train) + len(texts.validation)
    label = f"tokenising {config.dataset} ({config.tokenizer_label}, {counted(total, 'document')})"
    with progress_over(label, total, enabled=progress) as advance:
        train = _write(tokenizer, texts.train, directory / "train.bin", dtype, advance)
        held_out = _write(tokenizer, texts.validation, directory / "validation.bin", dtype, advance)
    _check_window(train.tokens, held_out.tokens, window)
    classes = _write_classes(texts, directory, config.labels)
    content = {
        "dataset": config.dataset,
        "dtype": dtype.str,
        "train_documents": train.documents,
        "validation_documents": held_out.documents,
        "validation_bytes": held_out.text_bytes,
        "held_out": texts.held_out,
        **({"classes": classes} if classes else {}),
    }
    seal(directory, content)
    # Sealing reads the files back: does the disk hold what was written?
    sealed = sealed_content(directory)
    for name, written in (("train.bin", train), ("validation.bin", held_out)):
        if sealed is None or sealed["files"][name]["sha256"] != written.sha256:
            raise OSError(f"{directory / name} does not hold what was written: check the disk")


def token_dtype(vocab_size: int) -> np.dtype[Any]:
    """The narrower of little-endian uint16 and uint32 that holds every id."""
    return np.dtype("<u2" if vocab_size <= 1 << 16 else "<u4")


def _write(
    tokenizer: Tokenizer, texts: Collection[str], path: Path, dtype: np.dtype[Any], advance: Any
) -> _Written:
    """Writes the ids of `texts`, each between its start, if there is one, and its end."""
    tokens = documents = text_bytes = 0
    digest = hashlib.sha256()
    end = np.asarray([tokenizer.end_of_document], dtype=dtype)
    start = np.asarray([tokenizer.start_of_document], dtype=dtype)
    start = start[: int(tokenizer.has_start)]
    with path.open("wb") as file:
        for batch in _batches(texts):
            for ids in tokenizer.encode_batch(batch):
                block = np.concatenate([start, ids.astype(dtype), end])
                file.write(block.tobytes())
                digest.update(block.tobytes())
                tokens += block.size
            documents += len(batch)
            text_bytes += sum(len(text.encode("utf-8")) for text in batch)
            advance(len(batch))
    return _Written(tokens, documents, text_bytes, digest.hexdigest())


def _write_classes(texts: TextSplits, directory: Path, named: Sequence[str]) -> list[str]:
    """Writes the class of each document, if they have one; returns the labels.

    Raises:
      DataError: all documents have the same, or one that is not among those named.
    """
    found = sorted({*texts.labels[0], *texts.labels[1]})
    if named and (other := [label for label in found if label not in named]):
        raise DataError(
            f"a text has the label {other[0]}, but the classes are {', '.join(named)}; name those "
            "of your texts in the same order: --data.labels"
        )
    labels = list(named) if named and found else found
    if len(labels) == 1:
        raise DataError(f"all texts have the label {labels[0]}: two classes are the fewest to tell")
    numbers = {label: number for number, label in enumerate(labels)}
    for name, own in zip(("train", "validation"), texts.labels, strict=True) if labels else ():
        np.asarray([numbers[label] for label in own], "<u2").tofile(
            directory / f"{name}_classes.bin"
        )
    return labels


def _batches(texts: Collection[str]) -> Iterator[list[str]]:
    batch: list[str] = []
    size = 0
    for text in texts:
        batch.append(text)
        size += len(text)
        if size >= _BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _check_window(train: int, validation: int, window: int) -> None:
    if min(train, validation) >= window:
        return
    raise DataError(
        f"the corpus is too short for a window of {window} tokens: it has {train} for training and "
        f"{validation} for validation; add text, or shorten the sequence length to at most "
        f"{max(min(train, validation) - 1, 0)}, or change --data.validation-fraction"
    )


# --- Opening ---


def _open(directory: Path) -> TokenizedCorpus | None:
    """The corpus in `directory`; None if it is damaged or gone."""
    content = sealed_content(directory)
    if content is None:
        return None
    dtype = np.dtype(content["dtype"])
    try:
        tokenizer = load_tokenizer(directory / "tokenizer.json")
        train = np.memmap(directory / "train.bin", dtype=dtype, mode="r")
        validation = np.memmap(directory / "validation.bin", dtype=dtype, mode="r")
        own = [
            np.memmap(directory / f"{name}_classes.bin", dtype="<u2", mode="r")
            for name in (("train", "validation") if content.get("classes") else ())
        ]
    # Another process discarded it after the check.
    except (OSError, DataError):
        return None
    return TokenizedCorpus(
        tokenizer=tokenizer,
        train=train,
        validation=validation,
        train_documents=content["train_documents"],
        validation_documents=content["validation_documents"],
        validation_bytes=content["validation_bytes"],
        fingerprint=json_sha256({k: v["sha256"] for k, v in content["files"].items()}),
        held_out=content.get("held_out", ""),
        directory=directory,
        classes=tuple(content.get("classes", ())),
        train_classes=own[0] if own else None,
        validation_classes=own[1] if own else None,
    )
