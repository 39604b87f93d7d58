"""Standard output and error that cannot end a command.

A terminal may lack characters, a reader may close the pipe (`| head -1`), the disk under `> log`
may be full, and a service may start a process without streams. None of these should stop a run.
Where the output is the command's result, `Stream.failure` reports that it was lost. Imports the
standard library only.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from typing import Any, TextIO


class Stream:
    """A text stream that accepts everything: characters it cannot encode are escaped.

    The first error is kept in `failure`; afterwards nothing is written.
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
            # The rest of the buffer must not fail again when the interpreter exits.
            with contextlib.suppress(OSError, ValueError):
                _point_to_nothing(self._stream.fileno())

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextlib.contextmanager
def tolerant() -> Iterator[Stream]:
    """A block in which printing cannot fail; yields its standard output."""
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
    """Occupies closed descriptors 0 to 2, so that no file of the run gets one and is printed to."""
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
