"""Token windows for training and validation. The only file that knows grain.

May import the room's corpus and errors.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import grain
import numpy as np
import numpy.typing as npt

from lmjax.data.corpus import TokenizedCorpus, Tokens
from lmjax.data.errors import DataError
from lmjax.data.rows import DocumentRows

Batch = dict[str, np.ndarray]


def train_iterator(
    corpus: TokenizedCorpus,
    *,
    length: int,
    batch_size: int,
    seed: int,
    document_mask: bool = False,
    process_index: int = 0,
    process_count: int = 1,
) -> grain.DatasetIterator[Batch]:
    """Endless training batches, reshuffled each epoch.

    The split is cut into windows of `length + 1` tokens at every `length`-th token, so an epoch
    predicts each token once, except the first and those after the last whole window. `seed`,
    `length`, `batch_size` and the corpus determine the content of global batch i. This process
    reads only its own rows: `process_index * b` and the next, with b = batch_size // process_count.

    Args:
      corpus: the tokens.
      length: tokens per sequence.
      batch_size: sequences per global batch.
      seed: of the order, in [0, 2**64). Grain hashes all its bits into the seed of its shuffle.
      document_mask: whether batches say where documents start.
      process_index: which host this is.
      process_count: how many hosts share a global batch.

    Returns:
      An iterator over `{"inputs": int32[b, length], "targets": int32[b, length]}` with
      `targets[:, t]` the token after `inputs[:, t]`, and with `document_mask` also
      `"document_starts": int32[b, length]`, of `inputs`; see `document_starts`. Its `get_state`
      counts global batches: the same JSON on every host, so `set_state` resumes exactly on any
      number of hosts. Documents with classes have a row each; see `DocumentRows.batch`.

    Raises:
      DataError: the batch does not divide among the hosts, or the split has no whole window.
    """
    rows = _host_rows(batch_size, process_index, process_count)
    end = corpus.tokenizer.start_of_document if document_mask else None
    documents = _documents(corpus, corpus.train, corpus.train_classes)
    windows = (corpus.train.size - 1) // length if documents is None else len(documents)
    if windows < 1:
        raise DataError(
            f"the training split has {corpus.train.size} tokens, fewer than one window of "
            f"{length + 1}: add text or shorten the sequence length"
        )

    def gather(indices: npt.NDArray[np.int64]) -> Batch:
        if documents is not None:
            return documents.batch(indices[rows], length)
        return _batch(_windows(corpus.train, indices[rows], length), end)

    order = grain.MapDataset.range(windows).seed(seed).shuffle().repeat()
    # Batch indices, not windows: a host reads only its own rows.
    batches = order.batch(batch_size, drop_remainder=True).map(gather)
    # Tokens are memory-mapped: threads would contend for the interpreter lock and hide nothing.
    return iter(batches.to_iter_dataset(grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)))


def validation_batches(
    corpus: TokenizedCorpus,
    *,
    length: int,
    batch_size: int,
    max_batches: int = 0,
    multiple: int = 1,
    document_mask: bool = False,
    process_index: int = 0,
    process_count: int = 1,
) -> Iterator[Batch]:
    """The validation split, each token predicted at most once, in order.

    With `max_batches=0` each token but the first is predicted exactly once. A smaller positive
    `max_batches` takes windows evenly spread over the split.

    Args:
      corpus: the tokens.
      length: tokens per sequence.
      batch_size: sequences per global batch.
      max_batches: maximum number of batches; 0 means all.
      multiple: pad each batch to a multiple of this many rows, as devices require.
      document_mask: whether batches say where documents start, as in `train_iterator`.
      process_index: which host this is; it gets the rows that `train_iterator` would give it.
      process_count: how many hosts share a global batch.

    Yields:
      `{"inputs": int32[b, length], "targets": int32[b, length], "weights": float32[b, length]}`,
      b = (batch_size, rounded up to the multiple) // process_count. Weight 0 marks padding: the end
      of the last window, rows that fill up the last batch, and rows beyond batch_size. The latter
      repeat the first row, so that formats whose factors rows share find no new values in them.
      Every other weight is 1. With `document_mask` also `document_starts`, as in `train_iterator`.
      Where documents have classes, `weights` are f32[b], beside what `DocumentRows.batch` has.

    Raises:
      DataError: the batch does not divide among the hosts.
    """
    padded = -(-batch_size // multiple) * multiple
    rows = _host_rows(padded, process_index, process_count)
    documents = _documents(corpus, corpus.validation, corpus.validation_classes)
    windows = -(-(corpus.validation.size - 1) // length) if documents is None else len(documents)
    limit = max_batches * batch_size if max_batches else windows
    chosen = np.arange(min(limit, windows), dtype=np.int64) * windows // min(limit, windows)
    end = corpus.tokenizer.start_of_document if document_mask else None
    if documents is not None:
        parts = (chosen[first : first + batch_size] for first in range(0, chosen.size, batch_size))
        return (_counted(documents, part, length, padded, rows) for part in parts)
    # A row past the end starts where no token remains to predict: all padding.
    beyond = -(-corpus.validation.size // length)
    filler = np.full(-chosen.size % batch_size, beyond, dtype=np.int64)
    batches = np.concatenate([chosen, filler]).reshape(-1, batch_size)
    return (_weighted(corpus.validation, batch, length, padded, rows, end) for batch in batches)


def document_starts(
    tokens: npt.NDArray[np.integer[Any]], start_of_document: int
) -> npt.NDArray[np.int32]:
    """Where the document of each token starts, for a document mask.

    Documents follow each other with an end-of-document token after each. As input, that token
    belongs to the next document: only that document's first token is predicted from it. A document
    in the middle of a window thus looks like a text that is scored or continued, which is also
    read after an end-of-document token.

    Args:
      tokens: windows of a stream of documents, `[B, T]`.
      start_of_document: the token before each document, if it has one, or else that after each.

    Returns:
      `int32[B, T]`: index in its row of the end-of-document token before each token, or of that
      token itself; 0 if the window starts in the middle of a document.
    """
    starts = np.where(tokens == start_of_document, np.arange(tokens.shape[1], dtype=np.int32), 0)
    return np.maximum.accumulate(starts, axis=1, dtype=np.int32)


def _documents(
    corpus: TokenizedCorpus, tokens: Tokens, classes: Tokens | None
) -> DocumentRows | None:
    """The documents of a split, if they have classes."""
    ends = corpus.tokenizer.end_of_document
    return None if classes is None else DocumentRows(tokens, classes, ends)


def _counted(
    documents: DocumentRows, indices: npt.NDArray[np.int64], length: int, padded: int, rows: slice
) -> Batch:
    """Some rows of a batch of documents, padded with copies of weight 0."""
    mine = np.concatenate([indices, np.full(padded - indices.size, indices[0])])[rows]
    weights = (np.arange(padded) < indices.size)[rows].astype(np.float32)
    return {**documents.batch(mine, length), "weights": weights}


def _weighted(
    tokens: Tokens,
    indices: npt.NDArray[np.int64],
    length: int,
    padded: int,
    rows: slice,
    end: int | None,
) -> Batch:
    """Some rows of a batch of the windows `indices`, padded with copies of weight 0."""
    copies = np.full(padded - indices.size, indices[0])
    mine = np.concatenate([indices, copies])[rows]
    counts = (np.arange(padded) < indices.size)[rows, None]
    positions = mine[:, None] * length + np.arange(1, length + 1)
    return {
        **_batch(_windows(tokens, mine, length), end),
        "weights": (counts & (positions < tokens.size)).astype(np.float32),
    }


def _host_rows(batch_size: int, process_index: int, process_count: int) -> slice:
    if batch_size < 1 or batch_size % process_count:
        raise DataError(
            f"batch_size {batch_size} does not divide among {process_count} hosts: use a multiple"
        )
    each = batch_size // process_count
    return slice(process_index * each, (process_index + 1) * each)


def _windows(tokens: Tokens, indices: npt.NDArray[np.int64], length: int) -> np.ndarray:
    """int32[rows, length + 1]: window i starts at token i * length; zeros past the end."""
    result = np.zeros((indices.size, length + 1), dtype=np.int32)
    for row, index in enumerate(indices):
        window = tokens[index * length : (index + 1) * length + 1]
        result[row, : window.size] = window
    return result


def _batch(windows: np.ndarray, end: int | None) -> Batch:
    """Inputs and targets, and document starts if their `end` token is given."""
    inputs, targets = windows[:, :-1], windows[:, 1:]
    batch = {"inputs": inputs, "targets": targets}
    return batch if end is None else {**batch, "document_starts": document_starts(inputs, end)}
