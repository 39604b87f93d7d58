"""Token ids of several texts, which grow together by what is drawn for them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import jax.numpy as jnp
import numpy as np

from lmjax.checks import at_least
from lmjax.inference.reading import NOTHING, WINDOW, Reader, Rows, padded_length, programs_of
from lmjax.inference.run import TrainedModel
from lmjax.inference.sampling import NOT_FINITE, Sampler, Sampling
from lmjax.runs.config import Seed


@dataclass(frozen=True)
class Generation(Sampling):
    """How texts are continued."""

    tokens: Annotated[int, at_least(0)] = 200
    """Maximum number of tokens to generate."""
    stop: tuple[str, ...] = ()
    """Ends a text before this string, wherever it is completed; may be given several times."""
    seed: Seed = 0
    """Seed of the random draws, 0 to 2^64 - 1. The same seed gives the same text."""
    window: Annotated[int, at_least(1, most=WINDOW)] = 16
    """Tokens drawn between two looks at the text; changes no text."""

    def __post_init__(self) -> None:
        """Rejects values of another type or out of range, and empty stop strings (ValueError)."""
        super().__post_init__()
        if "" in self.stop:
            raise ValueError(
                "stop holds an empty string, which every text ends with; leave it out, or give "
                "tokens=0 for no text"
            )


class Growing:
    """Texts that grow by the tokens drawn for them, in windows; each is a row of one cache."""

    def __init__(
        self,
        model: TrainedModel,
        ids: Sequence[Sequence[int]],
        samplers: Sequence[Sampler],
        how: Generation,
    ):
        """Begins with `ids`, the tokens of each text with the start of its document."""
        self._model, self._how, self._samplers = model, how, samplers
        self._ids = [list(row) for row in ids]
        self._given = [len(row) for row in ids]
        self._programs = programs_of(model)
        self._params = self._programs.prepare(model.evaluated)
        self._positions = padded_length(max(self._given) + how.tokens, model.config.context)
        self._readers: list[Reader | None] = [None] * len(ids)
        self._cache = self._programs.start(len(ids), self._positions) if len(ids) > 1 else None
        self._keys = jnp.stack([sampler.key for sampler in samplers])
        self._open = np.ones(len(ids), bool)
        self._seen = np.zeros((len(ids), model.tokenizer.vocab_size), bool)
        for seen, row in zip(self._seen, self._ids, strict=True):
            seen[row[1:]] = True  # the start of the document is not text

    @property
    def unfinished(self) -> bool:
        """Whether tokens are still to be drawn for any text."""
        return bool(self._open.any())

    def finish(self, row: int) -> None:
        """Draws no more tokens for a text."""
        self._open[row] = False

    def drawn(self) -> list[list[int]]:
        """The next tokens of each text: up to a window, and one more where a text is read.

        The last token of a text may be the end of the document or `NOT_FINITE`.
        """
        new: list[list[int]] = [[] for _ in self._ids]
        for row, ids in enumerate(self._ids):
            reader = self._readers[row]
            if self._open[row] and (reader is None or len(ids) - reader.first > self._positions):
                new[row].append(self._draw_after_reading(row))
        if self.unfinished:
            tokens, self._cache = self._programs.draw(
                self._params,
                self._cache,
                self._rows(),
                self._how.limits,
                np.int32(self._how.window),
            )
            for row, found in enumerate(np.asarray(tokens).tolist()):
                own = [token for token in found if token != NOTHING]
                new[row] += own
                self._add(row, own)
        return new

    def _draw_after_reading(self, row: int) -> int:
        """Reads a text into the cache and draws a token."""
        ids, reader = self._ids[row], self._readers[row]
        if reader is None:
            own = {"positions": self._positions, "params": self._params}
            reader = self._readers[row] = Reader(self._model, len(ids), **own)
        logits = reader.logits(ids)
        if self._cache is None or len(self._ids) == 1:
            self._cache = reader.cache
        else:
            self._cache = self._programs.place(self._cache, reader.cache, np.int32(row))
        reader.forget()
        token = self._samplers[row].draw(logits, self._count(row), self._seen[row])
        self._add(row, [token])
        return token

    def _add(self, row: int, tokens: Sequence[int]) -> None:
        for token in tokens:
            if token in (NOT_FINITE, self._model.tokenizer.end_of_document):
                self.finish(row)
                return
            self._ids[row].append(token)
            self._seen[row, token] = True
        if self._count(row) >= self._how.tokens:
            self.finish(row)

    def _count(self, row: int) -> int:
        return len(self._ids[row]) - self._given[row]

    def _rows(self) -> Rows:
        """Where each text stands, for the program that continues them."""
        start = self._model.tokenizer.start_of_document
        windows = [
            ids[reader.first :] if reader else ids
            for ids, reader in zip(self._ids, self._readers, strict=True)
        ]
        starts = [
            max((i for i, token in enumerate(window) if token == start), default=0)
            for window in windows
        ]
        counts = np.asarray([self._count(row) for row in range(len(windows))], np.int32)
        return Rows(
            keys=self._keys,
            pending=np.asarray([window[-1] for window in windows], np.int32),
            length=np.asarray([len(window) - 1 for window in windows], np.int32),
            document=np.asarray(starts, np.int32),
            drawn=counts.astype(np.uint32),
            left=np.where(self._open, self._how.tokens - counts, 0).astype(np.int32),
            seen=self._seen,
        )
