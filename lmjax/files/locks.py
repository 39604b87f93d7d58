"""File locks, which the operating system releases when their process ends, however it ends.

POSIX locks rather than `flock`, because they also hold between machines that share a file system.
They belong to a process, not a thread: within one process they never conflict. Knows nothing about
what is locked.
"""

from __future__ import annotations

import contextlib
import errno
import os
import platform
from collections.abc import Iterator
from pathlib import Path

from lmjax.errors import InputError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

UNSUPPORTED = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)


class LocksUnavailable(InputError):
    """The operating system or the file system does not support locks."""


@contextlib.contextmanager
def lock(path: Path, *, wait: bool = True) -> Iterator[bool]:
    """Holds a lock for the length of the block; yields whether this process got it.

    Args:
      path: the lock file; created if missing, it names the last holder.
      wait: block until the lock is free; the result is then always True.

    Raises:
      LocksUnavailable: locks are not supported here.
    """
    if fcntl is None:
        raise LocksUnavailable("this operating system has no POSIX file locks; use WSL")
    path.parent.mkdir(exist_ok=True)
    with path.open("a+", encoding="utf-8") as file:
        mine = True
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except (BlockingIOError, PermissionError):
            mine = False
        except OSError as error:
            if error.errno not in UNSUPPORTED:
                raise
            raise LocksUnavailable(f"the file system of {path.parent} has no locks") from error
        if mine:
            file.truncate(0)
            file.write(f"process {os.getpid()} on {platform.node()}")
            file.flush()
        yield mine


def holder(path: Path) -> str:
    """Describes the holder. Do not call it on a lock of this process: reading would release it."""
    try:
        return path.read_text(encoding="utf-8").strip() or "another process"
    except OSError:
        return "another process"
