"""Runs measured programs in separate processes and reports those that die.

A process reads a line, works, and answers with one line of JSON. Between its answer and the next
line it is stopped, so that idle threads of one do not disturb the next. The kernel silently kills a
process that runs out of memory; here that raises `Died`, which says which process, how and at what
size, and the others continue. Each process may have its own memory cap, and the kernel kills it
before the measuring process.

Knows strict JSON, subprocesses and Linux; on other systems memory is neither capped nor reported.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lmjax import strict_json

try:
    import resource
except ImportError:  # Windows
    resource = None  # type: ignore[assignment]

GIB = 2**30
KEEP_FREED_MEMORY = {
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": str(2**62),
    "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1",
}
"""glibc variables with the effect of `lmjax.train.memory.keep_freed_memory` and of
`lmjax.console.opening.use_huge_pages`, for any program."""

_REASON = re.compile(r"^\S*(Error|Exception)\b|bad_alloc|RESOURCE_EXHAUSTED|[Oo]ut of memory")


class Died(RuntimeError):
    """A process ended before it answered; the message says which and how."""


def can_cap_memory() -> bool:
    """Whether `max_bytes` of a `Worker` is obeyed on this system."""
    return hasattr(resource, "prlimit")


class Worker:
    """A process that answers lines with JSON objects.

    Attributes:
      name: how it is called in messages.
      peak_bytes: most memory that it has had as of its last answer: the `peak_bytes` of the answer,
        where the work is done on a device with its own memory, or else what was resident; None
        where the system does not say.
    """

    def __init__(
        self,
        name: str,
        command: Sequence[str],
        *,
        environment: Mapping[str, str] | None = None,
        max_bytes: int | None = None,
    ):
        """Starts the process.

        Args:
          name: how it is called in messages.
          command: what to run.
          environment: variables beside those of this process.
          max_bytes: most memory that it may allocate (RLIMIT_DATA, getrlimit(2)).

        Raises:
          Died: it cannot be started.
        """
        self.name = name
        self.peak_bytes: int | None = None
        self._max_bytes = max_bytes
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115 - it lives as long as the process
        try:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._errors,
                text=True,
                env={**os.environ, **(environment or {})},
            )
        except OSError as error:
            self._errors.close()
            raise Died(f"{name}: {error}") from error
        pid = self._process.pid
        # Out of memory, the kernel kills whom this names: rather this process than its parent.
        with contextlib.suppress(OSError):
            Path(f"/proc/{pid}/oom_score_adj").write_text("1000", encoding="ascii")
        if max_bytes is not None and can_cap_memory():
            with contextlib.suppress(ProcessLookupError):  # it has ended: the first answer tells
                resource.prlimit(pid, resource.RLIMIT_DATA, (max_bytes, max_bytes))

    def ask(self, line: str) -> dict[str, Any]:
        """What it answers to a line.

        Raises:
          Died: it ended instead.
        """
        process = self._process
        assert process.stdin is not None
        assert process.stdout is not None
        self._signal("SIGCONT")
        with contextlib.suppress(BrokenPipeError):
            print(line, file=process.stdin, flush=True)
        answer = process.stdout.readline()
        if not answer.endswith("\n"):
            process.wait()
            raise Died(f"{self.name}: {self._end()}")
        resident = _peak_bytes(process.pid)
        self._signal("SIGSTOP")
        answered = strict_json.loads(answer)
        self.peak_bytes = answered.get("peak_bytes", resident) or self.peak_bytes
        return answered

    def close(self) -> None:
        """Ends it, whatever it is doing."""
        self._process.kill()
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout, self._errors):
            with contextlib.suppress(BrokenPipeError):
                if stream is not None:
                    stream.close()

    def _signal(self, name: str) -> None:
        if hasattr(signal, name):  # not on Windows
            self._process.send_signal(getattr(signal, name))

    def _end(self) -> str:
        """How it ended, in words."""
        code = self._process.returncode
        how = f"exit code {code}"
        if code < 0:
            with contextlib.suppress(ValueError):
                how = f"killed by {signal.Signals(-code).name}"
        self._errors.seek(0)
        said = [line for line in self._errors.read().splitlines() if _REASON.search(line)]
        if said:
            how += f" ({said[-1]})"
        if code == -signal.SIGKILL:
            how += ", as the kernel does when memory runs out"
        if self._max_bytes is not None:
            how += f"; it may allocate {self._max_bytes / GIB:.1f} GiB"
        if self.peak_bytes is not None:
            how += f"; it had {self.peak_bytes / GIB:.1f} GiB when it answered last"
        return how


def _peak_bytes(pid: int) -> int | None:
    """The most memory that a process has had resident (proc(5), VmHWM)."""
    with contextlib.suppress(OSError, StopIteration):
        lines = Path(f"/proc/{pid}/status").read_text(encoding="ascii").splitlines()
        return 1024 * int(next(line.split()[1] for line in lines if line.startswith("VmHWM:")))
    return None
