"""Runs blocking work, such as writing to a file system that hangs, outside the training loop.

Knows nothing about the work itself.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable


class Background:
    """Runs jobs in order in its own thread until the first failure.

    Submitting a job never blocks. The thread does not keep the process alive; call `drained` before
    exiting.
    """

    def __init__(self) -> None:
        self._jobs: queue.SimpleQueue[Callable[[], object] | threading.Event | None] = (
            queue.SimpleQueue()
        )
        self._failure: BaseException | None = None
        threading.Thread(target=self._work, daemon=True).start()

    def submit(self, job: Callable[[], object]) -> None:
        """Submits a job; raises the error of an earlier one."""
        self._raise()
        self._jobs.put(job)

    def drained(self, seconds: float) -> bool:
        """Whether all jobs are done, now or within some seconds; raises the error of a job."""
        done = threading.Event()
        self._jobs.put(done)
        in_time = done.wait(seconds)
        self._raise()
        return in_time

    def stop(self) -> None:
        """Ends the thread after the submitted jobs."""
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
