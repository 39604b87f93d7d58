"""Data positions of recent steps, for a run that may have to rewind.

Knows configs and the states of data iterators.
"""

from __future__ import annotations

from collections import deque
from typing import Any

from lmjax.runs.config import Config


class Positions:
    """Data positions of the last steps, as many as a rewind may need."""

    def __init__(self, config: Config):
        wanted = config.loss_scale.max_consecutive_skips + config.log_every + 2
        self._states: deque[tuple[int, Any]] = deque(
            maxlen=wanted if config.faults.non_finite == "rewind" else 0
        )

    def note(self, step: int, data: Any) -> None:
        """Records the state of the data iterator before it yields the batch of a step."""
        if self._states.maxlen:
            self._states.append((step, data.get_state()))

    def between(self, first: int, last: int) -> dict[int, Any]:
        """The recorded positions of steps `first` to `last`, by step."""
        return {step: state for step, state in self._states if first <= step <= last}

    def clear(self) -> None:
        """Clears all positions: the steps that follow have other batches."""
        self._states.clear()
