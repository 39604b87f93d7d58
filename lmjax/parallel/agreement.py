"""What the processes of a run agree on: failures, facts about files, when to stop.

All processes must call these functions in the same order. A single-process run skips the
collectives. `distributed.py` starts the processes. Knows JAX, signals and errors.
"""

from __future__ import annotations

import contextlib
import hashlib
import signal
from collections.abc import Iterator

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding, PartitionSpec

from lmjax.console.signals import StopRequest
from lmjax.errors import InputError
from lmjax.parallel.sharding import Mesh
from lmjax.precision import exact

MESSAGE_BYTES = 1024


def is_first() -> bool:
    """Whether this process writes the files that are written once."""
    return jax.process_index() == 0


def from_first(value: int) -> int:
    """Broadcasts an integer from process 0. Processes may see a file system differently."""
    if jax.process_count() == 1:
        return value
    return int(multihost_utils.broadcast_one_to_all(np.int32(value)))


@contextlib.contextmanager
def failing_together() -> Iterator[None]:
    """A block without collectives: bad input in one process is raised in all.

    Raises:
      InputError: in processes whose block succeeded, the first failure of another process.
    """
    failure = None
    try:
        yield
    except ValueError as error:  # InputError and DataError among others
        if jax.process_count() == 1:
            raise
        failure = error
    if jax.process_count() == 1:
        return
    messages = _from_all("" if failure is None else str(failure) or "bad input")
    if failure is not None:
        raise failure
    for index, message in enumerate(messages):
        if message:
            raise InputError(f"process {index}: {message}")


def refuse_unequal(what: str, text: str) -> None:
    """Raises `InputError` in all processes unless they have the same value.

    Args:
      what: what the value is, for the message.
      text: the value as text.
    """
    if jax.process_count() == 1:
        return
    digests = _from_all(hashlib.sha256(text.encode(errors="backslashreplace")).hexdigest())
    others = [index for index, other in enumerate(digests) if other != digests[0]]
    if others:
        raise InputError(
            f"process {others[0]} has different {what} from process 0; start all processes with "
            "the same flags, on the same files"
        )


def _from_all(text: str) -> list[str]:
    """Gathers one text per process, cut at `MESSAGE_BYTES`, in process order."""
    mine = np.zeros(MESSAGE_BYTES, np.uint8)
    data = text.encode(errors="backslashreplace")[:MESSAGE_BYTES]
    mine[: len(data)] = np.frombuffer(data, np.uint8)
    rows = multihost_utils.process_allgather(mine)
    return [row.tobytes().rstrip(b"\0").decode(errors="ignore") for row in rows]


def whole(array: jax.Array | np.ndarray) -> np.ndarray:
    """Gathers the whole array in every process."""
    if not isinstance(array, jax.Array) or array.is_fully_addressable or array.is_fully_replicated:
        return np.asarray(array)
    return np.asarray(multihost_utils.process_allgather(array, tiled=True))


class AgreedStop:
    """A stop request that all processes obey at the same step.

    Each step is followed by a maximum over all devices of the signal number that their process
    received. It is fetched one step later, to keep the devices busy.
    """

    def __init__(self, stop: StopRequest, mesh: Mesh):
        self._stop = stop
        everywhere = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
        self._divided, self._devices = everywhere, mesh.size
        self._maximum = exact.jit(
            lambda numbers: numbers.max(), out_shardings=NamedSharding(mesh, PartitionSpec())
        )
        self._on_its_way: jax.Array | None = None

    def after_step(self) -> str | None:
        """The name of the signal if it is time to stop; call it once after each step."""
        if jax.process_count() == 1:
            return self._stop.received
        asked = self._on_its_way
        received = self._stop.received
        number = np.full(1, signal.Signals[received] if received else 0, np.int32)
        self._on_its_way = self._maximum(
            jax.make_array_from_callback((self._devices,), self._divided, lambda index: number)
        )
        return signal.Signals(int(asked)).name if asked is not None and int(asked) else None
