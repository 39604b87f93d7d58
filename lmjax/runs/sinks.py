"""Services that metrics are also sent to: Weights & Biases and trackio.

They are views of `metrics.jsonl`, which is what counts: each has a thread of its own, so a service
that hangs holds up nothing, and the first call that fails is the last one. A resumed run goes on in
the service's run of the same name; both drop or show again the steps that are repeated, as they
see fit. Offline, W&B obeys WANDB_MODE=offline; trackio writes to this machine anyway.

The only file that knows wandb and trackio.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from lmjax.checks import validate
from lmjax.console.decoration import decoration
from lmjax.files.background import Background

PATIENCE_SECONDS = 30.0
"""How long the end of a run waits for what is on its way to a service."""

Name = Literal["wandb", "trackio"]


@dataclass(frozen=True)
class MetricsConfig:
    """Where the rows of metrics.jsonl are also sent."""

    sinks: tuple[Name, ...] = ()
    """Services: wandb, trackio; each needs its extra, such as lmjax[wandb]. One that fails is left
    out from then on, and the run goes on."""
    project: str = "lmjax"
    """The services' name for what the run belongs to."""

    def __post_init__(self) -> None:
        """Refuses unknown services."""
        validate(self, "metrics")
        if not self.project:
            raise ValueError("metrics.project is empty; name a project, such as lmjax")
        if len(set(self.sinks)) < len(self.sinks):
            raise ValueError(f"metrics.sinks is {' '.join(self.sinks)}; name each service once")


def refuse_missing(config: MetricsConfig) -> None:
    """Raises `ValueError` if a service is asked for whose package is not installed."""
    for name in config.sinks:
        if importlib.util.find_spec(name) is None:
            raise ValueError(
                f"metrics.sinks names {name}, which is not installed; pip install 'lmjax[{name}]'"
            )


class Sink:
    """One service, in a thread of its own.

    Args:
      name: of its package.
      start: opens the service's run and returns what logs a row at a step.
      finish: closes it.
      note: says a line to whoever is watching.
    """

    def __init__(
        self,
        name: str,
        start: Callable[[], Callable[[Mapping[str, Any], int], object]],
        finish: Callable[[], object],
        note: Callable[[str], None],
    ):
        self._name, self._note = name, note
        self._finish = finish
        self._log: Callable[[Mapping[str, Any], int], object] | None = None
        self._background = Background()
        self._background.submit(lambda: self._try(lambda: self._open(start)))

    def log(self, scalars: Mapping[str, Any], step: int) -> None:
        """Sends the metrics of a step; returns at once."""
        self._background.submit(lambda: self._try(lambda: self._send(scalars, step)))

    def close(self) -> None:
        """Waits for what is on its way, but not for ever."""
        self._background.submit(lambda: self._try(self._end))
        if not self._background.drained(PATIENCE_SECONDS):
            self._note(f"warning: {self._name} does not answer; metrics.jsonl has all rows")
        self._background.stop()

    def _open(self, start: Callable[[], Callable[[Mapping[str, Any], int], object]]) -> None:
        self._log = start()

    def _send(self, scalars: Mapping[str, Any], step: int) -> None:
        if self._log is not None:
            self._log(scalars, step)

    def _end(self) -> None:
        if self._log is not None:
            self._finish()

    def _try(self, act: Callable[[], None]) -> None:
        """Does something; once that fails, nothing more is sent."""
        worked = False
        with decoration(f"curves in {self._name}", self._note):
            try:
                act()
            except SystemExit as error:  # a service's own idea of how to fail
                raise RuntimeError(str(error)) from error
            worked = True
        if not worked:
            self._log = None


def open_sinks(
    config: MetricsConfig, workdir: Path, values: dict[str, Any], note: Callable[[str], None]
) -> list[Sink]:
    """The services of a run.

    Args:
      config: which, and the project.
      workdir: the run directory, whose name is the run's there.
      values: the config of the run, for people to filter by.
      note: says a line to whoever is watching.
    """
    makers = {"wandb": _wandb, "trackio": _trackio}
    return [makers[name](config.project, workdir, values, note) for name in config.sinks]


def _wandb(
    project: str, workdir: Path, values: dict[str, Any], note: Callable[[str], None]
) -> Sink:
    run: list[Any] = []

    def start() -> Callable[[Mapping[str, Any], int], object]:
        wandb = importlib.import_module("wandb")
        # The directory is what makes a run the same run when it is resumed.
        own = hashlib.sha256(str(workdir.absolute()).encode()).hexdigest()[:16]
        run.append(
            wandb.init(
                project=project, name=workdir.name, id=own, resume="allow", dir=str(workdir),
                config=values, settings=wandb.Settings(silent=True, console="off"),
            )
        )  # fmt: skip
        # The number of the step goes with the row: evaluations have a row of their own at a step.
        run[0].define_metric("*", step_metric="step")
        return lambda scalars, step: run[0].log({**scalars, "step": step})

    return Sink("wandb", start, lambda: run[0].finish(), note)


def _trackio(
    project: str, workdir: Path, values: dict[str, Any], note: Callable[[str], None]
) -> Sink:
    run: list[Any] = []

    def start() -> Callable[[Mapping[str, Any], int], object]:
        trackio = importlib.import_module("trackio")
        run.append(trackio.init(project=project, name=workdir.name, config=values, resume="allow"))
        return lambda scalars, step: run[0].log(dict(scalars), step=step)

    return Sink("trackio", start, lambda: run[0].finish(), note)
