"""The page and the table, from run directories in every state that an ablation can be in."""

from __future__ import annotations

import dataclasses
import math
import re
import xml.etree.ElementTree as ET
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote

import numpy as np
import pytest
from ablation_helpers import Ablation, Cell, failed, finished, missing, write_run

from lmjax.ablation import compare_cells, write_report
from lmjax.ablation.curves import curves, difference_curve
from lmjax.ablation.report_data import gather

SEEDS = (0, 1, 2)
LONG = "the gradients of the last 100 steps were not finite <at> loss scale 1"


@pytest.fixture
def ablation(tiny) -> Ablation:
    base = tiny("f32")
    return Ablation(
        {
            "f32": base,
            "bf16": dataclasses.replace(base, precision="p=f32,c=bf16,o=f32"),
            "raw & f16": dataclasses.replace(base, precision="p=f32,c=f16,o=f32"),
        }
    )


def falling(seed: int, offset: float = 0.0) -> np.ndarray:
    """Twenty training losses; seeds and arms shift them."""
    return 2 + np.exp(-np.arange(20) / 5) + 0.1 * seed + offset


def three_arms(folder: Path) -> list[Cell]:
    """f32; bf16, worse by 0.1 to 0.102; raw f16, not finite from step 55 on at every seed."""
    cells = []
    for seed in SEEDS:
        run = write_run(folder / f"f32-{seed}", falling(seed), eval_loss=2.0 + 0.1 * seed)
        cells.append(finished("f32", seed, run, 2.0 + 0.1 * seed))
        value = 2.1 + 0.101 * seed
        run = write_run(folder / f"bf16-{seed}", falling(seed, 0.1), eval_loss=value)
        cells.append(finished("bf16", seed, run, value))
        losses = falling(seed, 0.3)
        losses[10:] = math.nan
        run = write_run(
            folder / f"f16 {seed}",
            losses,
            skipped_steps=lambda step: max(0, step - 50),
            zero_gradient_share=0.25,
        )
        cells.append(failed("raw & f16", seed, run, LONG))
    return cells


class Page(HTMLParser):
    """Addresses, tags and text of a page, and whether every tag is closed."""

    VOID = frozenset(("meta", "link", "br"))

    def __init__(self, text: str):
        super().__init__()
        self.addresses: list[str] = []
        self.tags: list[str] = []
        self.text = ""
        self._open: list[str] = []
        self.feed(text)
        self.close()
        assert not self._open

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.addresses += [value for name, value in attrs if name in ("href", "src")]
        if tag not in self.VOID:
            self._open.append(tag)
        names = [name for name, _ in attrs]
        assert not [name for name in names if name.startswith("on")]

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)

    def handle_endtag(self, tag):
        assert self._open.pop() == tag

    def handle_data(self, data):
        self.text += data + "\n"


def pages(ablation: Ablation, cells: list[Cell], folder: Path, **options) -> tuple[Page, str]:
    path = write_report(ablation, cells, folder / "report", **options)
    text = path.read_text("utf-8")
    for svg in re.findall(r"<svg.*?</svg>", text, re.DOTALL):
        ET.fromstring(svg)
        assert "nan" not in re.sub(r">[^<]*<", "><", svg)
    return Page(text), (folder / "report" / "report.md").read_text("utf-8")


def test_both_files_say_the_question_and_every_verdict(ablation, tmp_path):
    page, table = pages(ablation, three_arms(tmp_path), tmp_path)
    for text in (page.text, table):
        assert ablation.question in text
        assert "worse by 0.101 ± 0.004 nats (3 seeds)" in text
        assert f"failed on 3 of 3 seeds: {LONG}" in text.replace("\\<", "<")


def test_page_needs_nothing_but_itself_and_links_to_every_run(ablation, tmp_path):
    cells = three_arms(tmp_path)
    page, table = pages(ablation, cells, tmp_path)
    assert not {"script", "img", "iframe", "object"} & set(page.tags)
    outside = [a for a in page.addresses if a != "data:,"]
    folder = tmp_path / "report"
    assert not any(Path(address).is_absolute() for address in outside)
    assert all((folder / unquote(address)).exists() for address in outside)
    linked = {(folder / unquote(address)).resolve() for address in outside}
    assert {cell.directory.resolve() for cell in cells} <= linked
    in_table = re.findall(r"\]\((.*?)\)", table)
    assert {(folder / unquote(a)).resolve() for a in in_table} == {
        cell.directory.resolve() for cell in cells
    }
    assert not re.search(r"https?:|url\((?!#)", (folder / "report.html").read_text())


def test_the_same_files_give_the_same_page(ablation, tmp_path):
    cells = three_arms(tmp_path)
    first = write_report(ablation, cells, tmp_path / "report").read_bytes()
    assert write_report(ablation, cells[::-1], tmp_path / "report").read_bytes() == first


