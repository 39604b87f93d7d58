"""When seeds can be trained at once, and how their time is counted.

What they then compute is in `tests/ablation/test_vmapped.py`.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import jax
import pytest
from run_helpers import tiny

from lmjax.train import CannotVmap, log, memory, seeds, train_seeds
from lmjax.train.signals import StopRequest

CANNOT = {
    "policy": {"precision": "0: f32 | 5: bf16"},
    "telemetry": {"telemetry": {"every": 5}},
    "rewind": {"faults": {"non_finite": "rewind"}},
    "deterministic_reductions": {"deterministic_reductions": 2},
}


@pytest.mark.parametrize(("word", "changes"), CANNOT.items(), ids=list(CANNOT))
def test_what_cannot_be_trained_at_once_is_refused_before_anything_is_written(
    word: str, changes: dict[str, Any], tmp_path: Path
) -> None:
    config = tiny(tmp_path, **changes)
    with pytest.raises(CannotVmap, match=word):
        train_seeds(config, {0: tmp_path / "0", 1: tmp_path / "1"}, stop=StopRequest())
    assert not list(tmp_path.iterdir())


def test_a_plain_config_can_be(tmp_path: Path) -> None:
    assert seeds.reason_against(tiny(tmp_path, "mixed_f16")) is None
    skips = dataclasses.replace(tiny(tmp_path).faults, non_finite="skip")
    assert seeds.reason_against(tiny(tmp_path, faults=dataclasses.asdict(skips))) is None


def test_a_full_device_is_a_reason_and_other_errors_are_errors() -> None:
    full = "RESOURCE_EXHAUSTED: Out of memory while trying to allocate 8 bytes."
    with pytest.raises(CannotVmap, match="memory"), seeds._exhausted_memory_explained():
        raise jax.errors.JaxRuntimeError(full)
    with pytest.raises(jax.errors.JaxRuntimeError), seeds._exhausted_memory_explained():
        raise jax.errors.JaxRuntimeError("INTERNAL: something else")


def test_time_is_divided_among_the_runs_that_step_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    now = iter((100.0, 112.0, 200.0, 203.0))
    monkeypatch.setattr(log.time, "perf_counter", lambda: next(now))
    clock = log.Clock(10.0, runs=3)
    clock.pause()
    assert clock.seconds == 10 + 12 / 3
    clock.resume()
    clock.pause()
    assert clock.seconds == 14 + 3 / 3


class Device:
    """A device that says what it has, or does not."""

    def __init__(self, platform: str, statistics: dict[str, int] | None):
        self.platform, self._statistics = platform, statistics

    def memory_stats(self) -> dict[str, int] | None:
        return self._statistics


def test_free_memory_is_what_the_device_or_else_the_machine_has_left() -> None:
    statistics = {"bytes_limit": 80, "bytes_in_use": 30, "bytes_reserved": 1}
    assert memory.free_bytes(Device("gpu", statistics)) == 50
    assert memory.free_bytes(Device("gpu", None)) is None
    machine = memory.free_bytes(Device("cpu", None))
    assert machine is None or 2**20 < machine < 2**50
