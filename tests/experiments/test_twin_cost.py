"""The benchmark of the twin takes it and both steps in turn."""

from __future__ import annotations

import json
from typing import Any

import pytest

from experiments.benchmarks import twin_cost
from lmjax.precision import exact


@pytest.mark.long
def test_the_cost_is_in_steps_of_both_policies(
    tiny: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(exact.COMPILER_OPTIONS, "xla_backend_optimization_level", 0)
    monkeypatch.setattr(twin_cost.quickstart, "config", lambda: tiny(model={"layers": 1}))
    twin_cost.main(["--rounds", "3", "--steps", "1", "--json"])
    result = json.loads(capsys.readouterr().out)
    assert set(result["seconds"]) == {"policy", "reference", "twin"}
    assert min(result["seconds"].values()) > 0
    assert result["twin / step under the policy"]["median"] > 0


def test_bad_flags_end_with_code_2() -> None:
    with pytest.raises(SystemExit) as end:
        twin_cost.main(["--rounds", "0"])
    assert end.value.code == 2
