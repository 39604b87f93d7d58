"""Measures the cost of a fixed order of sums: steps with and without `deterministic_reductions`.

Command:   python -m experiments.benchmarks.fixed_order --rounds 12
Hardware:  any; the ratio below is of one device of 2 CPU cores
Time:      1 minute on 2 CPU cores
Expected:  fixed / free 1.11 (1.07 to 1.25, 96%)

The recipe is that of `experiments/quickstart.py`. In each round either program takes a few steps,
in turn; a ratio is that of the two times of a round. On one device it is the price of computing a
batch part by part; on several (`XLA_FLAGS=--xla_force_host_platform_device_count=8` makes a CPU
eight) also that of sending whole gradients, which CPU devices do through memory.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from experiments import quickstart
from experiments.benchmarks.paired import (
    Contestant,
    Ratio,
    paired_ratio,
    random_batch,
    stepper,
    take_turns,
)
from lmjax import strict_json
from lmjax.console import stages
from lmjax.parallel import sharding
from lmjax.train import Config, create_state, make_train_step
from lmjax.train.memory import keep_freed_memory


def contestant(config: Config) -> Contestant:
    """Takes steps of a config on its mesh."""
    mesh = sharding.make_mesh(config.mesh)
    batch = sharding.global_batch(mesh, random_batch(config), 1)
    return stepper(make_train_step(config, mesh), create_state(config, mesh), batch)


def report(config: Config, parts: int, rounds: int, steps: int) -> dict[str, Any]:
    """Measures, and sums up: what `--json` prints."""
    fixed = dataclasses.replace(config, deterministic_reductions=parts).resolved()
    contestants = {"free": contestant(config.resolved()), "fixed": contestant(fixed)}
    seconds = take_turns(contestants, rounds, steps)
    return {
        "parts": parts,
        "step_seconds": {name: float(np.median(values)) for name, values in seconds.items()},
        "fixed / free": paired_ratio(seconds["fixed"], seconds["free"])._asdict(),
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Flags to a report on stdout."""
    stages.end(stages.IMPORTING)
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--parts", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--steps", type=int, default=4, help="of each program in a round")
    parser.add_argument("--json", action="store_true", help="print JSON")
    flags = parser.parse_args(arguments)
    for name in ("parts", "rounds", "steps"):
        if getattr(flags, name) < 1:
            parser.error(f"{name} is {getattr(flags, name)}; it must be at least 1")
    keep_freed_memory()
    try:
        result = report(quickstart.config(), flags.parts, flags.rounds, flags.steps)
    except ValueError as error:
        parser.error(str(error))
    if flags.json:
        print(strict_json.dumps(result))
        return
    for name, seconds in result["step_seconds"].items():
        print(f"{name:8} {seconds * 1e3:8.1f} ms a step")
    print(f"fixed / free {Ratio(**result['fixed / free'])}")


if __name__ == "__main__":
    main()
