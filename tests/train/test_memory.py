"""How much memory a device has left."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from lmjax.train import memory

FAULTS = """
import resource
from lmjax.train.memory import keep_freed_memory
keep_freed_memory()
import jax, jax.numpy as jnp

@jax.jit
def step(x):  # a temporary of 64 MiB, and a result of 32
    wide = jax.lax.optimization_barrier(jnp.concatenate([x, x + 1]))
    return (wide @ jnp.ones((8, 8), jnp.float32))[: len(x)]

x = jnp.zeros((2**20, 8), jnp.float32)
faults = []
for _ in range(8):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    x = jax.block_until_ready(step(x))
    faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
print(min(faults) * resource.getpagesize())
"""


BETWEEN = """
from pathlib import Path
from lmjax.train.memory import keep_freed_memory, return_freed_memory
keep_freed_memory()
import numpy as np
resident = lambda: int(Path("/proc/self/statm").read_text().split()[1]) * 4096
arrays = [np.ones(2**17) for _ in range(200)]  # 1 MiB each
last = np.ones(2**17)
del arrays
kept = resident()
return_freed_memory()
print(kept - resident(), last.sum())
"""


class Device:
    """A device that says what it has, or does not."""

    def __init__(self, platform: str, statistics: dict[str, int] | None):
        self.platform, self._statistics = platform, statistics

    def memory_stats(self) -> dict[str, int] | None:
        return self._statistics


def test_free_memory_is_what_the_device_or_else_the_machine_has_left() -> None:
    statistics = {"bytes_limit": 80, "bytes_in_use": 30, "bytes_reserved": 1}
    assert memory.free_bytes(Device("gpu", statistics)) == 50
    assert memory.free_bytes(Device("gpu", None)) is None
    machine = memory.free_bytes(Device("cpu", None))
    assert machine is None or 2**20 < machine < 2**50


@pytest.mark.skipif("CS_GNU_LIBC_VERSION" not in os.confstr_names, reason="needs glibc")
def test_a_repeated_program_finds_its_memory_as_it_left_it() -> None:
    tunables = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=0"}  # a fault for each page of 4 KiB
    command = [sys.executable, "-c", FAULTS]
    ran = subprocess.run(command, env=os.environ | tunables, capture_output=True, check=True)
    assert int(ran.stdout) < 2**22


@pytest.mark.skipif("CS_GNU_LIBC_VERSION" not in os.confstr_names, reason="needs glibc")
def test_freed_memory_below_what_is_used_is_returned() -> None:
    command = [sys.executable, "-c", BETWEEN]
    ran = subprocess.run(command, capture_output=True, check=True)
    assert int(ran.stdout.split()[0]) > 190 * 2**20
