"""Freed memory on CPU: kept for the next step. Knows the C library alone."""

from __future__ import annotations

import contextlib
import ctypes


def keep_freed_memory() -> None:
    """Asks glibc to keep freed memory for the next step instead of returning it to the kernel.

    XLA on CPU allocates a step's temporaries anew in every step. Given back each time, they cost a
    page fault per 4 KiB: a third of the time of a small model's step. Elsewhere than on glibc
    nothing happens.
    """
    m_trim_threshold, m_mmap_max = -1, -4  # names and numbers of mallopt(3)
    with contextlib.suppress(OSError, AttributeError, TypeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(m_mmap_max, 0)
        mallopt(m_trim_threshold, 2**30)
