"""Measures tokens per second of decoding GPT-2 small, beside Hugging Face's transformers.

Command:   python -m experiments.benchmarks.decoding --hf-python PYTHON
Hardware:  any
Time:      4 minutes on 2 CPU cores
Expected:  tokens per second over those of transformers, on an AMD EPYC with AVX512-BF16: 2.2 in
           f32, 1.2 in bf16 and 1.7 with int8 weights at 1 prompt, 2.2, 1.2 and 1.0 at 16;
           docs/inference.md has the intervals

Random weights, prompts of 32 tokens, greedy. Each contestant is a process of its own, stopped while
others run, and the order rotates from round to round. Time is that of the tokens after the first.
`--hf-python` is a Python that has torch and transformers; without it, lmjax runs alone.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import jax

from experiments.benchmarks.paired import Ratio, paired_ratio
from experiments.benchmarks.processes import KEEP_FREED_MEMORY, Died, Worker
from lmjax import strict_json
from lmjax.console import stages
from lmjax.console.tables import Column, print_table
from lmjax.data.tokenizers import ByteTokenizer
from lmjax.inference.growing import Generation, Growing
from lmjax.inference.run import TrainedModel
from lmjax.inference.sampling import Sampler
from lmjax.model import ModelConfig, initial_params, stored_weights
from lmjax.precision import exact
from lmjax.runs.resolved import phase_of
from lmjax.train import Config
from lmjax.train.memory import keep_freed_memory

POLICIES = {
    "f32": "f32",
    "mixed_bf16": "mixed_bf16",
    "int8 weights": "mixed_bf16,w=int8@channel.stored",
}
HF = {"f32": "f32", "mixed_bf16": "bf16", "int8 weights": "bf16"}
"""The format that transformers computes a policy in; it has no int8 weights on a CPU."""
PROMPT = 32
WARM_UP = 2
"""Tokens before the first round, which compile."""


class _Words(ByteTokenizer):
    """Stands for the tokenizer of GPT-2, as far as decoding knows it."""

    vocab_size = 50257
    end_of_document = 50256


def _model(policy: str) -> TrainedModel:
    """GPT-2 small under a policy, from random weights."""
    shape = ModelConfig(vocab_size=50257, max_positions=1024, width=768, layers=12, heads=12)
    wide = Config(precision="f32", context=1024, model=shape).resolved()
    sites = phase_of(wide).sites
    params = exact.jit(lambda key: initial_params(key, shape, sites))(jax.random.key(0))
    phase = phase_of(dataclasses.replace(wide, precision=policy))
    params = exact.jit(lambda own: stored_weights(own, shape, phase.sites))(params)
    return TrainedModel(phase, params, 0, _Words())


def answer(policy: str, rows: int) -> None:
    """Answers each line, a number of tokens, by the seconds that they took after a first window."""
    keep_freed_memory()
    model = _model(policy)
    ids = [[_Words.end_of_document, *range(row, row + PROMPT - 1)] for row in range(rows)]
    for line in sys.stdin:
        tokens = int(line)
        window = Generation.window
        how = Generation(tokens=1 + window + tokens, temperature=0.0)
        growing = Growing(model, ids, [Sampler(_Words.vocab_size, how, 0)] * rows, how)
        warm = len(growing.drawn()[0])  # reads the prompts; one token, and a window
        start, count = time.perf_counter(), 0
        while growing.unfinished:
            count += len(growing.drawn()[0])
        seconds = (time.perf_counter() - start) * tokens / max(count, 1)
        assert warm == 1 + window, "random weights do not end the document"
        print(strict_json.dumps({"seconds": seconds}), flush=True)


def contestants(rows: int, hf_python: str) -> tuple[dict[str, Worker], list[str]]:
    """The processes by name, and why others are missing."""
    commands = {
        f"lmjax {name}": [sys.executable, "-m", __spec__.name, "--answer", policy, str(rows)]
        for name, policy in POLICIES.items()
    }
    if hf_python:
        peer = str(Path(__file__).parent / "peers" / "hf_decoding.py")
        own = sorted(set(HF.values()))
        commands |= {f"transformers {f}": [hf_python, peer, f, str(rows)] for f in own}
    running, missing = {}, []
    for name, command in commands.items():
        worker = Worker(name, command, environment=KEEP_FREED_MEMORY)
        try:
            worker.ask(str(WARM_UP))
            running[name] = worker
        except Died as error:
            worker.close()
            missing.append(str(error))
    return running, missing


def measured(workers: Mapping[str, Worker], rows: int, tokens: int, rounds: int) -> dict[str, Any]:
    """Tokens per second in each round, all prompts together, by contestant."""
    names, speeds = list(workers), {name: list[float]() for name in workers}
    for index in range(rounds):
        first = index % len(names)
        for name in (*names[first:], *names[:first]):
            seconds = workers[name].ask(str(tokens))["seconds"]
            speeds[name].append(rows * tokens / seconds)
    return speeds


def main(arguments: Sequence[str] | None = None) -> int:
    """Flags to a table on stdout; 1 if a contestant is missing that was asked for."""
    stages.end(stages.IMPORTING)
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--tokens", type=int, default=16, help="of a round")
    parser.add_argument("--hf-python", default="", help="a Python that has transformers")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--answer", nargs=2, metavar=("POLICY", "ROWS"), help=argparse.SUPPRESS)
    flags = parser.parse_args(arguments)
    if flags.answer:
        answer(flags.answer[0], int(flags.answer[1]))
        return 0
    if flags.rounds < 1 or flags.tokens < 2:
        parser.error("rounds must be at least 1, and tokens at least 2")
    speeds: dict[str, list[float]] = {}
    missing: list[str] = []
    for rows in (1, 16):
        workers, lacking = contestants(rows, flags.hf_python)
        missing += lacking
        try:
            found = measured(workers, rows, flags.tokens, flags.rounds)
        finally:
            for worker in workers.values():
                worker.close()
        speeds |= {f"{name}, {rows}": values for name, values in found.items()}
    for reason in missing:
        print(f"left out: {reason}", file=sys.stderr)
    ratios = _ratios(speeds)
    if flags.json:
        named = {name: ratio._asdict() for name, ratio in ratios.items()}
        print(strict_json.dumps({"tokens_per_second": speeds, "ratios": named}))
        return int(bool(missing))
    rows_of = [(name, f"{median(values):.1f}") for name, values in speeds.items()]
    print_table([Column("contestant, prompts", "key"), Column("tokens/s", "number")], rows_of)
    print_table(
        [Column("ratio", "key"), Column("median")], [(n, str(r)) for n, r in ratios.items()]
    )
    return int(bool(missing))


def _ratios(speeds: Mapping[str, Sequence[float]]) -> dict[str, Ratio]:
    pairs = [
        (f"lmjax {policy}, {rows}", f"transformers {HF[policy]}, {rows}")
        for policy in POLICIES
        for rows in (1, 16)
    ]
    pairs += [(f"lmjax {policy}, 16", f"lmjax {policy}, 1") for policy in POLICIES]
    return {
        f"{a} / {b}": paired_ratio(speeds[a], speeds[b])
        for a, b in pairs
        if a in speeds and b in speeds
    }


if __name__ == "__main__":
    sys.exit(main())
