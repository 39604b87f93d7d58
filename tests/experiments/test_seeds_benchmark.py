"""The benchmark of seeds takes all seeds at once and in turn, and says what the one costs."""

from __future__ import annotations

import json
from typing import Any

import pytest

from experiments.benchmarks import seeds
from lmjax.precision import exact


@pytest.mark.long
def test_both_ways_take_the_steps_of_every_seed(
    tiny: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(exact.COMPILER_OPTIONS, "xla_backend_optimization_level", 0)
    monkeypatch.setattr(seeds.char_shakespeare, "config", lambda: tiny(model={"layers": 1}))
    monkeypatch.setenv("PJRT_NPROC", "1")
    inputs: list[tuple[int, ...]] = []
    stepper = seeds.stepper

    def noted(step: Any, state: Any, batch: Any) -> Any:
        inputs.append(batch["inputs"].shape)
        return stepper(step, state, batch)

    monkeypatch.setattr(seeds, "stepper", noted)
    seeds.main(["--seeds", "3", "--rounds", "2", "--steps", "1", "--json"])
    result = json.loads(capsys.readouterr().out)
    assert inputs == [(3, 4, 16), (4, 16), (4, 16), (4, 16)]
    assert result["seeds"] == 3
    assert min(result["step_seconds"].values()) > 0
    ratio = result["in turn / at once"]
    assert 0 < ratio["low"] <= ratio["median"] <= ratio["high"]


def test_bad_flags_end_with_code_2() -> None:
    with pytest.raises(SystemExit) as end:
        seeds.main(["--seeds", "0"])
    assert end.value.code == 2
