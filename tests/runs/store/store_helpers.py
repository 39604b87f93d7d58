"""Machines that train into an object store, fsspec's in memory, and what they leave there."""

from __future__ import annotations

import contextlib
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from run_helpers import result, untimed

from lmjax.files import manifest
from lmjax.runs.store import remote
from lmjax.runs.store.object_store import Store
from lmjax.runs.store.remote import staged

URL = "memory://bucket/run"


class Machine:
    """A machine with a cache of its own, and what it has said."""

    def __init__(self, cache: Path):
        self.cache = cache
        self.said: list[str] = []

    @contextlib.contextmanager
    def training(self, url: str = URL) -> Iterator[remote.Staged]:
        with staged(url, self.cache, self.said.append) as (workdir, mirror):
            workdir.mkdir(parents=True, exist_ok=True)
            (workdir / "config.json").write_text("{}")
            yield remote.Staged(workdir, mirror)

    def starts(self, *steps: int) -> None:
        """A run of this machine that has written some checkpoints, and ends well."""
        with self.training() as (workdir, mirror):
            for step in steps:
                checkpoint(workdir, step)
                mirror(local_steps(workdir))


def checkpoint(workdir: Path, step: int, text: str = "weights") -> None:
    """A sealed checkpoint of two files, which replaces one of the same step."""
    folder = workdir / "checkpoints" / str(step)
    shutil.rmtree(folder, ignore_errors=True)
    (folder / "state").mkdir(parents=True)
    (folder / "state" / "array").write_text(f"{text} {step}")
    (folder / "data.json").write_text("{}")
    manifest.seal(folder)


def local_steps(workdir: Path) -> list[int]:
    folders = (workdir / "checkpoints").glob("*")
    return sorted(int(path.name) for path in folders if path.name.isdecimal())


def sealed(url: str = URL) -> list[int]:
    """The checkpoints that are in the store."""
    names = [name.split("/") for name in Store(url).names()]
    return sorted(int(parts[1]) for parts in names if parts[-1] == manifest.NAME)


def flip(objects: dict[str, Any], path: str) -> None:
    """Damages an object."""
    objects[path].seek(0)
    objects[path].write(b"X")


def fail_at(monkeypatch: pytest.MonkeyPatch, part: str) -> None:
    """Makes the store refuse files with this in their path, with what came before there."""
    from fsspec.implementations.memory import MemoryFileSystem

    put_file = MemoryFileSystem.put_file

    def refuse(self: Any, lpath: str, rpath: str, *more: Any, **options: Any) -> None:
        if part in rpath:
            raise PermissionError("Access Denied")
        put_file(self, lpath, rpath, *more, **options)

    monkeypatch.setattr(MemoryFileSystem, "put_file", refuse)


def until(condition: Callable[[], bool], seconds: float = 30, every: float = 0.01) -> None:
    """Returns when a condition holds."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(every)


def assert_same_run(workdir: Path, reference: Path) -> None:
    assert result(workdir)["parameters_sha256"] == result(reference)["parameters_sha256"]
    assert result(workdir)["eval_loss"] == result(reference)["eval_loss"]
    assert untimed(workdir) == untimed(reference)
