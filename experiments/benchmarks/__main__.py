"""Runs all benchmarks and writes one page and one picture.

Command:   python -m experiments.benchmarks --out runs/benchmarks
Hardware:  any; PyTorch where `--torch-python` has it
Time:      half an hour on 2 CPU cores
Expected:  runs/benchmarks/index.md and runs/benchmarks/ratios.png

Each benchmark is a command of its own, printed beside what it measured. What a machine lacks
(PyTorch, transformers, a C++ compiler, memory) is said on the page.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

from lmjax import strict_json
from lmjax.console import stages

HERE = "experiments.benchmarks"


def commands(shapes: Sequence[str], rounds: int, torch_python: str) -> list[list[str]]:
    """The module and the flags of every benchmark."""
    peers = ["--peers", "jnp,torch", "--torch-python", torch_python]
    counted = ["--rounds", str(rounds)]
    trained = [[f"{HERE}.throughput", "--shape", shape, *counted, *peers] for shape in shapes]
    decoded = [f"{HERE}.decoding", *counted, "--hf-python", torch_python]
    others = [[f"{HERE}.telemetry_cost", *counted], [f"{HERE}.fixed_order", *counted]]
    return [*trained, decoded, [f"{HERE}.first_step"], *others]


def measured(command: Sequence[str]) -> tuple[dict[str, Any] | None, str]:
    """What a benchmark prints as JSON, None if it failed; and what it says is missing."""
    done = subprocess.run(
        [sys.executable, "-m", *command, "--json"], capture_output=True, text=True, check=False
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    said = [line for line in done.stderr.splitlines() if line.startswith(("left out", "died"))]
    if not lines:
        return None, "\n".join(said) or done.stderr.strip()[-500:] or f"exit {done.returncode}"
    return strict_json.loads(lines[-1]), "\n".join(said)


def flat(value: Any, name: str = "") -> list[tuple[str, str]]:
    """The numbers of a result with their names; a ratio is one, and so is the median of rounds."""
    if isinstance(value, dict) and {"median", "low", "high"} <= set(value):
        return [(name, f"{value['median']:.3g} ({value['low']:.3g} to {value['high']:.3g})")]
    if isinstance(value, dict):
        inner = (flat(part, f"{name}, {key}" if name else key) for key, part in value.items())
        return [row for rows in inner for row in rows]
    if isinstance(value, list) and value and all(isinstance(one, float) for one in value):
        return [(f"{name}, median", f"{median(value):.4g}")]
    return [(name, f"{value:.4g}")] if isinstance(value, float) else []


def section(command: Sequence[str], result: dict[str, Any] | None, missing: str) -> str:
    """A part of the page: a command and what it measured."""
    rows = flat(result or {})
    table = ["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows)]
    notes = [f"- {line}" for line in missing.splitlines()]
    parts = [f"## python -m {' '.join(command)}", *(["\n".join(table)] if rows else [])]
    return "\n\n".join([*parts, *(["\n".join(notes)] if notes else [])])


def draw(results: Sequence[tuple[str, dict[str, Any]]], path: Path) -> None:
    """The ratios of speeds to peers with their intervals, one below the other."""
    from matplotlib.figure import Figure

    ratios = [
        (f"{shape}: {name}", ratio)
        for shape, result in results
        for name, ratio in result.get("ratios", {}).items()
    ]
    figure = Figure(figsize=(8, 1 + 0.3 * max(len(ratios), 1)), layout="constrained")
    axes = figure.subplots()
    for row, (_, ratio) in enumerate(ratios):
        axes.plot((ratio["low"], ratio["high"]), (row, row), color="#457b9d", linewidth=2)
        axes.plot(ratio["median"], row, "o", color="#1d3557")
    axes.axvline(1, color="#999999", linewidth=1)
    axes.set_yticks(range(len(ratios)), [name for name, _ in ratios])
    axes.invert_yaxis()
    axes.set_xlabel("tokens per second, ratio: median and interval of paired rounds")
    figure.savefig(path, dpi=150)


def main(arguments: Sequence[str] | None = None) -> int:
    """Flags to a page; 1 if a benchmark measured nothing."""
    stages.end(stages.IMPORTING)
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    names = lambda text: [name.strip() for name in text.split(",") if name.strip()]
    parser.add_argument("--out", type=Path, default=Path("runs", "benchmarks"), metavar="DIR")
    parser.add_argument("--shapes", type=names, default=["S", "M"], help="by commas")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument(
        "--torch-python", default=sys.executable, help="a Python that has torch and transformers"
    )
    flags = parser.parse_args(arguments)
    flags.out.mkdir(parents=True, exist_ok=True)
    sections, drawn, failed = [], [], False
    for command in commands(flags.shapes, flags.rounds, flags.torch_python):
        print(f"python -m {' '.join(command)}", file=sys.stderr, flush=True)
        result, missing = measured(command)
        failed |= result is None
        sections.append(section(command, result, missing))
        if result is not None and "ratios" in result:
            drawn.append((result.get("shape", {}).get("name", "decoding"), result))
    draw(drawn, flags.out / "ratios.png")
    head = "# Benchmarks\n\n![Speed relative to peers](ratios.png)"
    (flags.out / "index.md").write_text("\n\n".join([head, *sections]) + "\n", encoding="utf-8")
    print(flags.out / "index.md")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
