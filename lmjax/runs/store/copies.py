"""The local copy of a run in an object store.

Knows a run directory's files, manifests and stores, not the files' content.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
from collections.abc import Iterable
from pathlib import Path

from lmjax.files import manifest
from lmjax.runs.store import lease as claim
from lmjax.runs.store.object_store import Store

CONFIG = "config.json"
PART = re.compile(r"checkpoints/([0-9]+)/")
SEALED = re.compile(rf"checkpoints/([0-9]+)/{re.escape(manifest.NAME)}")


class RunCopy:
    """A local run directory and the store that mirrors it."""

    def __init__(self, store: Store, workdir: Path):
        self.store, self.workdir = store, workdir

    def seals(self, names: Iterable[str]) -> dict[int, bytes]:
        """The manifests of the store's checkpoints, by step.

        Args:
          names: of all objects in the store.
        """
        steps = [int(match[1]) for name in names if (match := SEALED.fullmatch(name))]
        seals = {step: self.store.read(seal_of(step)) for step in steps}
        return {step: seal for step, seal in seals.items() if seal is not None}

    def seal(self, step: int) -> bytes | None:
        """The manifest of a local checkpoint."""
        path = self.workdir / seal_of(step)
        return path.read_bytes() if path.exists() else None

    def is_intact(self, step: int) -> bool:
        """Whether a local checkpoint matches its manifest."""
        try:
            manifest.check(self.checkpoint(step))
        except manifest.Damaged:
            return False
        return True

    def has_newest(self, sealed: dict[int, bytes]) -> bool:
        """Whether the store's newest checkpoint exists locally, identical and intact."""
        newest = max(sealed, default=None)
        return (
            newest is not None
            and (self.workdir / CONFIG).exists()
            and self.seal(newest) == sealed[newest]
            and self.is_intact(newest)
        )

    def checkpoint(self, step: int) -> Path:
        """The local folder of a checkpoint."""
        return self.workdir / "checkpoints" / str(step)

    def steps(self) -> list[int]:
        """The steps of the complete local checkpoints."""
        folder = self.workdir / "checkpoints"
        found = folder.iterdir() if folder.is_dir() else ()
        return sorted(int(path.name) for path in found if path.name.isdecimal())

    def files(self) -> dict[str, Path]:
        """The local files except checkpoints, by name; the config comes first."""
        beside = [path for path in self.workdir.iterdir() if path.name != "checkpoints"]
        found = {
            path.relative_to(self.workdir).as_posix(): path
            for top in beside
            for path in (top, *top.rglob("*"))
            if path.is_file() and not path.name.startswith(".")
        }
        return dict(sorted(found.items(), key=lambda item: (item[0] != CONFIG, item[0])))

    def pull_files(self, names: Iterable[str]) -> None:
        """Downloads everything in the store except checkpoints and the lease."""
        wanted = [n for n in names if n != claim.NAME and not n.startswith("checkpoints/")]
        self.store.download({name: self.workdir / name for name in wanted})

    def pull_checkpoint(self, names: Iterable[str], step: int) -> None:
        """Downloads a checkpoint; it gets its name once it is complete, intact or not.

        Raises:
          FileNotFoundError: it was removed meanwhile.
        """
        prefix = f"checkpoints/{step}/"
        partial = self.workdir / "checkpoints" / f".{step}.partial"
        shutil.rmtree(partial, ignore_errors=True)
        wanted = [name for name in names if name.startswith(prefix)]
        self.store.download({name: partial / name.removeprefix(prefix) for name in wanted})
        partial.rename(self.checkpoint(step))


def seal_of(step: int) -> str:
    """The name of a checkpoint's manifest."""
    return f"checkpoints/{step}/{manifest.NAME}"


def step_of(name: str) -> int | None:
    """The step of the checkpoint that an object belongs to, complete or not."""
    match = PART.match(name)
    return int(match[1]) if match else None


def folder_of(url: str, cache: Path, purpose: str) -> Path:
    """The cache folder for a place in a store and a purpose."""
    return cache / "runs" / hashlib.sha256(os.fsencode(url)).hexdigest()[:16] / purpose


def stamp(path: Path) -> tuple[int, int]:
    """A fingerprint that changes with the file."""
    status = path.stat()
    return status.st_mtime_ns, status.st_size
