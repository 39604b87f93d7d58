"""Work that may block, such as writing to a file system that hangs, away from the training loop.

Knows nothing of what the work is.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable


class Background:
    """Does jobs one after another in a thread of its own, until the first one that fails.

    Handing over a job never waits. The thread does not keep a process alive whose end does not ask
    for `drained`.
    """

    def __init__(self) -> None:
        self._jobs: queue.SimpleQueue[Callable[[], object] | threading.Event | None] = (
            queue.SimpleQueue()
        )
        self._failure: BaseException | None = None
        threading.Thread(target=self._work, daemon=True).start()

    def submit(self, job: Callable[[], object]) -> None:
        """Hands over a job; raises what an earlier one raised."""
        self._raise()
        self._jobs.put(job)

    def drained(self, seconds: float) -> bool:
        """Whether everything handed over is done, now or within some seconds; raises likewise."""
        done = threading.Event()
        self._jobs.put(done)
        in_time = done.wait(seconds)
        self._raise()
        return in_time

    def stop(self) -> None:
        """Lets the thread end after what was handed over."""
        self._jobs.put(None)

    def _raise(self) -> None:
        if self._failure is not None:
            raise self._failure

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None:
            if isinstance(job, threading.Event):
                job.set()
            elif self._failure is None:
                try:
                    job()
                except BaseException as error:
                    self._failure = error
