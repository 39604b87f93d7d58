"""What precision does to a run, looked at.

The twin compares a step with another policy's, replay computes steps again, attribution finds what
costs the loss, and advice what formats there is room for.
"""

from lmjax.diagnosis.advice import Advice, Trial, advise
from lmjax.diagnosis.attribution import Attribution, Cost, attribute
from lmjax.diagnosis.opened import OpenRun, open_run
from lmjax.diagnosis.replay import Element, Replay, Replayed, replay
from lmjax.diagnosis.twin import Difference, Twin, twin

__all__ = [
    "Advice",
    "Attribution",
    "Cost",
    "Difference",
    "Element",
    "OpenRun",
    "Replay",
    "Replayed",
    "Trial",
    "Twin",
    "advise",
    "attribute",
    "open_run",
    "replay",
    "twin",
]
