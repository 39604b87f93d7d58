"""The copy on this machine of a run in an object store.

Knows run directories by their files, manifests and stores; nothing of what files hold.
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


class Copy:
    """A run directory of this machine and the store that has, or is to have, the same."""

    def __init__(self, store: Store, workdir: Path):
        self.store, self.workdir = store, workdir

    def seals(self, names: Iterable[str]) -> dict[int, bytes]:
        """The manifests of the store's checkpoints, by step.

        Args:
          names: of all that the store has.
        """
        steps = [int(match[1]) for name in names if (match := SEALED.fullmatch(name))]
        seals = {step: self.store.read(seal_of(step)) for step in steps}
        return {step: seal for step, seal in seals.items() if seal is not None}

    def seal(self, step: int) -> bytes | None:
        """The manifest of a checkpoint here."""
        path = self.workdir / seal_of(step)
        return path.read_bytes() if path.exists() else None

    def is_intact(self, step: int) -> bool:
        """Whether a checkpoint here is what its manifest says."""
        try:
            manifest.check(self.checkpoint(step))
        except manifest.Damaged:
            return False
        return True

    def has_newest(self, sealed: dict[int, bytes]) -> bool:
        """Whether the newest checkpoint of the store is here: the same, and intact."""
        newest = max(sealed, default=None)
        return (
            newest is not None
            and (self.workdir / CONFIG).exists()
            and self.seal(newest) == sealed[newest]
            and self.is_intact(newest)
        )

    def checkpoint(self, step: int) -> Path:
        """The folder of a checkpoint here."""
        return self.workdir / "checkpoints" / str(step)

    def steps(self) -> list[int]:
        """The checkpoints that are complete here."""
        folder = self.workdir / "checkpoints"
        found = folder.iterdir() if folder.is_dir() else ()
        return sorted(int(path.name) for path in found if path.name.isdecimal())

    def files(self) -> dict[str, Path]:
        """The files here beside the checkpoints, by name; the config comes first."""
        beside = [path for path in self.workdir.iterdir() if path.name != "checkpoints"]
        found = {
            path.relative_to(self.workdir).as_posix(): path
            for top in beside
            for path in (top, *top.rglob("*"))
            if path.is_file() and not path.name.startswith(".")
        }
        return dict(sorted(found.items(), key=lambda item: (item[0] != CONFIG, item[0])))

    def pull_files(self, names: Iterable[str]) -> None:
        """Brings everything that the store has but checkpoints and the claim."""
        wanted = [n for n in names if n != claim.NAME and not n.startswith("checkpoints/")]
        self.store.download({name: self.workdir / name for name in wanted})

    def pull_checkpoint(self, names: Iterable[str], step: int) -> None:
        """Brings a checkpoint, which gets its name when all of it is here, intact or not.

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
    """The step of the checkpoint that an object is a part of, whether that is complete or not."""
    match = PART.match(name)
    return int(match[1]) if match else None


def folder_of(url: str, cache: Path, purpose: str) -> Path:
    """The folder below the cache for what is in a place of a store and wanted for a purpose."""
    return cache / "runs" / hashlib.sha256(os.fsencode(url)).hexdigest()[:16] / purpose


def stamp(path: Path) -> tuple[int, int]:
    """What changes when a file does."""
    status = path.stat()
    return status.st_mtime_ns, status.st_size
