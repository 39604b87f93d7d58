"""Directories that appear completely or not at all.

Imports the standard library only. Guarantees, even under kill -9 and power loss:

- A directory published here was complete, and on disk, before it got its name.
- What a killed builder left behind is never opened, and the next builder removes it.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows: leftovers of killed builders stay until someone deletes them.
    fcntl = None  # type: ignore[assignment]

_TEMPORARY = ".building-"


@contextlib.contextmanager
def published_directory(target: Path) -> Iterator[Path]:
    """A new temporary directory beside `target` that becomes `target` if the block succeeds.

    If the block raises, the temporary and the parents made for it are removed. If another process
    published `target` first, its directory stays and ours is dropped: both were built from the same
    key, so either will do.
    """
    made = _make_parents(target.parent)
    remove_leftovers(target.parent)
    temporary, lock = _locked_temporary(target.parent)
    try:
        yield temporary
        _sync_tree(temporary)
        try:
            os.rename(temporary, target)
        except OSError:
            if not target.is_dir():
                raise
            shutil.rmtree(temporary, ignore_errors=True)
        _sync(target.parent)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        _remove_if_empty(made)
        raise
    finally:
        if lock is not None:
            os.close(lock)


@contextlib.contextmanager
def sole_builder(target: Path) -> Iterator[None]:
    """A block that one process at a time may enter to build `target`.

    The others wait, and should check for `target` again on entry. If the file system has no locks,
    nothing waits: all build, and one of them publishes.
    """
    made = _make_parents(target.parent)
    path = target.parent / f".{target.name}.lock"
    lock = _locked_file(path)
    try:
        yield
    finally:
        if lock is not None:
            path.unlink(missing_ok=True)
            os.close(lock)
        _remove_if_empty(made)


def discard(directory: Path) -> None:
    """Renames `directory` away in one step, so that no reader meets half of it, then deletes it."""
    grave = _new_temporary(directory.parent)
    # Another process may have discarded it first.
    with contextlib.suppress(FileNotFoundError):
        os.rename(directory, grave / directory.name)
    shutil.rmtree(grave, ignore_errors=True)


def remove_leftovers(parent: Path) -> None:
    """Removes the temporaries in `parent` that no living process holds.

    A lock tells, not a process id: ids repeat, and mean nothing in another container or on another
    host of a shared cache. Without locks, nothing is removed.
    """
    for path in parent.glob(f"{_TEMPORARY}*"):
        lock = _lock(path, wait=False)
        if lock is not None:
            shutil.rmtree(path, ignore_errors=True)
            os.close(lock)


def _make_parents(directory: Path) -> list[Path]:
    """Creates `directory`; returns the directories created, innermost first."""
    missing = [path for path in (directory, *directory.parents) if not path.exists()]
    directory.mkdir(parents=True, exist_ok=True)
    return missing


def _remove_if_empty(directories: list[Path]) -> None:
    with contextlib.suppress(OSError):
        for directory in directories:
            directory.rmdir()


def _new_temporary(parent: Path) -> Path:
    """Not by `tempfile`, whose directories only their owner may read: a cache may be shared."""
    path = parent / f"{_TEMPORARY}{uuid.uuid4().hex}"
    path.mkdir()
    return path


def _locked_temporary(parent: Path) -> tuple[Path, int | None]:
    """A new directory whose lock is held while this process lives."""
    while True:
        path = _new_temporary(parent)
        lock = _lock(path, wait=True)
        # A cleaner may have run between the two lines above and removed it as a leftover.
        if path.exists():
            return path, lock
        if lock is not None:
            os.close(lock)


def _locked_file(path: Path) -> int | None:
    """A descriptor that holds the lock of the file at `path`; None if locks are unavailable."""
    while fcntl is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            # The previous holder removed the file that this one was waiting for.
            if _is_at(path, descriptor):
                return descriptor
        except OSError:
            os.close(descriptor)
            return None
        os.close(descriptor)
    return None


def _is_at(path: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(path.stat(), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def _lock(directory: Path, *, wait: bool) -> int | None:
    """A descriptor that holds the exclusive lock of `directory`; None if it is unavailable."""
    if fcntl is None:
        return None
    try:
        descriptor = os.open(directory, os.O_RDONLY)
    except OSError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except OSError:
        os.close(descriptor)
        return None
    return descriptor


def _sync_tree(directory: Path) -> None:
    for path in directory.rglob("*"):
        _sync(path)
    _sync(directory)


def _sync(path: Path) -> None:
    """Flushes a file's content, or a directory's entries, to the disk."""
    if path.is_dir() and os.name != "posix":
        return
    descriptor = os.open(path, os.O_RDONLY if os.name == "posix" else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
