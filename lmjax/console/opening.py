"""The first code of a command: reports that it is importing, and handles Ctrl-C.

Importing JAX and related libraries takes two seconds to a minute. Imports the standard library
only.
"""

from __future__ import annotations

import os

from lmjax.console import interrupts, stages

RANKS = ("RANK", "SLURM_PROCID", "OMPI_COMM_WORLD_RANK")
"""Variables in which launchers number the processes of a run; only the first process prints."""


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
