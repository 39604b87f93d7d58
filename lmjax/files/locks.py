"""Locks on files, which the operating system releases when their process ends, however it ends.

POSIX locks and not `flock`, because they also hold between the machines of a cluster that share a
file system. They are a process's, not a thread's: within one process nothing is refused. Knows
nothing of what is locked.
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
    """The operating system or the file system has no locks."""


@contextlib.contextmanager
def lock(path: Path, *, wait: bool = True) -> Iterator[bool]:
    """Whether the lock belongs to this process for the length of the block.

    Args:
      path: a file that stands for what is locked; it is made where it is missing, and says who had
        the lock last.
      wait: for as long as another process has it; then it always belongs to this one.

    Raises:
      LocksUnavailable: there are no such locks here.
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
    """Who has the lock, in words. Not for a lock of this process, which reading would release."""
    try:
        return path.read_text(encoding="utf-8").strip() or "another process"
    except OSError:
        return "another process"
