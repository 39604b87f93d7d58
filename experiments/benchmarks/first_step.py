"""Measures how long the quickstart takes from its command to its first step, cold and warm.

Command:   python -m experiments.benchmarks.first_step
Hardware:  any
Time:      half a minute on 2 CPU cores
Expected:  below 12 s cold and below 5 s warm

A cold start finds the text prepared and no compiled program; a warm one finds both (see
`lmjax.train.compilation`). Seconds are those of the whole process: Python, imports, data,
compiling, one step, a checkpoint.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

from lmjax import strict_json
from lmjax.console import stages

COMMAND = ("-m", "experiments.quickstart", "--stop-after", "1", "--sample", "0", "--workdir")
STOPPED = 75


def seconds(folder: Path, name: str) -> float:
    """Starts the quickstart in a new run directory and waits until it stopped after a step.

    Raises:
      RuntimeError: it ended otherwise.
    """
    environment = {**os.environ, "LMJAX_COMPILED": str(folder / "compiled")}
    start = time.perf_counter()
    done = subprocess.run(
        [sys.executable, *COMMAND, str(folder / name)],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode != STOPPED:
        raise RuntimeError(f"the quickstart ended with exit code {done.returncode}: {done.stderr}")
    return time.perf_counter() - start


def report(warm_starts: int) -> dict[str, Any]:
    """Measures: what `--json` prints."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        seconds(folder, "prepares")  # the text, for all that follow
        for program in (folder / "compiled").glob("*"):
            program.unlink()
        cold = seconds(folder, "cold")
        warm = [seconds(folder, f"warm-{index}") for index in range(warm_starts)]
    return {"cold_seconds": cold, "warm_seconds": median(warm)}


def main(arguments: Sequence[str] | None = None) -> None:
    """Flags to a report on stdout."""
    stages.end(stages.IMPORTING)
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--warm-starts", type=int, default=3)
    parser.add_argument("--json", action="store_true", help="print JSON")
    flags = parser.parse_args(arguments)
    if flags.warm_starts < 1:
        parser.error(f"warm-starts is {flags.warm_starts}; it must be at least 1")
    result = report(flags.warm_starts)
    if flags.json:
        print(strict_json.dumps(result))
        return
    for name, value in result.items():
        print(f"{name.partition('_')[0]}  {value:5.1f} s")


if __name__ == "__main__":
    main()
