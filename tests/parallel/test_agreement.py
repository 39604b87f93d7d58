"""What two processes agree on, and that one process alone goes through no collective."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from processes import start_all
from run_helpers import finish

from lmjax.console.signals import StopRequest
from lmjax.errors import InputError
from lmjax.parallel import agreement, sharding


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each of two processes with two devices found; see `tests/agreeing.py`."""
    processes = start_all(
        "tests.agreeing",
        processes=2,
        cwd=tmp_path_factory.mktemp("agreeing"),
        XLA_FLAGS="--xla_force_host_platform_device_count=2",
    )
    ended = [finish(process) for process in processes]
    assert [code for code, _, _ in ended] == [0, 0], ended
    return [json.loads(out.splitlines()[-1]) for _, out, _ in ended]


def of(found: list[dict[str, Any]], name: str) -> list[Any]:
    """What the processes found, by process."""
    return [one[name] for one in found]


def test_what_the_first_one_sees_counts(found: list[dict[str, Any]]) -> None:
    assert of(found, "first") == [True, False]
    assert of(found, "from_first") == [10, 10]


def test_bad_input_of_one_is_bad_input_of_all(found: list[dict[str, Any]]) -> None:
    assert of(found, "no failure") == ["", ""]
    here = "ValueError: no such file"
    assert of(found, "failure in 0") == [here, "InputError: process 0: no such file"]
    assert of(found, "failure in 1") == ["InputError: process 1: no such file", here]


def test_what_must_be_equal_is_compared(found: list[dict[str, Any]]) -> None:
    assert of(found, "equal") == ["", ""]
    words = "process 1 has different flags from process 0"
    assert [words in text for text in of(found, "unequal")] == [True, True]


def test_a_signal_to_one_stops_all_after_the_same_step(found: list[dict[str, Any]]) -> None:
    assert of(found, "stopped") == [[4, "SIGTERM"]] * 2


def test_processes_hold_rows_as_the_mesh_divides_them(found: list[dict[str, Any]]) -> None:
    divided, same = [[0, 2], [1, 2]], [[0, 1], [0, 1]]
    shares = of(found, "shares")
    for name, expected in {
        "data": divided,
        "fsdp": divided,
        "data and tensor": divided,
        "tensor": same,
        "sequence": same,
    }.items():
        assert [share[name] for share in shares] == expected, name
    assert of(found, "gathered") == [[0, 1, 2, 3]] * 2


def test_alone_there_is_nobody_to_ask(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(agreement, "multihost_utils", None)
    monkeypatch.setattr(agreement.jax, "make_array_from_callback", None)
    assert agreement.from_first(3) == 3
    agreement.refuse_unequal("flags", "")
    with agreement.failing_together():
        pass
    with pytest.raises(InputError, match=r"^as it was$"), agreement.failing_together():
        raise InputError("as it was")
    stop = StopRequest()
    agreed = agreement.AgreedStop(stop, sharding.make_mesh(sharding.MeshConfig()))
    assert agreed.after_step() is None
    stop.received = "SIGINT"
    assert agreed.after_step() == "SIGINT"
