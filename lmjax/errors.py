"""What can go wrong with a run, by whom it concerns. Knows nothing else of lmjax."""

from __future__ import annotations


class InputError(ValueError):
    """Bad input from the user: nothing was written, and the message says what to do."""


class TrainingFailed(RuntimeError):
    """The run cannot go on: its gradients stay non-finite."""


class OutOfMemory(RuntimeError):
    """The machine or a device has less memory than a run needs; the message says what helps."""


class NonFiniteGradients(TrainingFailed):
    """The limit of skipped steps in a row was reached.

    Attributes:
      step: the last step whose metrics are known.
      skips: how many steps up to it were skipped in a row.
    """

    def __init__(self, message: str, step: int, skips: int):
        super().__init__(message)
        self.step, self.skips = step, skips


class CheckpointError(RuntimeError):
    """A checkpoint is damaged, or does not hold what the run asks for."""


class StorageFailed(RuntimeError):
    """Something of the run could not be written: the disk is full or has become read-only, or an
    object store refuses.
    """
