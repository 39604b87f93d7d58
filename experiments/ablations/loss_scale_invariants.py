"""Invariants of dynamic loss scaling: exact findings of claim A1.

A loss curve hardly reveals a scaler that is wrong for one step in a hundred, because Adam tolerates
a gradient of half the size, so these findings do not use curves. Scaling by powers of two is exact
while nothing leaves the range of the format; a run with it must then equal the run without it, bit
for bit.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.ablations import recipes
from lmjax.ablation.evidence import Finding, holds
from lmjax.parallel import sharding
from lmjax.runs.metrics import read_rows
from lmjax.train import Config, create_state, make_train_step, train

STEPS = 12
MOST_SKIPS = 24


def findings() -> Iterator[Finding]:
    """Growth, skips and a resume, each of a model that trains in a moment."""
    yield growth()
    yield skips()
    yield resume()


def tiny(**changes: Any) -> Config:
    """The recipe of the claims with one narrow block, one short row a step, and no telemetry."""
    return recipes.small(
        steps=STEPS,
        context=16,
        batch_size=1,
        log_every=1,
        model={"width": 16, "layers": 1, "heads": 2, "max_positions": 16},
        telemetry={"every": 0},
        **changes,
    )


def growth() -> Finding:
    """In f32 every power of two is exact: a scale that grows leaves training as it was."""
    plain = _Run(tiny(loss_scale={"kind": "none"}))
    grown = _Run(tiny(loss_scale={"kind": "dynamic", "initial": 1.0, "growth_interval": 2}))
    for batch in _batches(STEPS):
        plain.step(batch)
        grown.step(batch)
    return holds(
        "a loss scale that grows changes nothing in f32, bit for bit",
        f"scale {grown.scale:g} after {STEPS} steps; {_compared(grown, plain)}",
        grown.equals(plain) and grown.scale > 1,
    )


def skips() -> Finding:
    """A run that skips until its scale fits is the run that starts with that scale."""
    config = tiny(precision="mixed_f16", loss_scale={"kind": "dynamic", "initial": 2.0**24})
    first, *others = _batches(STEPS)
    run = _Run(config)
    while run.skipped == run.steps < MOST_SKIPS:
        run.step(first)
    fitting = _Run(config, scale=run.scale)
    fitting.step(first)
    skipped = run.skipped
    for batch in others:
        run.step(batch)
        fitting.step(batch)
    return holds(
        "skipped steps leave parameters, moments and counts as they were, bit for bit",
        f"{skipped} steps skipped; {_compared(run, fitting)}",
        run.equals(fitting) and skipped > 0,
    )


def resume() -> Finding:
    """A run that is stopped and gone on with has the scales of one that was not."""
    config = tiny(
        precision="mixed_f16",
        loss_scale={"kind": "dynamic", "initial": 2.0**10, "growth_interval": 4},
    )
    with tempfile.TemporaryDirectory() as folder:
        whole, stopped = Path(folder) / "whole", Path(folder) / "stopped"
        train(config, whole, progress=False)
        train(config, stopped, progress=False, stop_after=STEPS // 2 + 1)
        train(config, stopped, progress=False)
        undisturbed, resumed = _logged_scales(whole), _logged_scales(stopped)
    return holds(
        "a resumed run continues with the loss scale that it had",
        f"scale {resumed[0]:g} at first and {resumed[-1]:g} at the end; {undisturbed[-1]:g} in a "
        "run that was not stopped",
        resumed == undisturbed and resumed[-1] > resumed[0],
    )


class _Run:
    """A train state and the compiled step that moves it."""

    def __init__(self, config: Config, scale: float | None = None):
        mesh = sharding.make_mesh(config.mesh, jax.devices()[:1])
        self._step = make_train_step(config, mesh)
        self.state = create_state(config.resolved(), mesh)
        if scale is not None:
            opt_state = self.state.opt_state._replace(scale=jnp.float32(scale))
            self.state = self.state._replace(opt_state=opt_state)

    def step(self, batch: dict[str, jax.Array]) -> None:
        self.state, _ = self._step(self.state, batch)

    @property
    def steps(self) -> int:
        return int(self.state.step)

    @property
    def skipped(self) -> int:
        return int(self.state.opt_state.skipped_steps)

    @property
    def scale(self) -> float:
        return float(self.state.opt_state.scale)

    def equals(self, other: _Run) -> bool:
        """Whether parameters and the optimizer's state have the same bits."""
        mine, others = (
            jax.tree.leaves((run.state.params, run.state.opt_state.inner)) for run in (self, other)
        )
        return all(
            np.asarray(a).tobytes() == np.asarray(b).tobytes()
            for a, b in zip(mine, others, strict=True)
        )


def _compared(run: _Run, other: _Run) -> str:
    return f"parameters and moments {'are the same' if run.equals(other) else 'differ'}"


def _batches(number: int) -> list[dict[str, jax.Array]]:
    """Rows of random bytes, as many as there are steps."""
    config = tiny()
    shape = (number, config.batch_size, config.context + 1)
    tokens = np.random.default_rng(0).integers(0, config.model.vocab_size, shape, np.int32)
    return [
        {"inputs": jnp.asarray(rows[:, :-1]), "targets": jnp.asarray(rows[:, 1:])}
        for rows in tokens
    ]


def _logged_scales(workdir: Path) -> list[float]:
    rows = read_rows(workdir / "metrics.jsonl")
    return [row["loss_scale"] for row in rows if "loss_scale" in row]
