"""Seeds of an arm trained in one program beside the same seeds one after another, paired.

Command:   python -m experiments.benchmarks.seeds --rounds 12
Hardware:  any; the ratio below is of one XLA thread on 2 CPU cores
Time:      4 minutes on cores that others used as well; 2 minutes of CPU time
Expected:  in turn / at once 0.74 (0.70 to 0.94, 96%): on CPU, one after another is faster

The recipe is that of `experiments/char_shakespeare.py`. In each round the seeds take a few steps at
once, in a program that is `jax.vmap` of the step (see `lmjax/train/seeds.py`), and the same number
one after another in the program of one seed. A ratio is that of the two times of a round: above 1,
seeds at once are faster, as one would expect of an accelerator that a small model leaves idle,
which was not measured. Neither compiling nor evaluation is timed; both ways compile one program.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from experiments import char_shakespeare
from experiments.benchmarks.paired import (
    Contestant,
    Ratio,
    paired_ratio,
    random_batch,
    stepper,
    take_turns,
)
from lmjax import sharding
from lmjax.train import Config, create_state, make_train_step
from lmjax.train.memory import keep_freed_memory
from lmjax.train.seeds import make_vmapped_step, stacked


def at_once(config: Config, seeds: int) -> Contestant:
    """The contestant that takes a step of all seeds in one program."""
    mesh = sharding.make_mesh(config.mesh)
    state = stacked([_state(config, seed, mesh) for seed in range(seeds)], mesh)
    batches = (random_batch(config, seed) for seed in range(seeds))
    batch = jax.tree.map(lambda *rows: np.stack(rows), *batches)
    return stepper(make_vmapped_step(config, mesh), state, batch)


def in_turn(config: Config, seeds: int) -> Contestant:
    """The contestant that takes all steps of one seed before those of the next."""
    mesh = sharding.make_mesh(config.mesh)
    step = make_train_step(config, mesh)
    each = [
        stepper(step, _state(config, seed, mesh), random_batch(config, seed))
        for seed in range(seeds)
    ]
    return lambda steps: sum(run(steps) for run in each)


def _state(config: Config, seed: int, mesh: sharding.Mesh) -> Any:
    return create_state(dataclasses.replace(config, seed=seed), mesh)


def report(config: Config, seeds: int, rounds: int, steps: int) -> dict[str, Any]:
    """Measures, and sums up: what `--json` prints."""
    contestants = {"at once": at_once(config, seeds), "in turn": in_turn(config, seeds)}
    seconds = take_turns(contestants, rounds, steps)
    ratio = paired_ratio(seconds["in turn"], seconds["at once"])
    return {
        "seeds": seeds,
        "step_seconds": {name: float(np.median(values)) for name, values in seconds.items()},
        "in turn / at once": ratio._asdict(),
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Flags to a report on stdout."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--steps", type=int, default=4, help="of each seed in a round")
    parser.add_argument("--threads", type=int, default=1, help="of XLA, as workers have on CPU")
    parser.add_argument("--json", action="store_true", help="print JSON")
    flags = parser.parse_args(arguments)
    for name in ("seeds", "rounds", "steps", "threads"):
        if getattr(flags, name) < 1:
            parser.error(f"{name} is {getattr(flags, name)}; it must be at least 1")
    os.environ["PJRT_NPROC"] = str(flags.threads)
    keep_freed_memory()
    config = char_shakespeare.config().resolved()
    result = report(config, flags.seeds, flags.rounds, flags.steps)
    if flags.json:
        print(json.dumps(result))
        return
    for name, seconds in result["step_seconds"].items():
        print(f"{name:8} {seconds * 1e3:8.1f} ms a step of {flags.seeds} seeds")
    print(f"in turn / at once {Ratio(**result['in turn / at once'])}")


if __name__ == "__main__":
    main()
