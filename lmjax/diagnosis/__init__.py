"""What precision did to a run: its twin under another policy, and its steps computed again."""

from lmjax.diagnosis.opened import OpenRun, open_run
from lmjax.diagnosis.replay import Element, Replay, Replayed, replay
from lmjax.diagnosis.twin import Difference, Twin, twin

__all__ = [
    "Difference",
    "Element",
    "OpenRun",
    "Replay",
    "Replayed",
    "Twin",
    "open_run",
    "replay",
    "twin",
]
