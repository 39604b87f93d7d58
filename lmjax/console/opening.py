"""The first code of a command: asks for huge pages, reports that it is importing, handles Ctrl-C.

Importing JAX and related libraries takes two seconds to a minute. Imports the standard library
only.
"""

from __future__ import annotations

import contextlib
import os
import sys
from pathlib import Path

from lmjax.console import interrupts, stages

RANKS = ("RANK", "SLURM_PROCID", "OMPI_COMM_WORLD_RANK")
"""Variables in which launchers number the processes of a run; only the first process prints."""


HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")
TUNABLE = "glibc.malloc.hugetlb"


def use_huge_pages() -> None:
    """Starts this program over with 2 MiB pages for its memory, where Linux waits to be asked.

    XLA on CPU allocates gigabytes in every step. In pages of 4 KiB, a quarter of the processor time
    of GPT-2 small's step went to page faults. glibc (2.35 and later) reads this setting when a
    process begins, from GLIBC_TUNABLES; `GLIBC_TUNABLES=glibc.malloc.hugetlb=0` leaves pages small.

    Call it before anything else, in the main module only: the process keeps its number, and nothing
    of its state.
    """
    tunables = os.environ.get("GLIBC_TUNABLES", "")
    if TUNABLE in tunables or not _waits_to_be_asked():
        return
    os.environ["GLIBC_TUNABLES"] = ":".join(filter(None, (tunables, f"{TUNABLE}=1")))
    with contextlib.suppress(OSError):
        os.execv(sys.executable, sys.orig_argv)


def _waits_to_be_asked() -> bool:
    try:
        name, _, version = (os.confstr("CS_GNU_LIBC_VERSION") or "").partition(" ")
        new = tuple(map(int, version.split(".")[:2])) >= (2, 35)
        return name == "glibc" and new and "[madvise]" in HUGE_PAGES.read_text(encoding="ascii")
    except (AttributeError, OSError, ValueError):  # not Linux, not glibc
        return False


def begin() -> None:
    """Makes this process a command, with the following imports as its first stage.

    Does nothing if it is one already.
    """
    if interrupts.watching():
        return
    interrupts.watch()
    stages.begin(stages.IMPORTING)
    if all(os.environ.get(name, "0") == "0" for name in RANKS):
        stages.show()
