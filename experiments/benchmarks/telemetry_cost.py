"""Measures the cost of telemetry: steps with and without it, paired, on the quickstart.

Command:   python -m experiments.benchmarks.telemetry_cost --rounds 8
Hardware:  any
Time:      1 minute on 2 CPU cores
Expected:  a watched step takes 1.26 (1.06 to 1.31) times as long as a plain one, so watching every
           10th costs 2.6% (0.6% to 3.1%)

A watched step is a second program. In each round either program takes a few steps, in turn and from
the same state; a ratio is that of the two times of a round. Watching every Nth step costs
(ratio - 1) / N of a run's step time. What the run does with the counts, a line of JSON each time,
happens on the host while the next step computes.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

import numpy as np

from experiments import quickstart
from experiments.benchmarks import paired
from experiments.benchmarks.paired import Contestant, paired_ratio, take_turns
from lmjax import strict_json
from lmjax.console import stages
from lmjax.parallel import sharding
from lmjax.train import Config, create_state, make_train_step
from lmjax.train.memory import keep_freed_memory


def stepper(config: Config, *, telemetry: bool) -> Contestant:
    """Returns a contestant that takes steps with or without telemetry."""
    mesh = sharding.make_mesh(config.mesh)
    step = make_train_step(config, mesh, telemetry=telemetry)
    return paired.stepper(step, create_state(config, mesh), paired.random_batch(config))


def report(config: Config, rounds: int, steps: int, every: int) -> dict[str, Any]:
    """Measures, and sums up: what `--json` prints."""
    contestants = {
        name: stepper(config, telemetry=name == "watched") for name in ("plain", "watched")
    }
    seconds = take_turns(contestants, rounds, steps)
    ratio = paired_ratio(seconds["watched"], seconds["plain"])
    return {
        "step_seconds": {name: float(np.median(values)) for name, values in seconds.items()},
        "watched / plain": ratio._asdict(),
        "every": every,
        "cost": {
            name: (value - 1) / every
            for name, value in ratio._asdict().items()
            if name != "confidence"
        },
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Flags to a report on stdout."""
    stages.end(stages.IMPORTING)
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--steps", type=int, default=4, help="of each program in a round")
    parser.add_argument("--every", type=int, default=10, help="steps from one watched to the next")
    parser.add_argument("--json", action="store_true", help="print JSON")
    flags = parser.parse_args(arguments)
    for name in ("rounds", "steps", "every"):
        if getattr(flags, name) < 1:
            parser.error(f"{name} is {getattr(flags, name)}; it must be at least 1")
    keep_freed_memory()
    result = report(quickstart.config().resolved(), flags.rounds, flags.steps, flags.every)
    if flags.json:
        print(strict_json.dumps(result))
        return
    for name, seconds in result["step_seconds"].items():
        print(f"{name:8} {seconds * 1e3:8.1f} ms a step")
    ratio, cost = result["watched / plain"], result["cost"]
    print(f"ratio    {ratio['median']:8.2f}  ({ratio['low']:.2f} to {ratio['high']:.2f})")
    print(
        f"watching every {flags.every} steps costs {cost['median']:.1%} "
        f"({cost['low']:.1%} to {cost['high']:.1%}) of the step time"
    )


if __name__ == "__main__":
    main()