def test_page_shows_setup_mechanism_speed_and_environment(ablation, tmp_path):
    cells = three_arms(tmp_path)
    write_run(cells[0].directory, falling(0), mfu=0.25, peak_memory_bytes=123_456_789)
    page, _ = pages(ablation, cells, tmp_path)
    mechanism = page.text[page.text.index("Mechanism") : page.text.index("Set-up")]
    assert not re.search("mfu|peak", mechanism)
    for words in ("of the peak FLOP/s", "25%", "peak memory", "123.5 MB"):
        assert words in page.text[page.text.index("Speed and memory") :]
    assert "p=f32,c=bf16,o=f32" in page.text
    assert "optimizer.learning_rate" in page.text
    assert "zero gradient share" in page.text
    assert "25%" in page.text
    assert "state in memory" in page.text
    assert re.search(r"\d MB", page.text)
    assert "packages.jax" in page.text
    assert "1,052" in page.text  # the median of 1005, 1010, ... 1100, halves to even


def test_a_counter_that_overflowed_is_shown_as_infinite(ablation, tmp_path):
    cells = three_arms(tmp_path)
    write_run(cells[0].directory, falling(0), largest_logit=math.inf)
    page, _ = pages(ablation, cells, tmp_path)
    assert "largest logit" in page.text
    assert "\ninf\n" in page.text


def test_counters_that_no_run_logged_are_left_out(ablation, tmp_path):
    cells = [c for c in three_arms(tmp_path) if c.arm != "raw & f16"]
    page, _ = pages(ablation, cells, tmp_path)
    assert "Mechanism" not in page.text


def test_runs_on_different_machines_are_pointed_out(ablation, tmp_path):
    cells = three_arms(tmp_path)
    assert "The runs differ in" not in pages(ablation, cells, tmp_path)[0].text
    write_run(cells[0].directory, falling(0), environment={"python": "3.12"})
    assert "The runs differ in python" in pages(ablation, cells, tmp_path)[0].text


def test_one_seed_claims_nothing(ablation, tmp_path):
    page, table = pages(ablation, [c for c in three_arms(tmp_path) if c.seed == 0], tmp_path)
    assert "undecided: needs about 3 seeds" in table
    assert "worse by" not in page.text + table
    assert "equivalent within" not in page.text + table


def test_an_interrupted_ablation_is_reported_as_far_as_it_is(ablation, tmp_path):
    cells = three_arms(tmp_path)
    cells[1] = missing("bf16", 0, tmp_path / "nowhere")
    comparison = compare_cells(ablation, cells)["bf16"]
    assert list(comparison.differences) == [1, 2]
    page, table = pages(ablation, cells, tmp_path)
    assert "| bf16 | 0 | missing |  |  |" in table
    assert "missing" in page.text


@pytest.mark.parametrize("cells", ["all missing", "none"])
def test_before_the_first_run_there_is_a_page_already(cells, ablation, tmp_path):
    absent = [missing(arm, s, tmp_path / f"{arm}-{s}") for arm in ablation.arms for s in SEEDS]
    page, _ = pages(ablation, absent if cells == "all missing" else [], tmp_path)
    assert page.text.count("undecided: needs about 3 seeds") == 2


def test_a_run_that_diverged_draws_its_curve_to_a_cross_and_is_named(ablation, tmp_path):
    report = gather(ablation, three_arms(tmp_path))
    drawn = {series.name: series for series in curves(report.arms, "loss")}
    assert np.isfinite(drawn["bf16"].y).all()
    assert not drawn["bf16"].crosses
    broken = drawn["raw & f16"]
    assert [x for x, _ in broken.crosses] == [50.0] * 3
    assert broken.crosses[0][1] == pytest.approx(falling(0, 0.3)[9])
    assert np.isfinite(broken.y[broken.x <= 50]).all()
    assert np.isnan(broken.y[broken.x > 50]).all()
    page, _ = pages(ablation, three_arms(tmp_path), tmp_path)
    assert "✕ failed on 3 of 3 seeds" in page.text


def test_one_seed_that_diverged_beside_others_has_a_cross_of_its_own(ablation, tmp_path):
    cells = three_arms(tmp_path)
    losses = falling(1, 0.1)
    losses[4:] = math.nan
    write_run(tmp_path / "bf16-1", losses)
    number = next(i for i, cell in enumerate(cells) if (cell.arm, cell.seed) == ("bf16", 1))
    cells[number] = failed("bf16", 1, tmp_path / "bf16-1", "diverged")
    bf16 = curves(gather(ablation, cells).arms, "loss")[1]
    assert bf16.crosses == [(20.0, pytest.approx(losses[3]))]
    assert np.isfinite(bf16.y).all()
    assert "✕ failed on 1 of 3 seeds" in pages(ablation, cells, tmp_path)[0].text


