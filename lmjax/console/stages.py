"""What a command is currently doing, shown as a line with a clock.

    with stage("reading the text"):
        ...

In a terminal the line is live and disappears when the stage ends. Elsewhere (a pipe, a log file) a
long stage is announced by a plain line, stamped with the seconds since the command started, and
again every half minute. Nothing is shown before `show` is called, which commands do and libraries
and notebooks do not; stages are tracked regardless.

Imports the standard library only, because importing is the first stage.
"""

from __future__ import annotations

import atexit
import os
import shutil
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Final

IMPORTING: Final = "importing"

SECONDS_BETWEEN_DRAWINGS: Final = 0.25
SECONDS_BETWEEN_LINES: Final = 30.0

PATIENCE: Final = {IMPORTING: 10.0}
"""Seconds before a stage is announced without a terminal, if not `USUAL_PATIENCE`: flags are
checked after importing, and a complaint about them stays one line."""

USUAL_PATIENCE: Final = 1.0

CLEAR: Final = "\r\x1b[K"


class _Stage:
    """An active stage; `due` is when it is next announced without a terminal."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.since = time.monotonic()
        self.due = self.since + PATIENCE.get(text, USUAL_PATIENCE)


class _SharedStream:
    """A stream that other text goes to as well; writing to it first removes the live line.

    `print` writes a text and its newline one after the other, so a line that was begun is ended
    before the stage is shown again.
    """

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        """Writes in place of the live line."""
        with _line.lock:
            _line.erase()
            if text:
                _line.in_a_line = not text.endswith("\n")
            return self._stream.write(text)

    def __getattr__(self, name: str) -> Any:
        """Delegates everything else to the stream."""
        return getattr(self._stream, name)


class _Line:
    """The live line of this process and its active stages, innermost last."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.stages: list[_Stage] = []
        self.hidden = 0
        self.live = False
        self.in_a_line = False
        self._started = time.monotonic()
        self._stream: Any = None
        self._drawn = False

    def show(self) -> None:
        """Starts showing stages."""
        if self._stream is not None or sys.stderr is None:
            return
        self._stream = sys.stderr
        self.live = self._stream.isatty() and os.environ.get("TERM", "dumb") != "dumb"
        sys.stderr = _SharedStream(self._stream)
        if self.live and sys.stdout is not None and sys.stdout.isatty():
            sys.stdout = _SharedStream(sys.stdout)
        atexit.register(self._end)
        self.update()
        threading.Thread(target=self._keep_updated, name="stages", daemon=True).start()

    def update(self) -> None:
        """Draws the innermost stage, or announces it when due."""
        with self.lock:
            if self._stream is None or not self.stages or self.in_a_line:
                return
            stage, now = self.stages[-1], time.monotonic()
            if self.live:
                if not self.hidden:
                    self._draw(stage, now)
            elif now >= stage.due:
                lasted = f", for {now - stage.since:.0f} s" if now - stage.since >= 10 else ""
                self._put(f"[{now - self._started:.0f} s] {stage.text}{lasted}\n")
                stage.due = now + SECONDS_BETWEEN_LINES

    def erase(self) -> None:
        """Removes the live line, if shown."""
        if self._drawn:
            self._drawn = False
            self._put(CLEAR)

    def _draw(self, stage: _Stage, now: float) -> None:
        width = max(shutil.get_terminal_size().columns - 1, 1)
        self._drawn = True
        self._put(f"{CLEAR}{stage.text} ... {now - stage.since:.0f} s"[: width + len(CLEAR)])

    def _put(self, text: str) -> None:
        """Writes; a closed stream or one that cannot encode the text does not end a run."""
        try:
            self._stream.write(text)
            self._stream.flush()
        except (OSError, ValueError):
            self._stream = None

    def _keep_updated(self) -> None:
        while self._stream is not None:
            time.sleep(SECONDS_BETWEEN_DRAWINGS)
            self.update()

    def _end(self) -> None:
        with self.lock:
            self.stages.clear()
            if self._stream is not None:
                self.erase()


_line = _Line()


def show() -> None:
    """Starts showing the stages of this process on stderr."""
    _line.show()


def begin(text: str) -> None:
    """Begins a stage that lasts until `end` is called."""
    with _line.lock:
        _line.stages.append(_Stage(text))
        _line.update()


def end(text: str) -> None:
    """Ends the innermost stage with this text, if active."""
    with _line.lock:
        for index in reversed(range(len(_line.stages))):
            if _line.stages[index].text == text:
                del _line.stages[index]
                _line.erase()
                return


@contextmanager
def stage(text: str) -> Iterator[None]:
    """A stage for the length of a block; errors that leave it record the stage."""
    begin(text)
    try:
        yield
    except BaseException as error:
        if stage_of(error) is None:
            error.add_note(f"while {text}")
        raise
    finally:
        end(text)


def stage_of(error: BaseException) -> str | None:
    """`while reading the text`: the stage that an error arose in, if any."""
    notes = getattr(error, "__notes__", ())
    return next((note for note in notes if note.startswith("while ")), None)


def current() -> str | None:
    """The innermost stage."""
    stages = _line.stages
    return stages[-1].text if stages else None


@contextmanager
def hidden() -> Iterator[None]:
    """A block in which something else draws live in the terminal."""
    with _line.lock:
        _line.hidden += 1
        _line.erase()
    try:
        yield
    finally:
        with _line.lock:
            _line.hidden -= 1
            _line.in_a_line = False  # what draws ends with control characters, not a newline
