"""Directories that appear completely or not at all, and whose damage is detected.

Imports JSON and the room's errors. Guarantees, even under kill -9 and power loss:

- A directory published here was complete, and on disk, before it got its name.
- What a killed builder left behind is never opened, and the next builder removes it.
- A sealed directory that lost or changed a file is not mistaken for intact.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import shutil
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from lmjax import strict_json
from lmjax.data.errors import CacheFailed, DataError

try:
    import fcntl
except ImportError:  # Windows: leftovers of killed builders stay until someone deletes them.
    fcntl = None  # type: ignore[assignment]

_TEMPORARY = ".building-"
_META = "meta.json"
_BLOCK = 1 << 16
_SAMPLED_BLOCKS = 16
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)


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


@contextlib.contextmanager
def storage_explained(
    folder: Path, chosen_by: str = "--data.cache-dir or LMJAX_CACHE"
) -> Iterator[None]:
    """A block that uses the cache in `folder`; operating-system errors become one line.

    Args:
      folder: where.
      chosen_by: the settings with which the user can choose another folder.

    Raises:
      DataError: the folder cannot be used: no permission, not a directory, read-only.
      CacheFailed: the disk is full or broken.
    """
    try:
        yield
    except (OSError, RuntimeError) as error:
        number = _error_number(error)
        # Reading back something other than what was written has no error number.
        if number is None and not isinstance(error, OSError):
            raise
        reason = os.strerror(number) if number else str(error)
        advice = f"choose another folder with {chosen_by}"
        if number in (None, *_FULL):
            raise CacheFailed(
                f"cannot write the cache {folder}: {reason}; free space there, or {advice}"
            ) from error
        raise DataError(f"cannot use the cache {folder}: {reason}; {advice}") from error


def _error_number(error: Exception) -> int | None:
    """The operating system's error, also where array_record reports it only in words."""
    if isinstance(error, OSError):
        return error.errno
    words = str(error)
    return next((n for n in (*_FULL, errno.EROFS, errno.EACCES) if os.strerror(n) in words), None)


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


def seal(directory: Path, content: Mapping[str, Any]) -> None:
    """Writes `meta.json`: `content`, and digests that identify it and each file of `directory`."""
    files = (path for path in sorted(directory.rglob("*")) if path.is_file())
    records = {path.relative_to(directory).as_posix(): _record(path) for path in files}
    body = {**content, "files": records}
    meta = {"sha256": json_sha256(body), **body}
    (directory / _META).write_text(strict_json.dumps(meta, indent=1) + "\n", encoding="utf-8")


def sealed_content(directory: Path) -> dict[str, Any] | None:
    """What `seal` wrote, including `files` with sizes and hashes; None if damaged or gone.

    Takes milliseconds at any size: it compares each file's size and 16 blocks of 64 KiB, spread
    over the file including both ends. That finds truncation, zeroed tails and foreign files, but
    not a flipped bit between the blocks; the full SHA-256 beside it can.
    """
    try:
        meta = strict_json.read(directory / _META)
        body = {key: value for key, value in meta.items() if key != "sha256"}
        intact = meta["sha256"] == json_sha256(body) and all(
            (directory / name).stat().st_size == record["size"]
            and _sample_sha256(directory / name) == record["sample_sha256"]
            for name, record in body["files"].items()
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    return body if intact else None


def json_sha256(value: Any) -> str:
    """Hex SHA-256 of a JSON value, independent of key order."""
    return hashlib.sha256(strict_json.dumps(value, sort_keys=True).encode()).hexdigest()


def _record(path: Path) -> dict[str, int | str]:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    size = path.stat().st_size
    return {"size": size, "sha256": digest, "sample_sha256": _sample_sha256(path)}


def _sample_sha256(path: Path) -> str:
    last = max(path.stat().st_size - _BLOCK, 0)
    starts = sorted({last * i // (_SAMPLED_BLOCKS - 1) for i in range(_SAMPLED_BLOCKS)})
    digest = hashlib.sha256()
    with path.open("rb") as file:
        for start in starts:
            file.seek(start)
            digest.update(file.read(_BLOCK))
    return digest.hexdigest()


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
