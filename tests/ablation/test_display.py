"""What is shown while an ablation runs: a table in a terminal, lines elsewhere."""

from __future__ import annotations

import dataclasses
import math
import re
import time

import pytest

from lmjax.ablation import grid
from lmjax.ablation.display import Display
from lmjax.ablation.grid import Ablation, State
from lmjax.train import Config

BASE = Config(precision="f32", steps=100)


def ablation(seeds: tuple[int, ...] = (0, 1)) -> Ablation:
    """Two arms, one of which has a name that looks like markup."""
    return Ablation(
        name="two",
        question="Which?",
        base=BASE,
        arms={"f32": BASE, "[b]f16": dataclasses.replace(BASE, precision="mixed_f16")},
        varies=("precision",),
        control="f32",
        seeds=seeds,
    )


def states(chosen: Ablation, **by_cell: State) -> dict[str, State]:
    """The states of all cells; those that are not named (`f32_0`, `f16_1`) have not begun."""
    return {
        key: by_cell.get(f"{arm[-3:]}_{seed}", State("missing", math.nan, "", None))
        for arm, keys in grid.keys_by_arm(chosen).items()
        for seed, key in keys.items()
    }


FINISHED = State("finished", 1.25, "", 100)
FAILED = State("failed", math.nan, "it diverged", 40)
BEGUN = State("missing", math.nan, "", 30)


def shown(
    chosen: Ablation, capsys: pytest.CaptureFixture[str], *looks: dict[str, State]
) -> list[str]:
    """The lines of stderr after those looks, blank ones left out."""
    with Display(chosen) as display:
        for look in looks:
            display.show(look)
    text = re.sub("\x1b\\[[0-9;?]*[a-zA-Z]", "", capsys.readouterr().err)
    return [line.rstrip() for line in text.splitlines() if line.strip()]


def test_elsewhere_a_line_for_each_cell_that_ends(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = iter((0.0, 10.0, 20.0))
    monkeypatch.setattr(time, "monotonic", lambda: next(clock))
    chosen = ablation()
    assert shown(
        chosen,
        capsys,
        states(chosen, f32_0=FINISHED),
        states(chosen, f32_0=FINISHED, f16_0=FAILED),
        states(chosen, f32_0=FINISHED, f16_0=FAILED, f32_1=FINISHED),
    ) == [
        # One cell in 10 s, and two are left; then two cells in 20 s, and one.
        "2/4 cells  [b]f16 seed 0: failed: it diverged  0:00:20 left",
        "3/4 cells  f32 seed 1: 1.250  0:00:10 left",
    ]


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    """A terminal of 40 columns, in the first second."""
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "40")
    monkeypatch.setattr(time, "monotonic", lambda: 0.0)


@pytest.mark.usefixtures("terminal")
def test_in_a_terminal_a_table(capsys: pytest.CaptureFixture[str]) -> None:
    chosen = ablation()
    lines = shown(chosen, capsys, states(chosen, f32_0=FINISHED, f16_0=FAILED, f32_1=BEGUN))
    assert [line.split() for line in lines[-4:]] == [
        ["arm", "seed", "0", "seed", "1"],
        ["f32", "1.250", "30%"],
        ["[b]f16", "failed", "-"],
        ["2/4", "cells", "0:00:00"],
    ]


@pytest.mark.usefixtures("terminal")
def test_a_narrow_terminal_shows_the_last_seeds_and_counts_the_others(
    capsys: pytest.CaptureFixture[str],
) -> None:
    chosen = grid.add_seeds(ablation((0, 1, 2)), {"[b]f16": 7})
    arms = {**chosen.arms, "bf16": dataclasses.replace(BASE, precision="mixed_bf16")}
    chosen = dataclasses.replace(chosen, arms=arms)
    lines = shown(chosen, capsys, states(chosen, f32_0=FINISHED, f32_1=BEGUN, f32_8=BEGUN))
    assert max(map(len, lines)) <= 40
    assert [line.split() for line in lines[-5:-1]] == [
        ["arm", "ended", "before", "seed", "8", "seed", "9"],
        ["f32", "1/8", "30%", "-"],
        ["[b]f16", "0/8", "-", "-"],
        ["bf16", "0/3"],
    ]
