"""Standard output and error that cannot end a command: terminals show what they can.

A terminal may lack characters, a reader may leave (`| head -1`), a disk under `> log` may be full,
and a service may start a process without streams. None of that is a reason for a run to stop. Where
what is printed is the result of a command, `Stream.failure` tells that it did not arrive. Imports
the standard library only.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from typing import Any, TextIO


class Stream:
    """A text stream that takes everything: characters it cannot encode become escapes.

    What goes wrong is remembered in `failure`, and from then on nothing is written.
    """

    def __init__(self, stream: TextIO):
        self._stream = stream
        self.failure: OSError | None = None

    def write(self, text: str) -> int:
        """Writes what can be written."""
        if self.failure is None:
            with self._tolerated():
                try:
                    self._stream.write(text)
                except UnicodeEncodeError:
                    encoding = self._stream.encoding or "ascii"
                    self._stream.write(text.encode(encoding, "backslashreplace").decode(encoding))
        return len(text)

    def writelines(self, lines: Any) -> None:
        """Writes each."""
        for line in lines:
            self.write(line)

    def flush(self) -> None:
        """Flushes what can be flushed."""
        if self.failure is None:
            with self._tolerated():
                self._stream.flush()

    @contextlib.contextmanager
    def _tolerated(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            self.failure = error
            # What is left in the buffer must not fail again when the interpreter ends.
            with contextlib.suppress(OSError, ValueError):
                _point_to_nothing(self._stream.fileno())

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextlib.contextmanager
def tolerant() -> Iterator[Stream]:
    """A block in which nothing that is printed can fail; yields its standard output."""
    before = sys.stdout, sys.stderr
    _open_what_is_closed()
    with contextlib.ExitStack() as stack:
        out, err = (
            Stream(stream or stack.enter_context(open(os.devnull, "w", encoding="utf-8")))
            for stream in before
        )
        sys.stdout, sys.stderr = out, err
        try:
            yield out
        finally:
            out.flush()
            err.flush()
            sys.stdout, sys.stderr = before


def _open_what_is_closed() -> None:
    """Gives the numbers 0 to 2 to nothing, lest a file of the run gets one and is printed into."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            _point_to_nothing(number)


def _point_to_nothing(number: int) -> None:
    nothing = os.open(os.devnull, os.O_RDWR)
    if nothing != number:
        os.dup2(nothing, number)
        os.close(nothing)
