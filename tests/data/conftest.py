"""A cache and a TFDS folder of each test's own, and corpora small enough to prepare in a moment."""

from __future__ import annotations

import socket
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest

from lmjax.data import DataConfig, TokenizedCorpus
from lmjax.data.tokenizers import ByteTokenizer


@pytest.fixture(autouse=True)
def _own_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LMJAX_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "tensorflow_datasets"))


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Collects, and refuses, every attempt to reach another machine."""
    attempts: list[str] = []

    def refuse(*args: object, **kwargs: object) -> None:
        attempts.append(repr(args))
        raise OSError("a test without network tried to use it")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    return attempts


@pytest.fixture
def text_files(tmp_path: Path) -> Callable[..., DataConfig]:
    """Writes texts as files, one document each, and returns the config that reads them."""

    def write(texts: Sequence[str], **fields: object) -> DataConfig:
        folder = tmp_path / "texts"
        folder.mkdir(exist_ok=True)
        for number, text in enumerate(texts):
            (folder / f"{number:03d}.txt").write_text(text, encoding="utf-8", newline="")
        return DataConfig(dataset="text_files", files=(str(folder / "*.txt"),), **fields)

    return write


@pytest.fixture
def corpus() -> Callable[..., TokenizedCorpus]:
    """A corpus in memory whose token at position i is i, so that a token tells its position."""

    def make(train: int, validation: int = 10) -> TokenizedCorpus:
        return TokenizedCorpus(
            tokenizer=ByteTokenizer(),
            train=np.arange(train, dtype=np.uint16),
            validation=np.arange(validation, dtype=np.uint16),
            train_documents=1,
            validation_documents=1,
            validation_bytes=validation,
            fingerprint="",
        )

    return make
