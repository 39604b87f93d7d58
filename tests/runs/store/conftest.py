"""A store in memory, machines with caches of their own, and impatient leases."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from store_helpers import Machine

from lmjax.runs.store import lease as leases


@pytest.fixture(autouse=True)
def objects() -> Iterator[dict[str, Any]]:
    """What the store in memory holds, by path; empty at first."""
    from fsspec.implementations.memory import MemoryFileSystem

    MemoryFileSystem.store.clear()
    yield MemoryFileSystem.store
    MemoryFileSystem.store.clear()


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lmjax.train.records.draw_curves", lambda *_: None)
    monkeypatch.setattr(leases, "BEAT_SECONDS", 0.02)
    monkeypatch.setattr(leases, "SILENCE_SECONDS", 4.0)
    monkeypatch.setattr(leases, "LOOK_SECONDS", 0.02)


@pytest.fixture
def machine(tmp_path: Path) -> Callable[[], Machine]:
    """Makes a new machine."""
    numbers = iter(range(10))
    return lambda: Machine(tmp_path / f"machine{next(numbers)}")
