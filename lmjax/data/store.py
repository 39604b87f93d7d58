"""What a cache says about itself: sealed directories, whose damage is detected, and its errors.

Imports JSON and the room's errors. A sealed directory that lost or changed a file is not mistaken
for intact. Directories are published by `files/publishing.py`.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from lmjax import strict_json
from lmjax.data.errors import CacheFailed, DataError

_META = "meta.json"
_BLOCK = 1 << 16
_SAMPLED_BLOCKS = 16
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)


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
