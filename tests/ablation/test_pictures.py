"""Pictures: where things are drawn, and that labels keep apart."""

from __future__ import annotations

import dataclasses
import math
import re
import xml.etree.ElementTree as ET

import numpy as np
import pytest

from lmjax.ablation.pictures import (
    ForestRow,
    Series,
    forest,
    full_range,
    line_chart,
    robust_range,
)
from lmjax.ablation.svg import WIDTH, color_classes


def line(name: str, y, color: int = 0, ended: bool = False) -> Series:
    y = np.asarray(y, np.float64)
    return Series(name, color, np.arange(1.0, y.size + 1), y, y - 0.1, y + 0.1, ended)


def texts(svg: str) -> dict[str, tuple[float, float]]:
    """Position of each text."""
    found = ET.fromstring(svg).iter("text")
    return {t.text: (float(t.get("x")), float(t.get("y"))) for t in found}


@pytest.mark.parametrize("end", [2.0, 2.5, 3.0])
def test_labels_of_lines_that_end_together_keep_apart_and_in_order(end):
    series = [line(f"arm {i}", [3.0, end + 1e-4 * i], i) for i in range(8)]
    placed = texts(line_chart("loss", series, y_range=(1.9, 3.1)))
    heights = [placed[f"arm {i}"][1] for i in range(8)]
    assert np.all(np.diff(heights) <= -11)  # the smallest value lowest
    assert all(0 < height < 250 for height in heights)


def test_more_labels_than_fit_are_spread_evenly_within_the_frame():
    series = [line(f"arm {i}", [3.0, 2.0], i) for i in range(30)]
    placed = texts(line_chart("loss", series, y_range=(1.9, 3.1)))
    heights = sorted(placed[f"arm {i}"][1] for i in range(30))
    assert heights[0] > 0
    assert heights[-1] < 250
    assert np.ptp(np.diff(heights)) < 0.2


def test_a_long_name_is_shortened_and_kept_whole_for_the_pointer():
    name = "weights in bf16, updates rounded stochastically, moments in f32"
    svg = line_chart("loss", [line(name, [3.0, 2.0])], y_range=(1.9, 3.1))
    (label,) = [t for t in ET.fromstring(svg).iter("text") if t.text.endswith("…")]
    assert label.find("title").text == name
    assert float(label.get("x")) < 0.7 * WIDTH


def test_gaps_are_not_bridged():
    svg = line_chart(
        "loss", [line("a", [1.0, 2.0, math.nan, 2.0, 1.0])], y_range=(0.0, 3.0), labels=False
    )
    (path,) = [p for p in ET.fromstring(svg).iter("path") if "line" in p.get("class")]
    assert path.get("d").count("M") == 2


def test_the_start_and_a_line_that_blew_up_do_not_rule_the_axis():
    calm = line("calm", [10.0, *np.linspace(3.0, 2.0, 60)])
    wild = line("wild", np.exp(np.arange(12.0)), ended=True)
    low, high = robust_range([calm, wild])
    assert 1.8 < low < 2.0 < 3.0 < high < 4.0
    assert robust_range([wild])[1] > 100
    assert full_range([calm, wild])[1] > math.exp(11)


def test_a_flat_line_gets_a_range():
    low, high = full_range([line("flat", [2.0, 2.0])])
    assert low < 2.0 < high
    low, high = full_range([line("zero", [0.0, 0.0])])
    assert low < 0.0 < high


def row(name: str, mean: float, half: float) -> ForestRow:
    points = () if math.isnan(mean) else (mean - half, mean + half)
    ends = (mean - half, mean + half)
    return ForestRow(name, 1, points, mean, ends, ends, "note")


def diamonds(svg: str) -> list[float]:
    marks = [p for p in ET.fromstring(svg).iter("path") if "mean" in p.get("class")]
    return [float(re.match(r"M([\d.]+)", p.get("d"))[1]) for p in marks]


def test_forest_puts_worse_to_the_right_and_zero_in_the_middle():
    svg = forest(
        "f", [row("a", 0.01, 0.002), row("b", -0.01, 0.002), row("c", 0, 0)], 0.005, "nats"
    )
    right, left, middle = diamonds(svg)
    assert left < middle == WIDTH / 2 < right
    assert right - middle == pytest.approx(middle - left)
    assert "logarithmic" not in svg


def test_forest_keeps_small_differences_visible_beside_a_huge_one():
    svg = forest("f", [row("a", 1.07, 0.01), row("b", 0.003, 0.001)], 0.005, "nats")
    huge, small = diamonds(svg)
    assert "logarithmic beyond the margin" in svg
    assert small - WIDTH / 2 > 15
    assert huge <= WIDTH - 12


def test_forest_marks_failed_arms_by_a_cross_and_arms_to_come_by_nothing():
    nothing = row("a", math.nan, math.nan)
    svg = forest("f", [nothing, row("b", 0.1, 0.01)], 0.005, "nats")
    assert len(diamonds(svg)) == 1
    assert svg.count('class="cross') == 0
    failed = dataclasses.replace(nothing, failed=True)
    svg = forest("f", [failed, row("b", 0.1, 0.01)], 0.005, "nats")
    assert svg.count('class="cross') == 1
    assert "nan" not in svg


def test_colours_beyond_the_palette_are_dashed_and_never_the_controls():
    classes = [color_classes(i) for i in range(13)]
    assert len(set(classes)) == 13
    assert classes[7] == "stroke1 dashed"
