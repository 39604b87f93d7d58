"""The errors of the data room: bad input, and a disk that fails. Imports nothing."""

from __future__ import annotations


class DataError(ValueError):
    """Bad input: the message is one line that says what is wrong and what to do about it."""


class CacheFailed(RuntimeError):
    """The disk of the cache is full or fails, though nothing is wrong with what was asked for."""
