"""The one error of the data room. Imports nothing."""

from __future__ import annotations


class DataError(ValueError):
    """Bad input: the message is one line that says what is wrong and what to do about it."""
