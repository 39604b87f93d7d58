"""A trace of some steps, for TensorBoard and Perfetto: `--profile.steps 10:13`.

It is written to `profile/` in the run directory by JAX's profiler: TensorBoard's profile plugin
opens `*.xplane.pb`, https://ui.perfetto.dev opens `perfetto_trace.json.gz`. A failed trace costs
only the trace.

Knows JAX's profiler, not how steps are computed.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import jax

from lmjax.checks import validate
from lmjax.console.decoration import decoration

FOLDER = "profile"
STEP = "train"
"""Name of a step in a trace; `step_num` is its number."""


@dataclass(frozen=True)
class ProfileConfig:
    """Which steps to trace."""

    steps: str = ""
    """FIRST:END, such as 10:13 for the steps 10, 11 and 12: their trace goes to profile/ in the run
    directory, for TensorBoard and Perfetto. Empty: none."""

    def __post_init__(self) -> None:
        """Rejects text that is not a range of steps."""
        validate(self, "profile")
        if not self.steps:
            return
        found = re.fullmatch(r"([0-9]{1,9}):([0-9]{1,9})", self.steps)
        if found is None or not 1 <= int(found[1]) < int(found[2]):
            raise ValueError(
                f"profile.steps is {self.steps!r}; it must be FIRST:END with 1 <= FIRST < END, "
                "such as 10:13 for the steps 10, 11 and 12"
            )

    @property
    def range(self) -> range:
        """The steps to trace."""
        first, end = map(int, self.steps.split(":")) if self.steps else (0, 0)
        return range(first, end)


class Profiler:
    """Traces the steps of a range, as far as this launch runs them; a context manager.

    Args:
      steps: which.
      workdir: the run directory.
      note: shows a line to the user.
    """

    def __init__(self, steps: range, workdir: Path, note: Callable[[str], None]):
        self._steps, self._folder, self._note = steps, workdir / FOLDER, note
        self._traced: list[int] = []
        self._tracing = False

    def __enter__(self) -> Profiler:
        """Nothing yet."""
        return self

    def __exit__(self, *_: object) -> None:
        """Ends a trace that the end of the run cuts short."""
        self.end()

    def begins(self, step: int) -> bool:
        """Whether a trace begins before a step."""
        return step in self._steps and not self._tracing and not self._traced

    def ends(self, step: int) -> bool:
        """Whether a trace ends after a step."""
        return self._tracing and step == self._steps[-1]

    def begin(self) -> None:
        """Starts the trace; devices should be idle."""
        with decoration(f"the trace in {self._folder}", self._note):
            jax.profiler.start_trace(str(self._folder), create_perfetto_trace=True)
            self._tracing = True

    def step(self, step: int) -> contextlib.AbstractContextManager[object]:
        """A block that dispatches a step, labelled with its number if a trace is running."""
        if not self._tracing:
            return contextlib.nullcontext()
        self._traced.append(step)
        return jax.profiler.StepTraceAnnotation(STEP, step_num=step)

    def end(self) -> None:
        """Writes the trace, if any; its steps should be done."""
        if not self._tracing:
            return
        self._tracing = False
        with decoration(f"the trace in {self._folder}", self._note):
            jax.profiler.stop_trace()
            if self._traced:
                first, last = self._traced[0], self._traced[-1]
                self._note(f"the trace of steps {first} to {last} is in {self._folder}")
