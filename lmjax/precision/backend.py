"""The kind of device that a program is for, which decides how its products are written.

A step is traced for the devices of its mesh, whether this machine has them or not
(`parallel.sharding.traced_for`); everything else for JAX's default device.

Knows only JAX.
"""

from __future__ import annotations

import contextlib
import contextvars
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax


class Backend(NamedTuple):
    """The properties of a device that decide which products are native.

    Attributes:
      platform: JAX name of the platform: `cpu`, `gpu`, `tpu`.
      capability: compute capability of an Nvidia GPU; zeros otherwise.
    """

    platform: str
    capability: tuple[int, int] = (0, 0)

    @classmethod
    def of(cls, device: Any) -> Backend:
        """That of a device, which may be one of a topology that is only compiled for."""
        found = re.fullmatch(r"(\d+)\.(\d+)", str(getattr(device, "compute_capability", "")))
        return cls(device.platform, (int(found[1]), int(found[2])) if found else (0, 0))


_PLANNED: contextvars.ContextVar[Backend | None] = contextvars.ContextVar("planned", default=None)


def this_backend() -> Backend:
    """The backend to write products for: the planned one, or that of JAX's default device."""
    return _PLANNED.get() or Backend.of(jax.devices()[0])


@contextlib.contextmanager
def planned_for(backend: Backend) -> Iterator[None]:
    """Traces products for a backend. Inside another such context, the outer one decides."""
    token = _PLANNED.set(_PLANNED.get() or backend)
    try:
        yield
    finally:
        _PLANNED.reset(token)
