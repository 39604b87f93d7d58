"""What the tests of whole runs share: a text, a config that trains on it in a moment, processes.

A run of this size is nearly all compilation, so the tests share one persistent compilation cache:
the second run of a program in another process reads the executable of the first, and in this one
all runs share their programs. LLVM is asked for no optimisation, here and in other processes, which
changes no rounding.
"""

from __future__ import annotations

import dataclasses
import json
import os
import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
TIMINGS = ("tokens_per_second", "step_seconds", "mfu", "peak_memory_bytes")
NAMES = (
    *(
        "b[1]",
        "b[!1]",
        "[[x",
        "a{1}",
        "st*r",
        "q?",
        "back\\slash",
        "dol$1_$",
        "sp ace",
        "'q\"",
        "gs:",
    ),
    *("per%41%s", "{}", "new\nline", "esc\x1b[31m", "caf\udce9", "-dash", "~", "x" * 200, "привет"),
)
"""Names that some library or other has a meaning for, or cannot bear."""

RESULT_KEYS = ["steps", "eval_loss", "tokens", "train_seconds", "parameters_sha256"]


@pytest.fixture(scope="session")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with `texts/*.txt` and caches, which this process and its children use."""
    from jax.experimental.compilation_cache import compilation_cache

    from lmjax.precision import exact
    from lmjax.train.programs import Programs

    programs = Programs()
    folder = tmp_path_factory.mktemp("home")
    write_texts(folder / "texts")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LMJAX_CACHE", str(folder / "cache"))
        patch.setenv("JAX_COMPILATION_CACHE_DIR", str(folder / "compiled"))
        patch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
        patch.setitem(exact.COMPILER_OPTIONS, "xla_backend_optimization_level", 0)
        patch.setattr("lmjax.train.loop.Programs", lambda: programs)
        with _CompilationCache(folder / "compiled", compilation_cache):
            yield folder


class _CompilationCache:
    """JAX decides once whether it uses the cache, so it is reset before and after."""

    def __init__(self, folder: Path, module: Any):
        self._folder, self._module = folder, module

    def __enter__(self) -> None:
        self._set(str(self._folder), 0.0)

    def __exit__(self, *_: object) -> None:
        self._set(None, 1.0)

    def _set(self, folder: str | None, seconds: float) -> None:
        import jax

        jax.config.update("jax_compilation_cache_dir", folder)
        jax.config.update("jax_persistent_cache_min_compile_time_secs", seconds)
        self._module.reset_cache()


def write_texts(folder: Path, seed: int = 0) -> Path:
    """Twelve documents of 400 words each, the same for the same seed."""
    folder.mkdir(parents=True, exist_ok=True)
    draw = random.Random(seed)
    words = ("the", "quick", "brown", "fox", "jumps", "over", "a", "lazy", "dog", "and", "then")
    for number in range(12):
        text = " ".join(draw.choice(words) for _ in range(400))
        (folder / f"{number:02d}.txt").write_text(text, encoding="utf-8")
    return folder


def tiny(home: Path, precision: str = "f32", **changes: Any) -> Any:
    """A run of 40 steps of a one-block model; parts (`model`, ...) are dicts of their changes."""
    from lmjax.data import DataConfig
    from lmjax.model import ModelConfig
    from lmjax.optim.optimizer import OptimizerConfig
    from lmjax.train import CheckpointConfig, Config, EvaluationConfig

    config = Config(
        precision=precision,
        steps=40,
        context=16,
        batch_size=4,
        log_every=5,
        model=ModelConfig(vocab_size=256, max_positions=16, width=16, layers=1, heads=2),
        data=DataConfig(dataset="text_files", files=(str(home / "texts" / "*.txt"),)),
        optimizer=OptimizerConfig(learning_rate=1e-2, warmup_steps=5),
        evaluation=EvaluationConfig(every=15, batches=2),
        checkpoint=CheckpointConfig(every=10),
        audit=False,  # half a second of each run; test_audited.py has it
    )
    parts = {
        name: dataclasses.replace(getattr(config, name), **change)
        for name, change in changes.items()
        if isinstance(change, dict)
    }
    return dataclasses.replace(config, **(changes | parts))


def tiny_flags(home: Path, workdir: Path, *, steps: int = 40) -> list[str]:
    """The flags that make `experiments.quickstart` as small as `tiny`."""
    flags = {
        "workdir": workdir,
        "steps": steps,
        "context": 16,
        "batch-size": 4,
        "log-every": 5,
        "sample": 0,
        "model.vocab-size": 256,
        "model.max-positions": 16,
        "model.width": 16,
        "model.layers": 1,
        "model.heads": 2,
        "data.dataset": "text_files",
        "data.files": home / "texts" / "*.txt",
        "data.tokenizer": "bytes",
        "optimizer.warmup-steps": 5,
        "evaluation.every": 50,
        "evaluation.batches": 2,
        "checkpoint.every": 50,
    }
    return [part for name, value in flags.items() for part in (f"--{name}", str(value))]


def start(
    module: str, *arguments: str, cwd: Path, group: bool = False, **environment: str
) -> subprocess.Popen[str]:
    """`python -m module` in a process of its own, away from the source tree.

    With `group` it leads a process group, which can be killed as a whole.
    """
    return subprocess.Popen(
        [sys.executable, "-m", module, *arguments],
        cwd=cwd,
        env={
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "XLA_FLAGS": "--xla_backend_optimization_level=0",
            **environment,
        },
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        process_group=0 if group else None,
    )


def finish(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of a process, once it has ended."""
    try:
        out, err = process.communicate(timeout=240)
    finally:
        process.kill()
    return process.returncode, out, err


def rows(workdir: Path) -> list[dict[str, Any]]:
    """The rows of `metrics.jsonl`, each line of it strict JSON."""
    lines = (workdir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [strict_loads(line) for line in lines]


def untimed(workdir: Path) -> list[dict[str, Any]]:
    """What of the rows must not depend on when they were computed."""
    return [{k: v for k, v in row.items() if k not in TIMINGS} for row in rows(workdir)]


def result(workdir: Path) -> dict[str, Any]:
    """The content of `result.json`."""
    return strict_loads((workdir / "result.json").read_text(encoding="utf-8"))


def strict_loads(text: str) -> Any:
    """Reads JSON as its specification has it: without NaN and Infinity, which Python would take."""

    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is not JSON")

    return json.loads(text, parse_constant=refuse)
