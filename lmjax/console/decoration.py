"""Optional output, such as pictures and samples, whose failure must not end a run.

Knows nothing about what is drawn.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

from lmjax.console.progress import say
from lmjax.files.filenames import printable


@contextlib.contextmanager
def decoration(what: str, note: Callable[[str], None] = say) -> Iterator[None]:
    """A block that makes optional output; a failure only prints a warning.

    Args:
      what: completes `could not draw ...`, such as `curves.png`.
      note: shows a line to the user.
    """
    try:
        yield
    except Exception as error:
        words = " ".join(printable(error).split())[:200]
        note(f"warning: could not draw {what}: {words or type(error).__name__}")