NASTY = "a <script>alert(1)</script> {{ 7 * 7 }} $x_1$ [b](c) \"'& é"


def test_names_of_any_characters_are_text_on_the_page_and_in_markdown(ablation, tmp_path):
    arms = dict(zip(["f32", NASTY, "raw & f16"], ablation.arms.values(), strict=True))
    named = dataclasses.replace(ablation, arms=arms, question=NASTY, name="<i>")
    cells = [c._replace(arm=NASTY) if c.arm == "bf16" else c for c in three_arms(tmp_path)]
    page, table = pages(named, cells, tmp_path)
    assert not {"script", "i"} & set(page.tags)
    assert page.text.count(NASTY) > 5
    assert "| a \\<script>alert(1)\\</script>" in table
    assert "\\[b\\](c)" in table


def test_numbers_have_four_significant_digits(ablation, tmp_path):
    cells = [c._replace(value=c.value / 3) if c.status == "finished" else c
             for c in three_arms(tmp_path)]  # fmt: skip
    page, table = pages(ablation, cells, tmp_path)
    assert "0.7333" in page.text
    assert "0.7333 |" in table
    assert "0.73333" not in page.text + table


def test_the_page_can_be_named(ablation, tmp_path):
    path = write_report(ablation, three_arms(tmp_path), tmp_path / "new" / "mine.html")
    assert path == tmp_path / "new" / "mine.html"
    assert sorted(p.name for p in path.parent.iterdir()) == ["mine.html", "mine.md"]


def test_a_seed_that_diverges_leaves_the_mean_of_the_others(ablation, tmp_path):
    cells = three_arms(tmp_path)
    losses = falling(1, 0.1)
    losses[10:] = math.inf
    write_run(tmp_path / "bf16-1", losses)
    bf16 = curves(gather(ablation, cells).arms, "loss")[1]
    before, after = falling(0, 0.1)[:10] + 0.1, falling(0, 0.1)[10:] + 0.1
    np.testing.assert_allclose(bf16.y, [*before, *after])
    np.testing.assert_allclose(bf16.low, falling(0, 0.1))
    np.testing.assert_allclose(bf16.high, falling(2, 0.1))


def test_difference_curves_pair_by_seed_and_step(ablation, tmp_path):
    cells = three_arms(tmp_path)
    shifts = (0.1, 0.12, 0.08)
    for seed, shift in enumerate(shifts):
        write_run(tmp_path / f"bf16-{seed}", falling(seed, shift))
    control, bf16, _ = gather(ablation, cells).arms
    series = difference_curve(bf16, control, "loss")
    half = 4.302652729749464 * np.std(shifts, ddof=1) / math.sqrt(3)
    np.testing.assert_allclose(series.y, 0.1)
    np.testing.assert_allclose(series.high - series.y, half)
    np.testing.assert_allclose(series.y - series.low, half)


def test_long_runs_are_averaged_in_stretches(ablation, tmp_path):
    cells = three_arms(tmp_path)
    losses = np.linspace(3.0, 2.0, 600)
    for cell in cells:
        write_run(cell.directory, losses)
    series = curves(gather(ablation, cells).arms, "loss")[0]
    np.testing.assert_allclose(series.y, losses.reshape(60, 10).mean(axis=1))
    np.testing.assert_allclose(series.x, 5 * np.arange(10, 601, 10))


def test_an_arm_may_have_a_control_of_its_own(ablation, tmp_path):
    own = dataclasses.replace(ablation, controls={"raw & f16": "bf16"})
    arms = gather(own, three_arms(tmp_path)).arms
    assert [arm.control for arm in arms] == [None, "f32", "bf16"]
    assert arms[2].changes == {"precision": ("p=f32,c=bf16,o=f32", "p=f32,c=f16,o=f32")} | {
        "loss_scale.kind": ("none", "dynamic")
    }


def test_a_finished_run_without_a_finite_value_counts_as_failed(ablation, tmp_path):
    cells = three_arms(tmp_path)
    cells[1] = cells[1]._replace(value=math.nan)
    verdict = compare_cells(ablation, cells)["bf16"].verdict
    assert verdict.text.startswith("failed on 1 of 3 seeds: its value is nan; on the other 2:")


def test_sequential_ablations_say_so(ablation, tmp_path):
    cells = three_arms(tmp_path)
    assert "anytime-valid" not in pages(ablation, cells, tmp_path)[0].text
    page, _ = pages(ablation, cells, tmp_path, monitoring="anytime")
    assert "anytime-valid" in page.text
