"""Charts: what is drawn, and that they are safe and legible inside a page of any colours."""

from __future__ import annotations

import math
import re
import xml.etree.ElementTree as ET

import numpy as np
import pytest

from lmjax.ablation.curves import Series
from lmjax.ablation.pictures_plot import (
    COLORS,
    WIDTH,
    difference_range,
    forest,
    line_chart,
    look,
    robust_range,
)
from lmjax.ablation.report_data import ForestRow

NASTY = "a <b>&\"'</b> $x_1$ \\frac [bold] __init__ é 漢"


def line(name: str, y, color: int = 0, crosses=()) -> Series:
    y = np.asarray(y, np.float64)
    return Series(name, color, np.arange(1.0, y.size + 1), y, y - 0.1, y + 0.1, crosses)


def row(name: str, mean: float, half: float, failed: bool = False) -> ForestRow:
    points = (mean - half, mean + half) if math.isfinite(mean) else ()
    ends = (mean - half, mean + half) if math.isfinite(mean) else (-math.inf, math.inf)
    return ForestRow(name, 1, points, mean, ends, "note", failed)


def texts(svg: str) -> list[str]:
    return ["".join(t.itertext()) for t in ET.fromstring(svg).iter("text")]


def diamonds(svg: str) -> list[float]:
    """Where the means are: the markers that four lines of one size bound."""
    root = ET.fromstring(svg)
    shapes = {p.get("id"): p.get("d") for p in root.iter("path") if p.get("id")}
    four = {name for name, d in shapes.items() if d.count("L") == 3 and "C" not in d}
    uses = [u for u in root.iter("use") if u.get("href").removeprefix("#") in four]
    return [float(u.get("x")) for u in uses]


PICTURES = [
    lambda name: line_chart(name, [line(name, [3.0, 2.0, 2.5])], margin=0.1),
    lambda name: line_chart(name, [line(name, [1, 2**10, 2**15])], base_two=True),
    lambda name: forest(name, [row(name, 0.01, 0.002), row("b", 9.0, 0.1)], 0.005, "nats"),
]


@pytest.mark.parametrize("draw", PICTURES)
def test_a_picture_is_one_element_that_takes_its_colours_from_the_page(draw):
    svg = draw(NASTY)
    root = ET.fromstring(svg)
    assert root.tag == "svg"
    assert root.get("viewBox").split()[2] == str(WIDTH)
    assert {e.tag for e in root.iter()} <= {
        *("svg", "g", "path", "text", "tspan", "defs", "use", "clipPath", "rect"),
    }
    assert not re.search(r"#fedc|https?:|<style|<!|nan", svg)
    ids = [e.get("id") for e in root.iter() if e.get("id")]
    used = re.findall(r"url\(#(.*?)\)", svg) + re.findall(r'href="#(.*?)"', svg)
    assert set(used) <= set(ids)
    assert draw(NASTY) == svg, "the same picture is the same text"


def test_ids_of_two_pictures_do_not_meet():
    one, two = (line_chart(name, [line("a", [3.0, 2.0])]) for name in ("one", "two"))
    clips = [set(re.findall(r'<clipPath id="(.*?)"', svg)) for svg in (one, two)]
    assert clips[0]
    assert not clips[0] & clips[1]


def test_names_are_text_and_no_markup_or_mathematics():
    svg = forest("f", [row(NASTY, 0.01, 0.002)], 0.005, "nats")
    assert NASTY in texts(svg)


def test_a_long_name_is_shortened_beside_its_note():
    svg = forest("f", [row("n" * 90, 0.01, 0.002)], 0.005, "nats")
    assert any(text.endswith("n…") and len(text) < 70 for text in texts(svg))


def test_a_line_without_values_and_gaps_are_drawn_as_nothing():
    nothing = line("none", [math.nan] * 4)
    svg = line_chart("loss", [line("gap", [3.0, math.nan, 2.0, 2.5]), nothing])
    assert "nan" not in svg


def test_a_failed_run_ends_in_a_cross():
    without = line_chart("loss", [line("a", [3.0, 2.0, math.nan])])
    crossed = line_chart("loss", [line("a", [3.0, 2.0, math.nan], crosses=[(2.0, 2.0)])])
    assert crossed.count("<use") == without.count("<use") + 1


def test_powers_of_two_are_written_as_such():
    svg = line_chart("scale", [line("a", [2.0**10, 2.0**12])], base_two=True)
    assert "2^10" in texts(svg)


def test_ranges_show_most_of_healthy_lines():
    healthy = line("a", [9.0, *[2.0] * 99])
    low, high = robust_range([healthy, line("b", [80.0, 90.0], crosses=[(2, 90)])])
    assert low < 2.0 < high < 9.0
    assert robust_range([line("b", [80.0, 90.0], crosses=[(2, 90)])])[0] < 80
    low, high = difference_range(line("a", [0.001, -0.001]), 0.005)
    assert -low == high == pytest.approx(0.0075)


def test_forest_puts_worse_to_the_right_and_zero_in_the_middle():
    rows = [row("a", 0.01, 0.002), row("b", -0.01, 0.002), row("c", 0, 0)]
    svg = forest("f", rows, 0.005, "nats")
    right, left, middle = diamonds(svg)
    assert left < middle < right
    assert right - middle == pytest.approx(middle - left, rel=0.01)
    assert "difference (nats)" in texts(svg)


def test_forest_keeps_small_differences_visible_beside_a_huge_one():
    svg = forest("f", [row("a", 1.07, 0.01), row("b", 0.003, 0.001), row("c", 0, 0)], 0.005, "nats")
    huge, small, zero = diamonds(svg)
    assert any("logarithmic beyond the margin" in text for text in texts(svg))
    assert small - zero > 15
    assert huge <= WIDTH


def test_forest_marks_failed_arms_by_a_cross_and_arms_to_come_by_nothing():
    rows = [row("a", math.nan, math.nan), row("b", 0.1, 0.01)]
    coming = forest("f", rows, 0.005, "nats")
    assert len(diamonds(coming)) == 1
    failed = forest("f", [rows[0]._replace(failed=True), rows[1]], 0.005, "nats")
    assert failed.count("<use") == coming.count("<use") + 1


def test_arms_look_different_and_never_like_the_control():
    looks = [look(number) for number in range(3 * COLORS)]
    assert len(set(looks)) == len(looks)
    assert [color for color, _ in looks].count(0) == 1
