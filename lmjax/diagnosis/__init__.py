"""What precision did to a run: its twin under another policy."""

from lmjax.diagnosis.opened import OpenRun, open_run
from lmjax.diagnosis.twin import Difference, Twin, twin

__all__ = ["Difference", "OpenRun", "Twin", "open_run", "twin"]
