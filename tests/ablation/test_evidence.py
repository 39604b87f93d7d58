"""Findings: how sentences about made-up runs come out, and what is said about them."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path

import pytest
from ablation_helpers import failed, finished, missing, write_run
from scipy import stats

from lmjax.ablation.evidence import (
    WORSE,
    Evidence,
    Finding,
    Margin,
    holds,
    last_row,
    mean_in_words,
    watched,
)
from lmjax.ablation.grid import Ablation
from lmjax.ablation.statistics import smallest_detectable
from lmjax.train import Config

BASE = (2.31, 2.26, 2.28, 2.30, 2.24)
"""Losses of the control, whose spread is many times that of the differences in these tests."""
NAN = "the loss was not finite"

Arm = Mapping[int, float | str | None]
"""By seed: by how much a run is worse than the control, why it failed, or None if it is missing."""


def evidence(*, control: Arm | None = None, **arms: Arm) -> Evidence:
    """Runs of `f32`, the control, and of other arms, that exist only as numbers."""
    ablation = Ablation(
        name="example",
        question="Does it matter?",
        base=Config(),
        arms={name: Config() for name in ("f32", *arms)},
        varies=(),
        control="f32",
        seeds=(0, 1, 2, 3, 4),
    )
    cells = []
    for arm, seeds in {"f32": control or dict.fromkeys(range(5), 0.0), **arms}.items():
        for seed, told in seeds.items():
            if told is None:
                cells.append(missing(arm, seed, Path()))
            elif isinstance(told, str):
                cells.append(failed(arm, seed, Path(), told))
            else:
                cells.append(finished(arm, seed, Path(), BASE[seed] + told))
    return Evidence(ablation, cells)


def seeds(*told: float | str | None) -> Arm:
    """Those of seeds 0, 1, ..."""
    return dict(enumerate(told))


def gap(at_least: float, *told: float | str | None, control: Arm | None = None) -> Finding:
    """The finding that an arm is worse by so much."""
    margin = Margin.at_least(at_least, "half of it was seen before")
    return evidence(control=control, arm=seeds(*told)).gap("a gap", "arm", margin)


def between(low: float, high: float, *told: float | str | None, control: Arm | None = None):
    """The finding that an arm minus its control is in a range."""
    margin = Margin(low, high, "it does not matter")
    return evidence(control=control, arm=seeds(*told)).between("a range", "arm", margin)


# --- Gaps ---


@pytest.mark.parametrize(
    ("at_least", "differences", "outcome"),
    [
        (0.08, (0.164, 0.166, 0.165), "confirmed"),
        (0.16, (0.164, 0.166, 0.165), "confirmed"),
        (0.17, (0.164, 0.166, 0.165), "refuted"),
        # The mean is above the gap, but the interval reaches below it; and the other way round.
        (0.15, (0.10, 0.20, 0.18), "undecided"),
        (0.17, (0.10, 0.20, 0.18), "undecided"),
        (0.02, (0.0004, -0.0002, 0.0001), "refuted"),
        # The mean exceeds -0.1 beyond doubt, but one seed was better than its control.
        (-0.1, (0.003, 0.002, -0.001), "undecided"),
        (0.1, (0.5,), "undecided"),
        (0.1, (-0.5,), "undecided"),
        (0.1, (None, None), "undecided"),
    ],
)
def test_a_gap(at_least, differences, outcome):
    assert gap(at_least, *differences).outcome == outcome


def test_a_gap_says_the_mean_its_interval_and_the_seeds():
    assert gap(0.08, 0.164, 0.166, 0.165).found == "+0.16500 ± 0.00169 (90% interval, 3 seeds)"
    assert gap(0.08, -0.164, -0.166, -0.165).found == "-0.16500 ± 0.00169 (90% interval, 3 seeds)"
    assert gap(0.08, 0.5).found == "+0.5 (1 seed)"
    assert gap(0.08, None, None).found == "no runs"


def test_two_seeds_are_marked_as_provisional():
    assert gap(0.08, 0.164, 0.166).found.endswith("(90% interval, only 2 seeds, provisional)")


@pytest.mark.parametrize("half_width", [0.0499, 0.0501])
def test_the_interval_that_is_shown_is_the_one_that_decides(half_width):
    """`+0.05 ± 0.0499` excludes 0 and `+0.05 ± 0.0501` does not: both kinds of findings agree."""
    sd = half_width * math.sqrt(3) / stats.t.isf(0.05, 2)
    told = [0.05 + sd * z for z in (-1.0, 0.0, 1.0)]
    expected = "confirmed" if half_width < 0.05 else "undecided"
    assert gap(0.0, *told).outcome == expected
    assert between(0.0, 1.0, *told).outcome == expected
    shown = re.match(r"\+([\d.]+) ± ([\d.]+) \(90%", between(0.0, 1.0, *told).found)
    assert float(shown[2]) == pytest.approx(half_width, rel=0.05)


def test_a_finding_says_its_margin_why_and_what_the_seeds_detect():
    finding = between(-0.005, 0.005, 0.001, -0.001, 0.0)
    assert (finding.about, finding.asked) == ("arm", "within ±0.005")
    assert finding.why == "it does not matter"
    size = smallest_detectable(0.001, 3, 0.1)
    assert finding.power == f"smallest detectable effect {size:.2g}"
    assert between(-0.005, 0.005, 0.001).power == ""
    assert gap(0.0, 0.001, 0.001).power == "no spread over seeds"
    assert [gap(0.08, 0.1).asked, str(WORSE), str(Margin(-0.005, 0.03, ""))] == [
        "above +0.08",
        "above 0",
        "-0.005 to +0.03",
    ]


@pytest.mark.parametrize(
    ("told", "outcome", "found"),
    [
        ((NAN, NAN), "confirmed", f"failed on 2 of 2 seeds: {NAN}"),
        ((NAN,), "undecided", f"failed on 1 of 1 seed: {NAN}"),
        ((0.164, 0.166, NAN), "confirmed", f"failed on 1 of 3 seeds: {NAN}; +0.1650 ± "),
        # What survived was no worse, but a failed run was, by any amount.
        ((0.0004, -0.0002, NAN), "undecided", f"failed on 1 of 3 seeds: {NAN}; +0.00010 ± "),
        ((NAN, None, NAN), "confirmed", f"failed on 2 of 2 seeds: {NAN}"),
    ],
)
def test_a_gap_of_an_arm_that_failed(told, outcome, found):
    finding = gap(0.08, *told)
    assert finding.outcome == outcome
    assert finding.found.startswith(found)


def test_where_the_control_failed_a_failure_says_nothing():
    broken = seeds(NAN, NAN, 0.0, 0.0)
    assert gap(0.08, NAN, NAN, control=broken)[:3] == ("a gap", "no runs", "undecided")
    assert gap(0.08, NAN, NAN, 0.164, 0.166, control=broken).found.endswith(
        "only 2 seeds, provisional)"
    )
    assert gap(0.08, NAN, NAN, 0.164, 0.166, control=broken).outcome == "confirmed"
    assert between(-1, 1, NAN, 0.0, 0.1, 0.1, control=broken).outcome == "confirmed"


def test_an_arm_can_be_compared_with_another_than_its_control():
    runs = evidence(worse=seeds(0.30, 0.31, 0.32), worst=seeds(0.50, 0.52, 0.51))
    finding = runs.gap("a gap", "worst", Margin.at_least(0.15, "so"), control="worse")
    assert (finding.outcome, finding.found[:6]) == ("confirmed", "+0.200")
    assert runs.differences("worst", "worse") == pytest.approx(seeds(0.20, 0.21, 0.19))
    same = Margin.within(0.25, "so")
    assert runs.between("parity", "worst", same, control="worse").outcome == "confirmed"


def test_differences_are_paired_by_seed():
    runs = evidence(control=seeds(0.0, 0.0, 0.0), arm={1: 0.1, 2: NAN, 4: 0.1, 0: None})
    assert runs.differences("arm") == pytest.approx({1: 0.1})
    assert list(runs.cells("arm")) == [1, 2, 4]


# --- Ranges ---


@pytest.mark.parametrize(
    ("low", "high", "differences", "outcome"),
    [
        (-0.005, 0.03, (0.019, 0.021, 0.020), "confirmed"),
        (-0.005, 0.005, (0.019, 0.021, 0.020), "refuted"),
        (0.03, 0.05, (0.019, 0.021, 0.020), "refuted"),
        (-0.005, 0.02, (0.019, 0.021, 0.020), "undecided"),
        (-0.005, 0.005, (0.001, -0.001, 0.0), "confirmed"),
        (-0.005, 0.005, (0.02, -0.02, 0.0), "undecided"),
        (-0.005, 0.005, (-0.019, -0.021, -0.020), "refuted"),
        (-0.005, 0.005, (0.0,), "undecided"),
        (-0.005, 0.005, (0.0, 0.0), "confirmed"),
        (-0.005, 0.005, (None,), "undecided"),
        (-0.005, 0.005, (0.001, -0.001, NAN), "refuted"),
        (-0.005, 0.005, (NAN, NAN), "refuted"),
        (-0.005, 0.005, (NAN,), "undecided"),
        (-0.005, math.inf, (0.019, 0.03, 0.020), "confirmed"),
        (-0.005, math.inf, (-0.019, -0.021, -0.020), "refuted"),
        (-0.005, math.inf, (0.02, -0.02, 0.0), "undecided"),
        (-0.005, math.inf, (0.001, 0.002, NAN), "confirmed"),
        (-0.005, math.inf, (-0.019, -0.021, NAN), "undecided"),
        (-0.005, math.inf, (NAN, NAN), "confirmed"),
        (-0.005, math.inf, (NAN,), "undecided"),
    ],
)
def test_a_range(low, high, differences, outcome):
    assert between(low, high, *differences).outcome == outcome


def test_failing_to_find_a_difference_is_not_parity():
    """These differ from 0 by less than their standard error, and might differ by 0.03."""
    assert between(-0.005, 0.005, 0.02, -0.01, -0.008).outcome == "undecided"


# --- Differences of differences ---


@pytest.mark.parametrize(
    ("factor", "outcome"),
    [(1.0, "confirmed"), (2.0, "confirmed"), (5.0, "undecided"), (8.0, "refuted")],
)
def test_one_difference_exceeds_another(factor, outcome):
    runs = evidence(arm=seeds(0.15, 0.17, 0.16), other=seeds(0.03, 0.04, 0.03))
    finding = runs.exceeds("more", "arm", "other", factor=factor)
    assert finding.outcome == outcome
    tested = [0.15 - factor * 0.03, 0.17 - factor * 0.04, 0.16 - factor * 0.03]
    times = "" if factor == 1 else f"{factor:g} times "
    assert finding.found == f"+0.16 against +0.03333; minus {times}that: {mean_in_words(tested)}"


def test_a_difference_that_one_seed_has_exceeds_nothing():
    runs = evidence(arm=seeds(0.15, 0.17, NAN), other=seeds(0.03, None, 0.03))
    finding = runs.exceeds("more", "arm", "other", factor=1.0)
    assert finding.outcome == "undecided"
    runs = evidence(arm=seeds(NAN, NAN), other=seeds(0.03, 0.03))
    assert runs.exceeds("more", "arm", "other", factor=1.0).found == "no runs"


# --- Exact sentences ---


@pytest.mark.parametrize(
    ("told", "outcome", "found"),
    [
        ((NAN, NAN), "confirmed", f"2 of 2 runs failed: {NAN}"),
        ((NAN,), "confirmed", f"1 of 1 run failed: {NAN}"),
        ((NAN, 0.1), "refuted", f"1 of 2 runs failed: {NAN}"),
        ((0.1, 0.1), "refuted", "0 of 2 runs failed"),
        ((None,), "undecided", "no runs"),
        (("it is nan; do this",), "confirmed", "1 of 1 run failed: it is nan"),
    ],
)
def test_all_runs_fail(told, outcome, found):
    runs = evidence(arm=seeds(*told))
    assert runs.failed("it fails", "arm") == Finding("it fails", found, outcome, "arm")


@pytest.mark.parametrize(
    ("arms", "most", "outcome", "found"),
    [
        (("low",), 0.2, "confirmed", "0.1"),
        (("low", "high"), 0.6, "confirmed", "0.1 to 0.5"),
        (("low", "high"), 0.2, "refuted", "0.1 to 0.5"),
        (("low", "broken"), 0.6, "refuted", f"1 of 4 runs failed: {NAN}; 0.1"),
        (("none",), 0.6, "undecided", "no runs"),
    ],
)
def test_in_every_run(arms, most, outcome, found):
    runs = evidence(
        low=seeds(0.1, 0.1), high=seeds(0.1, 0.5), broken=seeds(0.1, NAN), none=seeds(None)
    )

    def measure(cell):
        if cell.status == "failed":
            raise AssertionError("a failed run may have left nothing to measure")
        return cell.value - BASE[cell.seed]

    finding = runs.in_every_run("all are low", arms, measure, lambda value: value < most)
    assert finding == Finding("all are low", found, outcome)


def test_what_holds():
    assert holds("it is", "0.3", True) == Finding("it is", "0.3", "confirmed")
    assert holds("it is", "0.3", False) == Finding("it is", "0.3", "refuted")


# --- What runs left behind ---


def test_the_last_row_that_has_a_column(tmp_path):
    run = write_run(tmp_path, [2.5, 2.4], eval_loss=2.45, loss_scale=lambda step: 2.0**step)
    cell = finished("f32", 0, run, 2.45)
    assert last_row(cell, "eval_loss") == 2.45
    # The row of the evaluation, which comes last, does not have it.
    assert last_row(cell, "loss_scale") == 2.0**10
    with pytest.raises(KeyError, match="has underflow"):
        last_row(cell, "underflow")


def test_watched_rows(tmp_path):
    rows = [{"step": 200, "tensors": {}}, {"step": 400, "tensors": {"head/x": {"zero": 0.5}}}]
    (tmp_path / "telemetry.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert watched(finished("f32", 0, tmp_path, 2.45)) == rows
