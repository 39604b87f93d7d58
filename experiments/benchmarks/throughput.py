"""Measures tokens per second of the train step under several policies, paired with its peers.

Command:   python -m experiments.benchmarks.throughput --shape S --rounds 6
Hardware:  any; the ratios below are of 2 CPU cores
Time:      2 minutes
Expected:  lmjax / jnp 1.07 in f32, 1.07 in bf16, 1.18 in f16; docs/speed.md has the intervals

Contestants take turns: in each round every one trains for a few steps, and the order rotates from
round to round, so that other load on the machine affects all of them alike. The first step after a
pause is not timed. A ratio is the median of the ratios of the rounds; its interval is the range
between two order statistics, which contains the median of a continuous distribution with the
printed confidence (a sign test; the whole range below 9 rounds). All contestants keep freed memory
instead of returning it (see `lmjax.train.memory`), and use the same tokens and the same optimizer.

FLOP per token are 6 N + 12 x layers x width x length, not halved for causality, with N the number
of parameters without the table of positions. The peak is the rate of a square matrix product of
1024 rows (8192 on accelerators) in the same run: of random operands in the contestant's compute
format, or of the same operands widened to f32 beforehand where that is faster.

Every contestant is a separate process, so that one can fail without the others: lmjax; its peer in
plain jnp, from the same initial parameters; and its peer in PyTorch, run with the Python given by
`--torch-python`. A contestant is not started if free memory is below the estimate of `python -m
lmjax plan` for the step plus 0.5 GiB. One that ends early is reported with the cause and excluded
from the results; the exit code is then 1. `--max-memory` caps the memory of each. A chip that only
one process can use at a time, such as a TPU, allows one contestant. The output says so if torch is
not installed or its compiler cannot run.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import math
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from statistics import median
from typing import Any

import jax
import jax.numpy as jnp

from experiments.benchmarks.contestants import (
    FORMATS,
    SHAPES,
    TORCH,
    Contestant,
    LeftOut,
    Shape,
    config_of,
    jax_contestant,
    torch_contestant,
)
from experiments.benchmarks.paired import paired_ratio
from experiments.benchmarks.processes import GIB, Died, can_cap_memory
from lmjax import strict_json
from lmjax.console import stages
from lmjax.console.tables import Column, table_lines, terminal_width
from lmjax.precision.policy import PolicyError

Missing = list[tuple[str, bool]]
"""Why contestants are missing from the results, and whether that is a failure."""


def start(
    shape: Shape,
    policies: Sequence[str],
    peers: Sequence[str],
    torch_python: str,
    max_bytes: int | None = None,
    forms: Sequence[str] = tuple(TORCH),
) -> tuple[list[Contestant], Missing]:
    """All that can run here, and why the others cannot; `forms` are those of the peer `torch`.

    They are started one after another, and each takes a first step before the next is started, so
    that the memory which is free then is what the others leave.
    """
    starts: list[Callable[[], Contestant]] = [
        functools.partial(jax_contestant, kind, policy, shape, max_bytes)
        for kind in ("lmjax", "jnp")
        for policy in policies
        if kind == "lmjax" or ("jnp" in peers and policy in FORMATS)
    ]
    ours = len(starts)
    if "torch" in peers:
        starts += [
            functools.partial(torch_contestant, name, torch_python, shape, max_bytes)
            for name in forms
        ]
    contestants: list[Contestant] = []
    missing: Missing = []
    for index, begin in enumerate(starts):
        try:
            contestants.append(begin())
        except LeftOut as error:
            missing.append((f"left out: {error}", True))
        except Died as error:
            missing.append((f"left out: {error}", index < ours))
    return contestants, missing


def product_rates(formats: Sequence[str], rows: int) -> dict[str, Callable[[], float]]:
    """For each format, a function that measures FLOP/s of a square product, the faster of two ways.

    Args:
      formats: names of dtypes.
      rows: size of the product.
    """

    def rate(name: str) -> Callable[[], float]:
        operand = jax.random.normal(jax.random.key(0), (rows, rows)).astype(name)
        multiply = jax.jit(
            functools.partial(jnp.matmul, precision="highest", preferred_element_type=jnp.float32)
        )
        ways = [operand, operand.astype(jnp.float32)]

        def seconds(x: jax.Array) -> float:
            start = time.perf_counter()
            multiply(x, x).block_until_ready()
            return time.perf_counter() - start

        for x in ways:
            seconds(x)  # compiles
        return lambda: 2 * rows**3 / min(median(seconds(x) for _ in range(5)) for x in ways)

    return {name: rate(name) for name in formats}


def measure(contestants: Sequence[Contestant], shape: Shape, rounds: int) -> dict[str, Any]:
    """Rounds in which every contestant trains once; one that ends has no part in the results.

    Returns:
      `tokens_per_second` by contestant and `peaks`, FLOP/s by format, a list over rounds each;
      `losses`, the first and the last of each contestant; `died`, how those ended that did.
    """
    rows = 1024 if jax.default_backend() == "cpu" else 8192
    rates = product_rates(sorted({c.format for c in contestants}), rows=rows)
    running = {c.name: c for c in contestants}
    losses = {c.name: [c.first_loss] for c in contestants}
    speeds: dict[str, list[float]] = {name: [] for name in running}
    peaks: dict[str, list[float]] = {name: [] for name in rates}
    died: list[str] = []

    def train(name: str, steps: int) -> float | None:
        """Lets one train: the seconds, or None if it ended."""
        try:
            seconds, loss = running[name].run(steps)
        except Died as error:
            died.append(str(error))
            del running[name], losses[name], speeds[name]
            return None
        losses[name][1:] = [loss]  # the first stays
        return seconds

    for index in range(rounds):
        names = list(running)
        first = index % max(len(names), 1)
        for name in (*names[first:], *names[:first]):
            if (seconds := train(name, shape.steps)) is not None:
                speeds[name].append(shape.tokens * shape.steps / seconds)
        for name, rate in rates.items():
            peaks[name].append(rate())
    return {"tokens_per_second": speeds, "peaks": peaks, "losses": losses, "died": died}


def pairs(formats: Mapping[str, str]) -> list[tuple[str, str]]:
    """The comparisons worth printing: each policy with its peers, and with f32 and bf16.

    Args:
      formats: compute formats by contestant.
    """
    wanted = []
    for ours in (name for name in formats if name.startswith("lmjax ")):
        policy = ours.removeprefix("lmjax ")
        wanted += [(ours, f"jnp {policy}"), (ours, "lmjax f32")]
        wanted += [(ours, "lmjax mixed_bf16")] if policy not in FORMATS else []
        wanted += [
            (ours, name)
            for name in formats
            if name.startswith("torch ") and formats[name] == formats[ours]
        ]
    return [(a, b) for a, b in wanted if a != b and b in formats]


def report(shape: Shape, contestants: Sequence[Contestant], rounds: int) -> dict[str, Any]:
    """Measures, and sums up: what `--json` prints."""
    raw = measure(contestants, shape, rounds)
    speeds, flops = raw["tokens_per_second"], shape.flops_per_token
    rows = {}
    for contestant in contestants:
        if contestant.name not in speeds:
            continue
        speed = median(speeds[contestant.name])
        peak = median(raw["peaks"][contestant.format])
        rows[contestant.name] = {
            "tokens_per_second": speed,
            "flops": speed * flops,
            "share_of_peak": speed * flops / peak,
            "compile_seconds": contestant.compile_seconds,
            "peak_bytes": contestant.worker.peak_bytes,
            "first_loss": raw["losses"][contestant.name][0],
            "last_loss": raw["losses"][contestant.name][-1],
        }
    formats = {c.name: c.format for c in contestants if c.name in rows}
    return {
        "shape": {**dataclasses.asdict(shape), "flops_per_token": flops},
        "flop_formula": "6 (parameters without positions) + 12 layers width length, per token",
        "rounds": rounds,
        "devices": jax.devices()[0].device_kind,
        "jax": jax.__version__,
        "peaks": {name: median(values) for name, values in raw["peaks"].items()},
        "contestants": rows,
        "ratios": {
            f"{a} / {b}": paired_ratio(speeds[a], speeds[b])._asdict() for a, b in pairs(formats)
        },
        "tokens_per_second": speeds,
        "died": raw["died"],
    }


CONTESTANTS = (
    Column("contestant", "key"),
    *(Column(title, "number") for title in ("tokens/s", "GFLOP/s", "of peak", "compile", "memory")),
    *(Column(title, "number") for title in ("first loss", "last loss")),
)
RATIOS = (Column("ratio", "key"), Column("median", "number"), Column("interval"))


def table(result: dict[str, Any], width: int | None = None) -> str:
    """The report for human eyes, in a terminal of this width."""
    giga = 1e-9
    peaks = (f"{name} {rate * giga:.0f} GFLOP/s" for name, rate in result["peaks"].items())
    rows = [
        (
            name,
            f"{row['tokens_per_second']:.0f}",
            f"{row['flops'] * giga:.1f}",
            f"{row['share_of_peak']:.1%}",
            "" if row["compile_seconds"] is None else f"{row['compile_seconds']:.1f} s",
            "" if row["peak_bytes"] is None else f"{row['peak_bytes'] / GIB:.2f} GiB",
            f"{row['first_loss']:.4f}",
            f"{row['last_loss']:.4f}",
        )
        for name, row in result["contestants"].items()
    ]
    ratios = [
        (
            name,
            f"{ratio['median']:.3f}",
            f"{ratio['low']:.3f} to {ratio['high']:.3f} ({ratio['confidence']:.1%})",
        )
        for name, ratio in result["ratios"].items()
    ]
    lines = [
        f"{result['shape']['flops_per_token'] / 1e6:.1f} MFLOP a token: {result['flop_formula']}",
        f"peak of a product: {', '.join(peaks)}",
        "",
        *table_lines(CONTESTANTS, rows, width=width),
    ]
    if ratios:
        lines += ["", f"of {result['rounds']} rounds:", *table_lines(RATIOS, ratios, width=width)]
    return "\n".join(lines)


def _flags(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The flags; bad ones end the program with exit code 2."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    names = lambda text: [name.strip() for name in text.split(",") if name.strip()]
    parser.add_argument("--shape", choices=SHAPES, default="S")
    parser.add_argument(
        "--policies",
        nargs="+",
        default=list(FORMATS),
        metavar="POLICY",
        help="presets, by commas or apart, or other policies",
    )
    parser.add_argument("--peers", type=names, default=["jnp"], help="jnp, torch, or nothing")
    parser.add_argument(
        "--torch",
        type=names,
        default=list(TORCH),
        metavar="FORMS",
        help=f"forms of the peer torch, by commas: {', '.join(TORCH)}",
    )
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--torch-python", default=sys.executable, help="a Python that has torch")
    parser.add_argument(
        "--max-memory",
        type=float,
        metavar="GIB",
        help="most memory that each contestant may allocate (Linux)",
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    flags = parser.parse_args(arguments)
    flags.policies = [
        p for text in flags.policies for p in ([text] if "=" in text else names(text))
    ]
    if unknown := set(flags.peers) - {"jnp", "torch"}:
        parser.error(f"no peer {sorted(unknown)[0]!r}; the peers are jnp and torch")
    if unknown := set(flags.torch) - set(TORCH):
        parser.error(f"no form {sorted(unknown)[0]!r}; the forms are {', '.join(TORCH)}")
    if flags.rounds < 1:
        parser.error(f"rounds is {flags.rounds}; it must be at least 1")
    if flags.max_memory is not None and not 0 < flags.max_memory < math.inf:
        parser.error(f"max-memory is {flags.max_memory}; it must be positive and finite")
    if flags.max_memory is not None and not can_cap_memory():
        parser.error("this system cannot cap the memory of a process; leave --max-memory out")
    try:
        for policy in flags.policies:
            config_of(SHAPES[flags.shape], policy)
    except PolicyError as error:
        parser.error(str(error))
    return flags


def main(arguments: Sequence[str] | None = None) -> int:
    """Flags to a report on stdout; 1 if a contestant failed, else 0."""
    stages.end(stages.IMPORTING)
    flags = _flags(arguments)
    # On a GPU this process would otherwise take most of the memory; JAX reads it at its first use.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    shape = SHAPES[flags.shape]
    max_bytes = None if flags.max_memory is None else int(flags.max_memory * GIB)
    contestants, missing = start(
        shape, flags.policies, flags.peers, flags.torch_python, max_bytes, flags.torch
    )
    for reason, _ in missing:
        print(reason, file=sys.stderr)
    try:
        result = report(shape, contestants, flags.rounds)
    finally:
        for contestant in contestants:
            contestant.worker.close()
    for reason in result["died"]:
        print(f"died: {reason}", file=sys.stderr)
    print(strict_json.dumps(result) if flags.json else table(result, terminal_width()))
    return int(bool(result["died"]) or any(failure for _, failure in missing))


if __name__ == "__main__":
    sys.exit(main())
