"""The benchmark of telemetry takes both programs in turn and says what they cost."""

from __future__ import annotations

import json
from typing import Any

import pytest

from experiments.benchmarks import telemetry_cost
from lmjax.precision import exact


@pytest.mark.long
def test_the_cost_is_that_of_a_watched_step_spread_over_all(
    tiny: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(exact.COMPILER_OPTIONS, "xla_backend_optimization_level", 0)
    monkeypatch.setattr(telemetry_cost.quickstart, "config", lambda: tiny(model={"layers": 1}))
    taken: list[bool] = []
    stepper = telemetry_cost.stepper

    def counted(config: Any, *, telemetry: bool) -> Any:
        run = stepper(config, telemetry=telemetry)
        return lambda steps: taken.append(telemetry) or run(steps)

    monkeypatch.setattr(telemetry_cost, "stepper", counted)
    telemetry_cost.main(["--rounds", "3", "--steps", "1", "--every", "5", "--json"])
    result = json.loads(capsys.readouterr().out)
    assert taken == [False, True, True, False, False, True]
    assert result["cost"]["median"] == (result["watched / plain"]["median"] - 1) / 5
    assert min(result["step_seconds"].values()) > 0


def test_bad_flags_end_with_code_2() -> None:
    with pytest.raises(SystemExit) as end:
        telemetry_cost.main(["--every", "0"])
    assert end.value.code == 2
