"""The errors of the data room: bad input, and a disk that fails. Imports nothing."""

from __future__ import annotations


class DataError(ValueError):
    """Bad input: the message says in one line what is wrong and what to do about it."""


class CacheFailed(RuntimeError):
    """The cache's disk is full or failing; the input is not at fault."""
