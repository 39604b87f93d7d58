"""Measures the cost of a twin in steps on the same batch, paired, on the quickstart.

Command:   python -m experiments.benchmarks.twin_cost --rounds 9
Hardware:  any
Time:      2 minutes on 2 CPU cores, most of it compilation
Expected:  a twin of bf16 and f32 takes 4.5 (4.4 to 4.6) times as long as a step in bf16, and 3.3
           (3.3 to 3.4) times as long as one in f32, on an AMD EPYC with AVX512-BF16

A twin takes three gradients, one under the reference and two under the policy, and compares every
tensor twice. In each round the twin and both steps take their turn; a ratio is that of two times
of a round. Compiling the twin takes about three times as long as compiling a step.
"""

from __future__ import annotations

import argparse
import dataclasses
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from experiments import quickstart
from experiments.benchmarks import paired
from experiments.benchmarks.paired import Contestant, paired_ratio, take_turns
from lmjax import strict_json
from lmjax.console import stages
from lmjax.diagnosis import OpenRun
from lmjax.diagnosis.tapped import outline_of, phase_under, step_inputs
from lmjax.diagnosis.twin import ordinary, twin_program
from lmjax.parallel import sharding
from lmjax.runs.resolved import Phase, resolve
from lmjax.train import Config, create_state, make_train_step
from lmjax.train.memory import keep_freed_memory


def contestants(config: Config, reference: str) -> dict[str, Contestant]:
    """The twin, and a step under each of its policies, compiled."""
    phases = resolve(config)
    phase = phases.at(0)
    other, mesh = phase_under(phase, reference), sharding.make_mesh(config.mesh)
    batch = paired.random_batch(config)

    def stepper(under: Phase) -> Contestant:
        return paired.stepper(make_train_step(under, mesh), create_state(under, mesh), batch)

    run = OpenRun(Path(), phases, mesh, create_state(phase, mesh), 0, None, None)
    params, key, scale, factors = step_inputs(run, phase.layout)
    outlines = outline_of(other, mesh, params, batch, key, scale)
    program = twin_program(phase, other, mesh, outlines)
    inputs = params, key, scale, [factors, {}], batch, ordinary(outlines, phase.layout)

    def twin(times: int) -> float:
        start = time.perf_counter()
        for _ in range(times):
            jax.block_until_ready(program(*inputs))
        return (time.perf_counter() - start) / times

    twin(1)
    return {"policy": stepper(phase), "reference": stepper(other), "twin": twin}


def report(config: Config, reference: str, rounds: int, steps: int) -> dict[str, Any]:
    """Measures, and sums up: what `--json` prints."""
    seconds = take_turns(contestants(config, reference), rounds, steps)
    return {
        "seconds": {name: float(np.median(values)) for name, values in seconds.items()},
        **{
            f"twin / step under the {name}": paired_ratio(seconds["twin"], seconds[name])._asdict()
            for name in ("policy", "reference")
        },
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Flags to a report on stdout."""
    stages.end(stages.IMPORTING)
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--precision", default="p=f32,c=bf16,o=f32")
    parser.add_argument("--reference", default="f32")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--steps", type=int, default=2, help="of each program in a round")
    parser.add_argument("--json", action="store_true", help="print JSON")
    flags = parser.parse_args(arguments)
    for name in ("rounds", "steps"):
        if getattr(flags, name) < 1:
            parser.error(f"{name} is {getattr(flags, name)}; it must be at least 1")
    keep_freed_memory()
    config = dataclasses.replace(quickstart.config().resolved(), precision=flags.precision)
    result = report(config, flags.reference, flags.rounds, flags.steps)
    if flags.json:
        print(strict_json.dumps(result))
        return
    for name, seconds in result.pop("seconds").items():
        print(f"{name:28} {seconds * 1e3:8.1f} ms")
    for name, ratio in result.items():
        print(f"{name:28} {ratio['median']:8.2f}  ({ratio['low']:.2f} to {ratio['high']:.2f})")


if __name__ == "__main__":
    main()
