"""One of two processes that agree or fail to; `python -m tests.agreeing` prints what came of it."""

from __future__ import annotations

import json
import signal

import jax
import numpy as np

from lmjax.console.signals import StopRequest
from lmjax.errors import InputError
from lmjax.parallel import agreement, distributed, sharding


def failure(only_in: int) -> str:
    """What a process hears if one of them, or none (-1), gets bad input."""
    try:
        with agreement.failing_together():
            if jax.process_index() == only_in:
                raise ValueError("no such file")
    except ValueError as error:
        return f"{type(error).__name__}: {error}"
    return ""


def difference(text: str) -> str:
    """What a process hears about others that have another text."""
    try:
        agreement.refuse_unequal("flags", text)
    except InputError as error:
        return str(error)
    return ""


def stopped_after(mesh: sharding.Mesh) -> tuple[int, str | None]:
    """The step after which a process stops, if the last one gets a signal in step 3."""
    with StopRequest() as stop:
        agreed = agreement.AgreedStop(stop, mesh)
        for step in range(1, 9):
            if step == 3 and jax.process_index() == 1:
                signal.raise_signal(signal.SIGTERM)
            name = agreed.after_step()
            if name is not None:
                return step, name
    return 0, None


def shares() -> dict[str, tuple[int, int]]:
    """Which part of a batch this process holds on meshes of four devices."""
    sizes = {"data": (4, 1, 1, 1), "fsdp": (1, 4, 1, 1), "tensor": (1, 1, 4, 1)}
    sizes |= {"data and tensor": (2, 1, 2, 1), "sequence": (1, 1, 1, 4)}
    meshes = {name: sharding.make_mesh(sharding.MeshConfig(*size)) for name, size in sizes.items()}
    return {name: sharding.batch_share(mesh) for name, mesh in meshes.items()}


def gathered(mesh: sharding.Mesh) -> list[int]:
    """All of an array whose parts lie on devices of both processes."""
    rows = np.arange(2, dtype=np.int32)[:, None] + 2 * jax.process_index()
    batch = sharding.global_batch(mesh, {"inputs": rows}, 2)["inputs"]
    assert not batch.is_fully_addressable
    return agreement.whole(batch)[:, 0].tolist()


if __name__ == "__main__":
    distributed.start(distributed.DistributedConfig())
    everywhere = sharding.make_mesh(sharding.MeshConfig())
    index = jax.process_index()
    found = {
        "first": agreement.is_first(),
        "from_first": agreement.from_first(10 + index),
        "no failure": failure(-1),
        "failure in 0": failure(0),
        "failure in 1": failure(1),
        "equal": difference("x" * 5000),
        "unequal": difference("x" * 5000 + str(index)),
        "stopped": stopped_after(everywhere),
        "shares": shares(),
        "gathered": gathered(everywhere),
    }
    print(json.dumps(found))
