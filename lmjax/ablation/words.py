"""Formats numbers, counts and names of metrics for reports and terminals.

Values have four significant digits; a difference has as many as its interval makes certain.

Knows `console/wording.py`; nothing of runs.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Iterable, Sequence

import numpy as np

from lmjax.console.wording import counted

FEWEST_SEEDS = 3
"""With fewer seeds, the data cannot test the normality that every interval assumes, and the sd is
little more than a guess, so results are marked as provisional."""


def seeds_in_words(number: int) -> str:
    """The number of seeds behind a difference, with a caution if they are too few."""
    few = 1 < number < FEWEST_SEEDS
    return f"only {counted(number, 'seed')}, provisional" if few else counted(number, "seed")


def significant(value: float) -> str:
    """A number to four significant digits; larger ones keep all their digits before the point."""
    if not math.isfinite(value):
        return str(value)
    if abs(value) >= 1000 or value == 0:
        return f"{value:,.0f}"
    text = f"{value:#.4g}"
    return text.rstrip(".") if "e" not in text else f"{value:.3e}"


def written(value: float, name: str = "") -> str:
    """A number in a table: shares as percentages, sizes in MB, large powers of two as such."""
    if not math.isfinite(value):
        return str(value)
    if "share" in name or "fraction" in name:
        return f"{100 * value:.4g}%"
    if "bytes" in name:
        return f"{significant(value / 1e6)} MB"
    if value >= 1024 and math.log2(value).is_integer():
        return f"2^{math.log2(value):.0f}"
    return f"{value:,.0f}" if value.is_integer() else significant(value)


def millions(count: float) -> str:
    """A large count, such as of parameters, in millions."""
    return f"{significant(count / 1e6)} million"


def span(values: Sequence[float], name: str = "") -> str:
    """The values of the seeds: their mean, and their range if they differ; ignores NaN."""
    there = [float(value) for value in values if not math.isnan(value)]
    if not there:
        return ""
    write = significant if name.endswith("loss") else functools.partial(written, name=name)
    low, high, mean = (write(f(there)) for f in (min, max, _mean))
    return mean if low == high else f"{mean} ({low} to {high})"


def _mean(values: Sequence[float]) -> float:
    return float(np.mean(values))


def title_of(name: str) -> str:
    """The display name of a metric: `skipped steps` for `skipped_steps`."""
    words = name.removesuffix("_bytes").replace("_", " ").replace("/", " / ")
    return "held-out loss" if name == "eval_loss" else words


def percent(share: float) -> str:
    """`95%`."""
    return f"{100 * share:g}%"


def ends(low: float, high: float) -> str:
    """Both ends of an interval with enough digits to tell them apart; empty for an infinite one."""
    length = high - low
    if not math.isfinite(length):
        return ""
    decimals = min(7, max(0, 2 - math.floor(math.log10(length)))) if length else 4
    return f"{low:+.{decimals}f} to {high:+.{decimals}f}"


def p_text(p: float) -> str:
    """A p value, formatted as in papers."""
    return f"{p:.3f}" if p >= 0.001 else "< 0.001"


def size(value: float) -> str:
    """A difference without sign, to two digits: an effect size is not known more precisely."""
    return f"{value:.2g}" if math.isfinite(value) else ""


def signed(mean: float, half_width: float) -> str:
    """A mean with its sign ± half of its interval; the bare mean where the interval is infinite."""
    if not math.isfinite(half_width):
        return f"{mean:+.4g}"
    if mean == half_width == 0:
        return "exactly 0"
    return ("-" if mean < 0 else "+") + plus_minus(abs(mean), half_width, digits=2)


def plus_minus(value: float, half_width: float, digits: int = 1) -> str:
    """`0.165 ± 0.004`: rounded to the digits that the interval makes certain.

    The half width keeps `digits` digits, one more if the first is a 1, and more where the rounded
    interval would reach zero although the exact one does not.
    """
    if half_width == 0:
        return f"{value:.3g} ± 0"
    if not math.isfinite(half_width):
        return f"{value:.3g} ± {half_width:g}"
    magnitude = math.floor(math.log10(half_width))
    decimals = digits - 1 - magnitude + (half_width < 2 * 10.0**magnitude)
    while abs(value) > half_width and round(abs(value), decimals) <= round(half_width, decimals):
        decimals += 1
    places = max(decimals, 0)
    return f"{round(value, decimals):.{places}f} ± {round(half_width, decimals):.{places}f}"


class Markdown(str):
    """Text that is already Markdown; any other string is escaped in a table."""


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """The lines of a table; each cell is one line, whatever its text."""
    line = lambda cells: "| " + " | ".join(_cell(cell) for cell in cells) + " |"
    return [line(header), "|" + " --- |" * len(header), *(line(row) for row in rows)]


def _cell(text: str) -> str:
    # Underscores inside words are not markup.
    escaped = text if isinstance(text, Markdown) else re.sub(r"([\\`*\[\]<|$])", r"\\\1", text)
    return " ".join(escaped.split())


def markdown_link(text: str, address: str) -> Markdown:
    """A link to an address that is already quoted."""
    return Markdown(f"[{_cell(text)}]({address})")
