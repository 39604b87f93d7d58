"""The first thing a command does: it says that it is importing, and obeys Ctrl-C.

Importing JAX and the libraries around it takes from two seconds to a minute. Imports the standard
library alone.
"""

from __future__ import annotations

import os

from lmjax.console import interrupts, stages

RANKS = ("RANK", "SLURM_PROCID", "OMPI_COMM_WORLD_RANK")
"""Variables in which launchers number the processes of a run; the first one speaks for all."""


def begin() -> None:
    """Makes this process a command; the imports that follow are its first stage.

    Does nothing when it is one already.
    """
    if interrupts.watching():
        return
    interrupts.watch()
    stages.begin(stages.IMPORTING)
    if all(os.environ.get(name, "0") == "0" for name in RANKS):
        stages.show()
