"""Services that also receive metrics: Weights & Biases and trackio.

They are views of `metrics.jsonl`, which is authoritative. Each has its own thread, so a service
that hangs delays nothing, and is dropped after its first failure. A resumed run continues the
service's run of the same name; each service drops or shows repeated steps in its own way. Offline,
W&B obeys WANDB_MODE=offline; trackio always writes to this machine.

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
"""How long the end of a run waits for rows being sent to a service."""

Name = Literal["wandb", "trackio"]


@dataclass(frozen=True)
class MetricsConfig:
    """Where the rows of metrics.jsonl are also sent."""

    sinks: tuple[Name, ...] = ()
    """Services: wandb, trackio; each needs its extra, such as lmjax[wandb]. A service that fails is
    dropped, and the run continues."""
    project: str = "lmjax"
    """Project name in the services."""

    def __post_init__(self) -> None:
        """Rejects unknown services."""
        validate(self, "metrics")
        if not self.project:
            raise ValueError("metrics.project is empty; name a project, such as lmjax")
        if len(set(self.sinks)) < len(self.sinks):
            raise ValueError(f"metrics.sinks is {' '.join(self.sinks)}; name each service once")


def refuse_missing(config: MetricsConfig) -> None:
    """Raises `ValueError` if the package of a requested service is not installed."""
    for name in config.sinks:
        if importlib.util.find_spec(name) is None:
            raise ValueError(
                f"metrics.sinks names {name}, which is not installed; pip install 'lmjax[{name}]'"
            )


class Sink:
    """One service, in its own thread.

    Args:
      name: of its package.
      start: opens the service's run and returns a function that logs a row at a step.
      finish: closes it.
      note: shows a line to the user.
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
        """Waits a limited time for rows being sent."""
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
        """Calls a function; after a failure, nothing more is sent."""
        worked = False
        with decoration(f"curves in {self._name}", self._note):
            try:
                act()
            except SystemExit as error:  # some services exit on failure
                raise RuntimeError(str(error)) from error
            worked = True
        if not worked:
            self._log = None


def open_sinks(
    config: MetricsConfig, workdir: Path, values: dict[str, Any], note: Callable[[str], None]
) -> list[Sink]:
    """Opens the services of a run.

    Args:
      config: which services, and the project.
      workdir: the run directory, whose name is the run's name there.
      values: the config of the run, to filter by.
      note: shows a line to the user.
    """
    makers = {"wandb": _wandb, "trackio": _trackio}
    return [makers[name](config.project, workdir, values, note) for name in config.sinks]


def _wandb(
    project: str, workdir: Path, values: dict[str, Any], note: Callable[[str], None]
) -> Sink:
    run: list[Any] = []

    def start() -> Callable[[Mapping[str, Any], int], object]:
        """Opens the run of Weights & Biases; returns what logs a row."""
        wandb = importlib.import_module("wandb")
        # The directory identifies the run when it is resumed.
        own = hashlib.sha256(str(workdir.absolute()).encode()).hexdigest()[:16]
        run.append(
            wandb.init(
                project=project, name=workdir.name, id=own, resume="allow", dir=str(workdir),
                config=values, settings=wandb.Settings(silent=True, console="off"),
            )
        )  # fmt: skip
        # The step number is sent with the row: an evaluation adds its own row at the same step.
        run[0].define_metric("*", step_metric="step")
        return lambda scalars, step: run[0].log({**scalars, "step": step})

    return Sink("wandb", start, lambda: run[0].finish(), note)


def _trackio(
    project: str, workdir: Path, values: dict[str, Any], note: Callable[[str], None]
) -> Sink:
    run: list[Any] = []

    def start() -> Callable[[Mapping[str, Any], int], object]:
        """Opens the run of Trackio; returns what logs a row."""
        trackio = importlib.import_module("trackio")
        run.append(trackio.init(project=project, name=workdir.name, config=values, resume="allow"))
        return lambda scalars, step: run[0].log(dict(scalars), step=step)

    return Sink("trackio", start, lambda: run[0].finish(), note)
