"""Metrics in W&B and trackio: what they are told, and that a failure of theirs costs nothing."""

from __future__ import annotations

import dataclasses
import importlib.util
import math
import sqlite3
import sys
import threading
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from run_helpers import result, rows, tiny

from lmjax.runs.config import identity
from lmjax.runs.sinks import MetricsConfig, open_sinks
from lmjax.train import InputError, train

ROWS = [(1, {"loss": 2.5}), (2, {"loss": math.nan}), (2, {"eval_loss": 2.0})]


class Service(ModuleType):
    """A stand-in for both packages; remembers what it is told, and may fail at a call."""

    def __init__(self, name: str, fails_at: str = "") -> None:
        super().__init__(name)
        self.__spec__ = importlib.util.spec_from_loader(name, None)
        self.calls: list[tuple[str, Any]] = []
        self._fails_at = fails_at

    def _call(self, name: str, what: Any) -> None:
        if name == self._fails_at:
            raise SystemExit("no network")
        self.calls.append((name, what))

    def init(self, **options: Any) -> Any:
        self._call("init", options)
        return SimpleNamespace(
            log=lambda row, step=None: self._call("log", (step or row.get("step"), row)),
            finish=lambda: self._call("finish", None),
            define_metric=lambda *_, **__: None,
        )

    def Settings(self, **options: Any) -> dict[str, Any]:
        return options


def install(monkeypatch: pytest.MonkeyPatch, **services: Service) -> None:
    for name, service in services.items():
        monkeypatch.setitem(sys.modules, name, service)


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_a_service_is_told_every_row(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    service = Service(name)
    install(monkeypatch, **{name: service})
    config = MetricsConfig(sinks=(name,), project="precision")  # type: ignore[arg-type]
    said: list[str] = []
    (sink,) = open_sinks(config, tmp_path / "run", {"steps": 40}, said.append)
    for step, row in ROWS:
        sink.log(row, step)
    sink.close()
    assert said == []
    (_, options), *logged, last = service.calls
    assert (options["project"], options["name"]) == ("precision", "run")
    assert (options["config"], options["resume"]) == ({"steps": 40}, "allow")
    assert last == ("finish", None)
    assert [step for _, (step, _) in logged] == [1, 2, 2]
    assert logged[0][1][1]["loss"] == 2.5


@pytest.mark.parametrize("fails_at", ["init", "log", "finish"])
def test_a_service_that_fails_is_left_out_and_the_run_continues(
    fails_at: str, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken, working = Service("wandb", fails_at), Service("trackio")
    install(monkeypatch, wandb=broken, trackio=working)
    plain = tiny(home, steps=6, log_every=2)
    config = dataclasses.replace(plain, metrics=MetricsConfig(sinks=("wandb", "trackio")))
    assert identity(config) == identity(plain)
    assert train(config, tmp_path / "run", progress=False).step == 6
    assert "eval_loss" in result(tmp_path / "run")
    told = [step for name, (step, _) in (c for c in working.calls if c[0] == "log")]
    assert told == [row["step"] for row in rows(tmp_path / "run")]


def test_a_service_that_hangs_holds_up_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    service, never = Service("trackio"), threading.Event()
    monkeypatch.setattr(service, "init", lambda **_: never.wait())
    monkeypatch.setattr("lmjax.runs.sinks.PATIENCE_SECONDS", 0.1)
    install(monkeypatch, trackio=service)
    said: list[str] = []
    config = MetricsConfig(sinks=("trackio",))
    (sink,) = open_sinks(config, tmp_path / "run", {}, said.append)
    sink.log({"loss": 1.0}, 1)
    sink.close()
    never.set()
    assert said == ["warning: trackio does not answer; metrics.jsonl has all rows"]


def test_a_service_that_is_not_installed_is_refused(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *a: None if name == "wandb" else find(name, *a)
    )
    config = dataclasses.replace(tiny(home), metrics=MetricsConfig(sinks=("wandb",)))
    with pytest.raises(InputError, match=r"wandb, which is not installed; pip install 'lmjax"):
        train(config, tmp_path / "run", progress=False)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "options", [{"sinks": ("mlflow",)}, {"sinks": ("wandb", "wandb")}, {"project": ""}]
)
def test_garbage_is_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"metrics\."):
        MetricsConfig(**options)


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_the_service_itself_offline(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))  # read when it is imported
    pytest.importorskip(name)
    said: list[str] = []
    (tmp_path / "run").mkdir()
    config = MetricsConfig(sinks=(name,))  # type: ignore[arg-type]
    for resumed in (False, True):
        (sink,) = open_sinks(config, tmp_path / "run", {"steps": 40}, said.append)
        for step, row in ROWS:
            sink.log(row, step + 10 * resumed)
        sink.close()
    assert said == []
    written = [path for path in tmp_path.rglob("*") if path.is_file()]
    suffixes = {"wandb": ".wandb", "trackio": ".db"}
    (path, *_) = (path for path in written if path.suffix == suffixes[name])
    assert path.stat().st_size
    if name == "trackio":
        with sqlite3.connect(path) as database:
            stored = database.execute("SELECT step, metrics FROM metrics ORDER BY rowid").fetchall()
        assert [step for step, _ in stored] == [1, 2, 2, 11, 12, 12]
