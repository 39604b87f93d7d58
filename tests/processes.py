"""A run in several processes, as tests start it: row 3 of step 7 overflows, in the last of them.

As a program, `python -m tests.processes HOME WORKDIR SECONDS` is one of the processes; it waits so
many seconds before each step, and prints the digest of the parameters as it has them itself.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import pytest
from run_helpers import start, tiny

STEPS, POISONED_STEP, POISON = 30, 7, 7


def config(home: Path) -> Any:
    """A run in which only the poison makes gradients non-finite."""
    return tiny(home, steps=STEPS, log_every=1, model={"tied": False}, evaluation={"every": 0})


def poison(patch: pytest.MonkeyPatch, seconds: float = 0.0) -> None:
    """Embeds a token that no text has as infinity, and puts it into a batch."""
    import jax

    from lmjax.train import loop, records, start

    take = loop._next_batch

    def take_with_poison(run: Any, step: int) -> Any:
        time.sleep(seconds)
        batch = take(run, step)
        if step == POISONED_STEP:
            tokens = batch["inputs"]
            put = jax.jit(lambda x: x.at[3].set(POISON), out_shardings=tokens.sharding)
            batch["inputs"] = put(tokens)
        return batch

    patch.setattr(start, "create_state", poisoned_state)
    patch.setattr(loop, "_next_batch", take_with_poison)
    patch.setattr(records, "draw_curves", lambda *_: None)


def poisoned_state(config: Any, mesh: Any) -> Any:
    """A state at step 0, drawn with numpy: nothing is compiled for it."""
    import jax
    import numpy as np

    from lmjax.precision import paths
    from lmjax.runs.resolved import phase_of
    from lmjax.runs.state import TrainState, optimizer_of
    from lmjax.train import abstract_state

    target = abstract_state(config, mesh)
    draw = np.random.default_rng(0)

    def one(keys: Any, leaf: Any) -> np.ndarray:
        value = draw.normal(0.0, 0.02, leaf.shape) + paths.path_string(keys).endswith("scale")
        return value.astype(leaf.dtype)

    params = jax.tree_util.tree_map_with_path(one, target.params)
    params["embed"]["table"][POISON] = np.inf
    key = np.asarray(jax.random.key_data(jax.random.key(0, impl="threefry2x32")))
    state = TrainState(
        np.int32(0), params, optimizer_of(phase_of(config)).init(params), {}, {}, key
    )

    def place(value: Any, leaf: Any) -> jax.Array:
        whole = np.asarray(value, leaf.dtype)
        return jax.make_array_from_callback(leaf.shape, leaf.sharding, lambda index: whole[index])

    return jax.tree.map(place, state, target)


def start_all(
    module: str, *arguments: str, processes: int, cwd: Path, **environment: str
) -> list[subprocess.Popen[str]]:
    """Starts a module in several processes, by the variables that torchrun sets."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    names = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port), "WORLD_SIZE": str(processes)}
    return [
        start(module, *arguments, cwd=cwd, RANK=str(rank), **names, **environment)
        for rank in range(processes)
    ]


def start_run(
    home: Path, workdir: Path, processes: int = 2, *, seconds: float = 0.0
) -> list[subprocess.Popen[str]]:
    """Starts or resumes the run in several processes."""
    arguments = (str(home), str(workdir), str(seconds))
    return start_all("tests.processes", *arguments, processes=processes, cwd=home)


def _main(home: Path, workdir: Path, seconds: float) -> int:
    from lmjax.parallel import distributed
    from lmjax.train import train

    assert distributed.start(distributed.DistributedConfig()) == (os.environ["WORLD_SIZE"] != "1")
    poison(pytest.MonkeyPatch(), seconds)
    outcome = train(config(home), workdir)
    if outcome.result is None:
        return 75
    print(outcome.result["parameters_sha256"])
    return 0


if __name__ == "__main__":
    from lmjax.cli.common import guarded

    sys.exit(guarded(lambda: _main(Path(sys.argv[1]), Path(sys.argv[2]), float(sys.argv[3]))))
