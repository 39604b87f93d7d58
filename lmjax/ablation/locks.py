"""Locks on files, which the operating system releases when their process ends, however it ends.

POSIX locks and not `flock`, because they also hold between the machines of a cluster that share a
file system. Knows nothing of what is locked.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from lmjax.train.run_directory import InputError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]


@contextlib.contextmanager
def lock(path: Path, *, wait: bool = True) -> Iterator[bool]:
    """Whether the lock belongs to this process for the length of the block.

    Args:
      path: a file that stands for what is locked; it is made where it is missing.
      wait: for as long as another process has it; then it always belongs to this one.

    Raises:
      InputError: the operating system has no such locks.
    """
    if fcntl is None:
        raise InputError("ablations need file locks, which this operating system lacks; use WSL")
    path.parent.mkdir(exist_ok=True)
    with path.open("w") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except OSError as error:
            if not isinstance(error, BlockingIOError | PermissionError):
                raise
            yield False
        else:
            yield True
