"""Rows of whole documents with a class each, padded at their end.

Where windows of running text do not stop, each document has a row of its own here. May import the
room's corpus.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from lmjax.data.corpus import Tokens

PADDING = 0
"""The id after the end of a document; no token attends to it."""


class DocumentRows:
    """The documents of a split, by position."""

    def __init__(self, tokens: Tokens, classes: Tokens, end_of_document: int):
        """Finds where documents end: at a token that no text encodes to."""
        ends = np.flatnonzero(np.asarray(tokens) == end_of_document) + 1
        self._tokens, self._classes = tokens, classes
        self._bounds = np.concatenate([[0], ends])

    def __len__(self) -> int:
        return len(self._bounds) - 1

    def batch(self, indices: npt.NDArray[np.int64], length: int) -> dict[str, np.ndarray]:
        """`inputs`, `int32[B, length]`, `lengths` and `classes`, `int32[B]`, of some documents."""
        bounds = zip(self._bounds[indices], self._bounds[indices + 1], strict=True)
        inputs, lengths = document_rows([self._tokens[a:b] for a, b in bounds], length)
        classes = self._classes[indices].astype(np.int32)
        return {"inputs": inputs, "lengths": lengths, "classes": classes}


def document_rows(
    documents: Sequence[npt.NDArray[Any]], length: int
) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int32]]:
    """Documents as rows, `int32[B, length]`, and how many tokens each row has, `int32[B]`.

    Of a longer document, the first quarter of a row holds its first tokens and the rest its last
    ones: what is said first and in the end tells the class best (Sun et al. 2019, section 5.3.1).
    """
    rows = np.full((len(documents), length), PADDING, np.int32)
    for row, document in zip(rows, documents, strict=True):
        head = length // 4 if len(document) > length else len(document)
        row[:head] = document[:head]
        if len(document) > length:
            row[head:] = document[len(document) - (length - head) :]
    lengths = np.minimum([len(document) for document in documents], length)
    return rows, lengths.astype(np.int32)
