"""The benchmark of fixed orders runs both programs and says what the one costs."""

from __future__ import annotations

import json
from typing import Any

import pytest

from experiments.benchmarks import fixed_order
from lmjax.precision import exact


@pytest.mark.long
def test_one_program_sums_in_order_and_the_other_does_not(
    tiny: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(exact.COMPILER_OPTIONS, "xla_backend_optimization_level", 0)
    monkeypatch.setattr(fixed_order.quickstart, "config", lambda: tiny(model={"layers": 1}))
    parts: list[int] = []
    contestant = fixed_order.contestant

    def noted(config: Any) -> Any:
        parts.append(config.deterministic_reductions)
        return contestant(config)

    monkeypatch.setattr(fixed_order, "contestant", noted)
    fixed_order.main(["--parts", "4", "--rounds", "2", "--steps", "1", "--json"])
    result = json.loads(capsys.readouterr().out)
    assert parts == [0, result["parts"]] == [0, 4]
    assert min(result["step_seconds"].values()) > 0
    ratio = result["fixed / free"]
    assert 0 < ratio["low"] <= ratio["median"] <= ratio["high"]


@pytest.mark.parametrize("flags", [["--rounds", "0"], ["--parts", "3"]])
def test_bad_flags_end_with_code_2(flags: list[str]) -> None:
    with pytest.raises(SystemExit) as end:
        fixed_order.main(flags)
    assert end.value.code == 2
