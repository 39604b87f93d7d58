"""Measures memory and time of a step by length of the context, and by what is computed again.

Command:   python -m experiments.benchmarks.context
Hardware:  any
Time:      5 minutes on 2 CPU cores
Expected:  memory grows with the context: twice the context takes twice the memory; every form of
           rematerialisation takes less memory than none, and more time

A row of random tokens as long as the context, in a model of 4 blocks of width 256, mixed_bf16.
Memory is what XLA allocates for a step beside the state; time is the median of the steps.
"""

from __future__ import annotations

import argparse
import dataclasses
import time
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from experiments.benchmarks import paired
from lmjax import strict_json
from lmjax.console import stages
from lmjax.console.tables import Column, print_table
from lmjax.model import ModelConfig
from lmjax.parallel import sharding
from lmjax.train import Config, create_state, make_train_step
from lmjax.train.memory import keep_freed_memory

MODEL = ModelConfig(vocab_size=8192, width=256, layers=4, heads=4)
CONTEXTS = (1024, 2048, 4096, 8192, 16384)
REMAT = ("none", "dots", "attention", "full", "offload")


class Row(NamedTuple):
    """One step.

    Attributes:
      context: tokens of its row.
      remat: what its backward pass computes again.
      mib: what XLA allocates beside the state, in MiB; None where the devices refuse.
      seconds: the median of its steps.
      loss: of the last step, in nats per token.
    """

    context: int
    remat: str
    mib: float | None
    seconds: float | None
    loss: float | None


def measured(context: int, remat: Any, steps: int) -> Row:
    """Compiles a step and takes it so many times."""
    if remat == "offload" and jax.default_backend() == "cpu":
        return Row(context, remat, None, None, None)
    model = dataclasses.replace(MODEL, max_positions=context, remat=remat)
    config = Config(steps=100, context=context, batch_size=1, precision="mixed_bf16", model=model)
    config = config.resolved()
    mesh = sharding.make_mesh(config.mesh)
    state, batch = create_state(config, mesh), paired.random_batch(config)
    step = make_train_step(config, mesh).lower(state, batch).compile()
    seconds = []
    for _ in range(steps):
        start = time.perf_counter()
        state, metrics = jax.block_until_ready(step(state, batch))
        seconds.append(time.perf_counter() - start)
    needs: Any = step.memory_analysis()
    mib = needs.temp_size_in_bytes / 2**20
    return Row(context, remat, mib, float(np.median(seconds)), float(metrics["loss"]))


def rows(contexts: Sequence[int], remat_at: int, steps: int) -> Iterator[Row]:
    """Each context without rematerialisation, and every rematerialisation at one of them."""
    yield from (measured(context, "none", steps) for context in contexts)
    if remat_at:
        yield from (measured(remat_at, name, steps) for name in REMAT)


def main(arguments: Sequence[str] | None = None) -> None:
    """Flags to a table on stdout."""
    stages.end(stages.IMPORTING)
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--longest", type=int, default=CONTEXTS[-1], help="tokens of a context")
    parser.add_argument("--shortest", type=int, default=CONTEXTS[0], help="tokens of a context")
    parser.add_argument(
        "--remat-at", type=int, default=4096, help="context of the second half; 0: none"
    )
    parser.add_argument("--steps", type=int, default=3, help="of each program")
    parser.add_argument("--json", action="store_true", help="print JSON")
    flags = parser.parse_args(arguments)
    keep_freed_memory()
    contexts = [c for c in CONTEXTS if flags.shortest <= c <= flags.longest]
    found = list(rows(contexts, flags.remat_at, max(flags.steps, 1)))
    if flags.json:
        print(strict_json.dumps([row._asdict() for row in found]))
        return
    columns = [Column("context", "key"), Column("remat")]
    columns += [Column(title, "number") for title in ("MiB", "seconds a step", "loss")]
    print_table(columns, [_words(row) for row in found])


def _words(row: Row) -> tuple[Any, ...]:
    if row.mib is None:
        return str(row.context), row.remat, "refused", "", ""
    return str(row.context), row.remat, f"{row.mib:.0f}", f"{row.seconds:.2f}", f"{row.loss:.3f}"


if __name__ == "__main__":
    main()
