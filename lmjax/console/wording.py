"""Wording shared by messages of all rooms. Depends on nothing else in lmjax."""

from __future__ import annotations


def counted(number: int, noun: str) -> str:
    """`1 seed`, `3 seeds`, `12,000 tokens`; for nouns whose plural is a plain s."""
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"
