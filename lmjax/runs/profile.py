"""A trace of some steps, for TensorBoard and Perfetto: `--profile.steps 10:13`.

It lies in `profile/` of the run directory, as JAX's profiler writes it: `*.xplane.pb` is what
TensorBoard's profile plugin opens, `perfetto_trace.json.gz` what https://ui.perfetto.dev opens.
What goes wrong with a trace costs the trace and nothing else.

Knows JAX's profiler; nothing of how steps are computed.
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
"""What a step is called in a trace; `step_num` is its number."""


@dataclass(frozen=True)
class ProfileConfig:
    """Which steps are traced."""

    steps: str = ""
    """FIRST:END, such as 10:13 for the steps 10, 11 and 12: their trace goes to profile/ in the run
    directory, for TensorBoard and Perfetto. Empty: none."""

    def __post_init__(self) -> None:
        """Refuses what is no range of steps."""
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
        """The steps that are traced."""
        first, end = map(int, self.steps.split(":")) if self.steps else (0, 0)
        return range(first, end)


class Profiler:
    """Traces the steps of a range, as far as this launch takes them; a context manager.

    Args:
      steps: which.
      workdir: the run directory.
      note: says a line to whoever is watching.
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
        """Starts the trace; devices should have nothing left to do."""
        with decoration(f"the trace in {self._folder}", self._note):
            jax.profiler.start_trace(str(self._folder), create_perfetto_trace=True)
            self._tracing = True

    def step(self, step: int) -> contextlib.AbstractContextManager[object]:
        """A block that dispatches a step, by its number in the trace if there is one."""
        if not self._tracing:
            return contextlib.nullcontext()
        self._traced.append(step)
        return jax.profiler.StepTraceAnnotation(STEP, step_num=step)

    def end(self) -> None:
        """Writes the trace, if there is one; the steps in it should be done."""
        if not self._tracing:
            return
        self._tracing = False
        with decoration(f"the trace in {self._folder}", self._note):
            jax.profiler.stop_trace()
            if self._traced:
                first, last = self._traced[0], self._traced[-1]
                self._note(f"the trace of steps {first} to {last} is in {self._folder}")
