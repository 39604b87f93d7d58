"""Text that grows token by token: whole characters, up to a stop string.

Knows nothing of models and tokenizers.
"""

from __future__ import annotations

import codecs
from collections.abc import Sequence


class GrowingText:
    """Characters of the bytes that tokens spell, given out as soon as they are certain.

    A character is given out once all its bytes are there, and not while it may be the beginning of
    a stop string. Bytes that are not UTF-8 become U+FFFD. The text ends before the first stop
    string that is complete; of several that are complete at the same character, the longest counts.

    Attributes:
      tokens: number of tokens so far, up to the one that completed a stop string.
      stopped_by: the stop string that ended the text; empty: none did.
      ended: whether the model ended the document.
    """

    def __init__(self, stop: Sequence[str] = ()):
        self.tokens = 0
        self.stopped_by = ""
        self.ended = False
        self._stop = stop
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._held = ""

    def add(self, data: bytes) -> str:
        """What became certain with one more token."""
        self.tokens += 1
        return self._given(self._decoder.decode(data))

    def end(self, *, document: bool) -> str:
        """The rest of the text.

        Args:
          document: whether the model ended the document; a character that it left incomplete is
            then U+FFFD. One cut off by a limit is dropped.
        """
        self.ended = document
        rest = self._given(self._decoder.decode(b"", final=True)) if document else ""
        if not self.stopped_by:
            rest, self._held = rest + self._held, ""
        return rest

    def _given(self, new: str) -> str:
        text, before = self._held + new, len(self._held)
        found = [
            (start + len(stop), start, stop)
            for stop in self._stop
            if (start := text.find(stop, max(before - len(stop) + 1, 0))) >= 0
        ]
        if found:
            _, start, self.stopped_by = min(found)
            return text[:start]
        longest = min(max(map(len, self._stop), default=1) - 1, len(text))
        held = next((n for n in range(longest, 0, -1) if self._may_begin(text[-n:])), 0)
        self._held = text[len(text) - held :]
        return text[: len(text) - held]

    def _may_begin(self, end: str) -> bool:
        return any(stop.startswith(end) for stop in self._stop)
