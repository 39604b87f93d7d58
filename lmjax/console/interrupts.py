"""How a command handles SIGINT (Ctrl-C) and SIGTERM, whatever its main thread is doing.

Python runs signal handlers in the main thread between two instructions, so not while that thread is
inside XLA's compiler. Instead, each signal wakes a separate thread of `watch`.

    while importing      the command ends at once
    while it listens     `listen`: a training run decides; see `console/signals.py`
    otherwise            `Interrupted` is raised in the main thread; a command that has not ended
                         some seconds later, or gets a second signal, ends at once

Exit codes are those of a shell: 130 for SIGINT, 143 for SIGTERM. Ending at once leaves files as a
killed process does, which they are designed to survive. Imports the standard library only.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Final

from lmjax.console import stages

SIGNALS: Final = (signal.SIGINT, signal.SIGTERM)
PATIENCE_SECONDS: Final = 3.0
SHOW_CURSOR: Final = "\x1b[?25h"

Listener = Callable[[int], None]


class Interrupted(KeyboardInterrupt):
    """Raised when a signal ends the command.

    Attributes:
      number: of the signal.
    """

    def __init__(self, number: int):
        super().__init__(signal.Signals(number).name)
        self.number = number

    @property
    def exit_code(self) -> int:
        """The exit code that a shell reports for a process ended by a signal."""
        return 128 + self.number


class _Watch:
    """The signal state of this process."""

    def __init__(self) -> None:
        self.active = False
        self.catching = False
        self.listeners: list[Listener] = []
        self.cleanups: list[Callable[[], None]] = []
        self._ignored: set[int] = set()
        self._signalled = False

    def start(self) -> None:
        """Installs the handlers."""
        if self.active or threading.current_thread() is not threading.main_thread():
            return
        self.active = True
        self._ignored = {n for n in SIGNALS if signal.getsignal(n) is signal.SIG_IGN}
        reading, writing = os.pipe()
        os.set_blocking(writing, False)
        for number in SIGNALS:
            signal.signal(number, self._in_main_thread)
        signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
        threading.Thread(target=self._wait, args=(reading,), name="signals", daemon=True).start()

    def _in_main_thread(self, number: int, frame: FrameType | None) -> None:
        if self.catching and not self.listeners and number not in self._ignored:
            raise Interrupted(number)

    def _wait(self, reading: int) -> None:
        while data := os.read(reading, 1):
            if data[0] in SIGNALS:
                self._heard(data[0])

    def _heard(self, number: int) -> None:
        if self.listeners:
            self.listeners[-1](number)
        elif number not in self._ignored:
            if self._signalled or not self.catching:
                leave(number)
            self._signalled = True
            say(_stopped(number))
            threading.Timer(PATIENCE_SECONDS, os._exit, (128 + number,)).start()


_watch = _Watch()


def watch() -> None:
    """Handles SIGINT and SIGTERM of this process; call it in the main thread."""
    _watch.start()


def watching() -> bool:
    """Whether `watch` was called."""
    return _watch.active


@contextmanager
def catching() -> Iterator[None]:
    """A block in which `Interrupted` may be raised, because the caller catches it."""
    before, _watch.catching = _watch.catching, True
    try:
        yield
    finally:
        _watch.catching = before


@contextmanager
def listen(listener: Listener) -> Iterator[None]:
    """A block in which signals go to a listener, called in another thread."""
    _watch.listeners.append(listener)
    try:
        yield
    finally:
        _watch.listeners.remove(listener)


@contextmanager
def cleaning_up(cleanup: Callable[[], None]) -> Iterator[None]:
    """A block during which `leave` makes a final call, for example to stop other processes."""
    _watch.cleanups.append(cleanup)
    try:
        yield
    finally:
        _watch.cleanups.remove(cleanup)


def leave(number: int) -> None:
    """Ends the process at once because of a signal."""
    try:
        for cleanup in _watch.cleanups:
            cleanup()
        say(_stopped(number))
    finally:
        os._exit(128 + number)


def say(text: str) -> None:
    """Prints a line on stderr without taking its lock, and restores the terminal."""
    terminal = sys.__stderr__ is not None and sys.__stderr__.isatty()
    start = stages.CLEAR + SHOW_CURSOR if terminal else ""
    try:
        os.write(2, f"{start}{text}\n".encode())
    except OSError:  # the reader is gone
        return


def _stopped(number: int) -> str:
    stage = stages.current()
    text = f"stopped by {signal.Signals(number).name}"
    if stage == stages.IMPORTING:
        return f"{text} while {stage}; nothing was written"
    return f"{text} while {stage}" if stage else text
