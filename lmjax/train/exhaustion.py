"""Explains running out of memory in one line: requested and available bytes, and what helps.

On CPU the operating system kills a process that takes too much memory without a message, so a
compiled step that cannot fit is rejected before its first call.

Knows the config and how JAX, NumPy and C++ report exhausted memory.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Final

import jax

from lmjax.console import stages
from lmjax.errors import OutOfMemory
from lmjax.runs.config import Config
from lmjax.train.memory import free_bytes

EXHAUSTED: Final = re.compile(r"RESOURCE_EXHAUSTED|out of memory|std::bad_alloc", re.IGNORECASE)
ASKED: Final = re.compile(
    r"allocat\w*\s+(\d+(?:\.\d+)?)\s?([KMGT]?i?)(?:B|bytes)?\b", re.IGNORECASE
)
UNITS: Final = {"": 1, "k": 1e3, "m": 1e6, "g": 1e9, "t": 1e12} | {
    f"{letter}i": 2.0 ** (10 * power) for power, letter in enumerate("kmgt", start=1)
}


def is_exhaustion(error: BaseException) -> bool:
    """Whether an error reports exhausted memory, on any device."""
    if isinstance(error, OutOfMemory):
        return False
    return isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError) and EXHAUSTED.search(str(error)) is not None
    )


def asked_bytes(error: BaseException) -> int | None:
    """The number of bytes requested, if the error gives it."""
    found = ASKED.search(str(error))
    return None if found is None else int(float(found[1]) * UNITS[found[2].lower()])


def explained(error: BaseException) -> str:
    """An out-of-memory error in one line."""
    return _in_words(stages.stage_of(error) or "", asked_bytes(error))


@contextmanager
def exhaustion_explained(config: Config) -> Iterator[None]:
    """A block that trains; out-of-memory errors become `OutOfMemory` with advice."""
    try:
        yield
    except Exception as error:
        if not is_exhaustion(error):
            raise
        doing, asked = stages.stage_of(error) or "while training", asked_bytes(error)
        raise OutOfMemory(f"{_in_words(doing, asked)}. {_advice(config, asked)}") from error


def refuse_oversized(program: Any, config: Config) -> None:
    """Raises `OutOfMemory` for a compiled step that does not fit this machine's CPU devices.

    Accelerators report this themselves when the step runs.
    """
    devices = jax.local_devices()
    free, needs = free_bytes(devices[0]), program.memory_analysis()
    if devices[0].platform != "cpu" or free is None or needs is None:
        return
    asked = len(devices) * needs.temp_size_in_bytes
    if asked > free:
        raise OutOfMemory(f"{_in_words('before a step', asked)}. {_advice(config, asked)}")


def _in_words(doing: str, asked: int | None) -> str:
    device = jax.local_devices()[0]
    free = free_bytes(device)
    where = "this machine" if device.platform == "cpu" else f"a device ({device.device_kind})"
    needed = "" if asked is None else f"{_size(asked)} asked for"
    left = "" if free is None else f"{_size(free)} available on {where}"
    figures = ", ".join(filter(None, (needed, left)))
    return f"out of memory{' ' * bool(doing)}{doing}" + (f": {figures}" if figures else "")


def _advice(config: Config, asked: int | None) -> str:
    rows, parts = config.batch_size // config.micro_batches, _parts(config, asked)
    remat = (
        "" if config.model.remat == "full" else "keep fewer activations, with --model.remat full; "
    )
    split = "" if rows == 1 else f"split the same batch, with --micro-batches {parts} for example; "
    return (
        f"A micro-batch is {rows:,} sequences of {config.context:,} tokens. Lower --batch-size; "
        f"{split}{remat}or divide the run among more devices, with --mesh.fsdp. A directory in "
        "which no step was taken accepts the changed flags"
    )


def _parts(config: Config, asked: int | None) -> int:
    """Micro-batches that may fit: the next divisor of the batch, from requested and free bytes."""
    free = free_bytes(jax.local_devices()[0])
    ratio = 2.0 if asked is None or not free else max(1.5 * asked / free, 2.0)
    least = min(math.ceil(config.micro_batches * ratio), config.batch_size)
    divides = lambda parts: not config.batch_size % parts and not parts % config.micro_batches
    return next(filter(divides, range(least, config.batch_size + 1)), config.batch_size)


def _size(count: float) -> str:
    """Bytes in binary units, as operating systems count memory."""
    power = min(int(math.log(max(count, 1), 1024)), 4)
    unit = ("bytes", "KiB", "MiB", "GiB", "TiB")[power]
    return f"{count / 1024**power:,.4g} {unit}"
