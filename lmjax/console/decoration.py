"""Pictures, samples and the like: worth having, and never what decides how a run ends.

Knows nothing of what is drawn.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

from lmjax.console.progress import say
from lmjax.files.filenames import printable


@contextlib.contextmanager
def decoration(what: str, note: Callable[[str], None] = say) -> Iterator[None]:
    """A block that makes something to look at; where it fails, a line says so, and that is all.

    Args:
      what: completes `could not draw ...`, such as `curves.png`.
      note: says a line to whoever is watching.
    """
    try:
        yield
    except Exception as error:
        words = " ".join(printable(error).split())[:200]
        note(f"warning: could not draw {what}: {words or type(error).__name__}")
