"""Out of memory: one line that says what helps, and a failure leaves the directory usable."""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from run_helpers import result, tiny

from lmjax.cli import common as cli
from lmjax.errors import OutOfMemory
from lmjax.train import train
from lmjax.train.exhaustion import asked_bytes, is_exhaustion, refuse_oversized

SAID = {
    "XLA on CPU": (
        RuntimeError(
            "INTERNAL: Error dispatching computation: Out of memory allocating 227 bytes."
        ),
        227,
    ),
    "XLA on GPU": (
        RuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 8.00GiB."),
        2**33,
    ),
    "XLA on TPU": (
        RuntimeError("RESOURCE_EXHAUSTED: Attempting to allocate 1.50M. That was not possible."),
        1.5e6,
    ),
    "numpy": (MemoryError("Unable to allocate 3.5 GiB for an array with shape (9,)"), 3.5 * 2**30),
    "Python": (MemoryError(), None),
    "C++": (RuntimeError("std::bad_alloc"), None),
}


@pytest.mark.parametrize("who", SAID)
def test_exhausted_memory_is_recognised(who: str) -> None:
    error, asked = SAID[who]
    assert is_exhaustion(error)
    assert asked_bytes(error) == asked


@pytest.mark.parametrize("error", [RuntimeError("INTERNAL: no"), ValueError("out of memory")])
def test_other_errors_are_not(error: Exception) -> None:
    assert not is_exhaustion(error)


PLACES = {
    "lmjax.train.start.create_state": "while making the initial parameters",
    "lmjax.train.loop._enter_phase": "while compiling the train step",
    "lmjax.train.loop._next_batch": "while training",
    "lmjax.train.loop.held_out_loss": "while evaluating",
    "lmjax.runs.checkpoint.Checkpoints.restore": "while restoring the checkpoint of step 20",
}


@pytest.mark.parametrize("place", PLACES)
def test_exhausted_memory_says_where_and_which_fields_help(
    place: str, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, workdir = tiny(home, evaluation={"every": 5}), tmp_path / "run"
    if place.endswith("restore"):
        train(config, workdir, stop_after=20, progress=False)

    def fail(*_: object, **__: object) -> None:
        raise copy.copy(SAID["XLA on CPU"][0])

    with monkeypatch.context() as patch:
        patch.setattr(place, fail)
        with pytest.raises(OutOfMemory) as error:
            train(config, workdir, progress=False)
    for words in (f"{PLACES[place]}: 227 bytes asked for", "available", "4 sequences of 16 tokens"):
        assert words in str(error.value)
    for flag in ("--batch-size", "--micro-batches 2", "--model.remat full", "--mesh.fsdp"):
        assert flag in str(error.value)
    assert "\n" not in str(error.value)


def test_the_corrected_batch_is_accepted_in_the_same_directory(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = tiny(home, batch_size=4096)
    monkeypatch.setattr("lmjax.train.exhaustion.free_bytes", lambda device: 2**20)
    with pytest.raises(OutOfMemory, match=r"before a step: .* asked for, 1 MiB available"):
        train(asked, tmp_path / "run", progress=False)
    monkeypatch.undo()
    corrected = dataclasses.replace(asked, batch_size=4, steps=2)
    assert train(corrected, tmp_path / "run", progress=False).result is not None
    assert result(tmp_path / "run")["tokens"] == 2 * 4 * 16


@pytest.mark.parametrize(("temporaries", "fits"), [(2**20, True), (2**60, False)])
def test_a_step_that_cannot_fit_is_refused_before_it_runs(
    temporaries: int, fits: bool, home: Path
) -> None:
    analysis = SimpleNamespace(temp_size_in_bytes=temporaries)
    program: Any = SimpleNamespace(memory_analysis=lambda: analysis)
    if fits:
        refuse_oversized(program, tiny(home))
        return
    with pytest.raises(OutOfMemory, match=r"asked for, .* available on this machine"):
        refuse_oversized(program, tiny(home))


@pytest.mark.parametrize("who", SAID)
def test_a_verb_ends_in_one_line(who: str, capsys: pytest.CaptureFixture[str]) -> None:
    from lmjax.console import stages

    def fail() -> int:
        with stages.stage("generating text"):
            raise copy.copy(SAID[who][0])

    assert cli.guarded(fail) == cli.FAILED
    out, err = capsys.readouterr()
    assert (out, len(err.splitlines())) == ("", 1)
    assert err.startswith("error: out of memory while generating text: ")
