"""Memory: how much is left, and on CPU kept for the next step once it is freed.

Knows the C library, Linux and what JAX says of a device.
"""

from __future__ import annotations

import contextlib
import ctypes
from pathlib import Path

import jax


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


def free_bytes(device: jax.Device) -> int | None:
    """How many bytes a program may still take on a device; None where nothing says so.

    Of the machine's memory, Linux says what can be had without swapping (proc(5), MemAvailable).
    """
    statistics = device.memory_stats() or {}
    if "bytes_limit" in statistics:
        return statistics["bytes_limit"] - statistics["bytes_in_use"]
    if device.platform == "cpu":
        with contextlib.suppress(OSError, StopIteration):
            lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
            kilobytes = next(line.split()[1] for line in lines if line.startswith("MemAvailable:"))
            return int(kilobytes) * 1024
    return None
