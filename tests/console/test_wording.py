"""Counts are plural where they should be."""

from __future__ import annotations

import pytest

from lmjax.console.wording import counted


@pytest.mark.parametrize(
    ("number", "text"), [(0, "0 seeds"), (1, "1 seed"), (2, "2 seeds"), (12_000, "12,000 seeds")]
)
def test_counts(number: int, text: str) -> None:
    assert counted(number, "seed") == text
