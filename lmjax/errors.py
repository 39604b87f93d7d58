"""Errors of a run, by who has to act on them. Depends on nothing else in lmjax."""

from __future__ import annotations


class InputError(ValueError):
    """Bad user input: nothing was written, and the message says what to do."""


class TrainingFailed(RuntimeError):
    """The run cannot continue: its gradients stay non-finite."""


class OutOfMemory(RuntimeError):
    """The machine or a device has too little memory for a run; the message says what helps."""


class NonFiniteGradients(TrainingFailed):
    """The limit of consecutive skipped steps was reached.

    Attributes:
      step: the last step whose metrics are known.
      skips: the number of consecutive skipped steps up to it.
    """

    def __init__(self, message: str, step: int, skips: int):
        super().__init__(message)
        self.step, self.skips = step, skips


class CheckpointError(RuntimeError):
    """A checkpoint is damaged or does not hold what the run needs."""


class StorageFailed(RuntimeError):
    """Writing failed: the disk is full or read-only, or an object store refused."""
