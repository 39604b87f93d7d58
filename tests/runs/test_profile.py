"""A trace of some steps: that it is there, parses, and holds these steps."""

from __future__ import annotations

import dataclasses
import gzip
import re
from pathlib import Path

import pytest
from run_helpers import result, strict_loads, tiny

from lmjax.runs.config import identity
from lmjax.runs.profile import ProfileConfig
from lmjax.train import train


def steps_of(folder: Path) -> list[int]:
    """The numbers of the steps in the trace that Perfetto opens."""
    (path,) = folder.rglob("perfetto_trace.json.gz")
    events = strict_loads(gzip.decompress(path.read_bytes()).decode())["traceEvents"]
    traced = [event for event in events if event.get("name") == "train"]
    assert any("dur" in event for event in traced)
    return sorted(int(event["args"]["step_num"]) for event in traced if "args" in event)


def test_a_trace_holds_the_steps_and_changes_nothing(home: Path, tmp_path: Path) -> None:
    plain = tiny(home, steps=6)
    traced = dataclasses.replace(plain, profile=ProfileConfig("3:5"))
    train(plain, tmp_path / "plain", progress=False)
    train(traced, tmp_path / "traced", progress=False)
    assert set(steps_of(tmp_path / "traced" / "profile")) == {3, 4}
    (xplane,) = (tmp_path / "traced" / "profile").rglob("*.xplane.pb")
    assert b"train" in xplane.read_bytes()
    for name in ("eval_loss", "parameters_sha256"):
        assert result(tmp_path / "plain")[name] == result(tmp_path / "traced")[name]
    assert not (tmp_path / "plain" / "profile").exists()
    assert identity(plain) == identity(traced)


@pytest.mark.long
def test_a_trace_that_the_end_cuts_short_is_written(home: Path, tmp_path: Path) -> None:
    config = dataclasses.replace(tiny(home, steps=6), profile=ProfileConfig("3:7"))
    train(config, tmp_path / "run", stop_after=4, progress=False)
    assert set(steps_of(tmp_path / "run" / "profile")) == {3, 4}


def test_a_profiler_that_fails_does_not_end_the_run(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("another one is at work")

    monkeypatch.setattr("jax.profiler.start_trace", fail)
    config = dataclasses.replace(tiny(home, steps=6), profile=ProfileConfig("3:5"))
    assert train(config, tmp_path / "run", progress=False).result is not None


@pytest.mark.parametrize("steps", ["10", "0:3", "5:5", "5:3", "-1:3", "a:b", "1:2:3", "1:", "٣:٤"])
def test_garbage_is_refused(steps: str) -> None:
    with pytest.raises(ValueError, match=re.escape(f"profile.steps is {steps!r}")):
        ProfileConfig(steps)


def test_steps_after_the_end_are_refused(home: Path) -> None:
    assert dataclasses.replace(tiny(home, steps=6), profile=ProfileConfig("6:7")).profile.steps
    with pytest.raises(ValueError, match=r"profile\.steps is 6:8, but the run ends after step 6"):
        dataclasses.replace(tiny(home, steps=6), profile=ProfileConfig("6:8"))
