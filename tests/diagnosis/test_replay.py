"""Replay: the steps of a run bit for bit, and where the first infinity comes from."""

from __future__ import annotations

import contextlib
import math
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from run_helpers import tiny

from lmjax.diagnosis import open_run, replay
from lmjax.precision.policy import SitePolicy
from lmjax.precision.sites import Kind
from lmjax.train import step as train_step
from lmjax.train import train

STEPS = 12


@pytest.fixture(scope="module")
def run(home: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose loss scale overflows at first, with two micro-batches and dropout."""
    workdir = tmp_path_factory.mktemp("replayed") / "run"
    config = tiny(
        home,
        "mixed_f16",
        steps=STEPS,
        log_every=1,
        micro_batches=2,
        model={"dropout": 0.1},
        loss_scale={"initial": 2.0**24, "growth_interval": 100},
        checkpoint={"every": 4, "keep": 5},
        evaluation={"every": 0},
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lmjax.train.records.draw_curves", lambda *_: None)
        train(config, workdir, progress=False)
    return workdir


def test_steps_are_those_of_the_run_and_an_overflow_is_located(run: Path):
    made = replay(open_run(run, before=1, initial=True), 1, 9)
    assert (made.start, made.identical) == (0, True)
    assert [step.same for step in made.steps] == [True] * 9
    assert made.checkpoints == {4: True, 8: True}
    found = made.non_finite
    assert found is not None
    assert (found.step, found.direction, found.micro_batch) == (1, "backward", 0)
    assert not math.isfinite(found.value)
    assert found.operands["dy"] * 100 > 65504 or found.operands["dy"] == math.inf


@pytest.mark.long
@pytest.mark.parametrize(
    "precision", ["f32", "p=bf16.sr,c=bf16,w=e4m3@tensor,x=e4m3@tensor.delayed4"]
)
def test_replay_is_bit_identical_from_every_checkpoint(precision: str, home: Path, tmp_path: Path):
    changes = {"log_every": 1, "steps": STEPS, "checkpoint": {"every": 5, "keep": 5}}
    config = tiny(home, precision, telemetry={"every": 3}, model={"dropout": 0.1}, **changes)
    train(config, tmp_path / "run", progress=False)
    for first, start in ((2, 0), (7, 5), (11, 10)):
        made = replay(open_run(tmp_path / "run", before=first, initial=True), first, STEPS)
        assert (made.start, made.identical) == (start, True)
        assert made.non_finite is None
        assert made.outlier is not None


@pytest.mark.long
def test_an_infinity_in_the_parameters_is_named_by_its_index(run: Path):
    opened = open_run(run, before=9)
    kernel = opened.state.params["blocks"]["mlp"]["up"]["kernel"]
    opened.state.params["blocks"]["mlp"]["up"]["kernel"] = kernel.at[0, 3, 5].set(jnp.inf)
    found = replay(opened, 9, 10).non_finite
    assert found is not None
    assert (found.step, found.direction, found.tensor) == (9, "before", "blocks/mlp/up/kernel")
    assert found.index == (0, 3, 5)


@contextlib.contextmanager
def planted(site: str, forward: bool, batch: Any, share: float) -> Iterator[list[tuple[int, ...]]]:
    """An infinity in what a site hands on, or hands back, in the step of one batch.

    Yields:
      Where it will be: its index, once the step was traced.
    """
    triggers: list[Any] = []
    where: list[tuple[int, ...]] = []
    makers = train_step.make_scaled_loss

    def make_scaled_loss(*arguments: Any, **options: Any) -> Callable[..., Any]:
        loss = makers(*arguments, **options)

        def watched(params: Any, rows: Any, *rest: Any) -> Any:
            same = (rows["inputs"] == batch["inputs"]).all() & (
                rows["targets"] == batch["targets"]
            ).all()
            triggers.append(same)
            return loss(params, rows, *rest)

        return watched

    def spoiled(x: jax.Array, trigger: Any) -> jax.Array:
        flat = int(share * x.size)
        index = tuple(int(i) for i in np.unravel_index(flat, x.shape))
        where.append(index)
        return jnp.where(trigger, x.at[index].set(jnp.asarray(jnp.inf, x.dtype)), x)

    @jax.custom_vjp
    def backward(x: jax.Array, trigger: Any) -> jax.Array:
        return x

    backward.defvjp(lambda x, t: (x, t), lambda t, g: (spoiled(g, t), None))
    method = "to_output" if forward else "to_compute"
    original = getattr(SitePolicy, method)

    def changed(self: SitePolicy, tree: Any) -> Any:
        result = original(self, tree)
        if not self.path.endswith(site) or getattr(tree, "ndim", 0) < 3:
            return result
        return spoiled(result, triggers[-1]) if forward else backward(result, triggers[-1])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lmjax.train.step.make_scaled_loss", make_scaled_loss)
        patch.setattr("lmjax.diagnosis.tapped.make_scaled_loss", make_scaled_loss)
        patch.setattr(SitePolicy, method, changed)
        yield where


@pytest.mark.long
def test_planted_infinities_are_located_exactly(home: Path, tmp_path: Path):
    config = tiny(home, "p=f32,c=bf16,o=f32", steps=STEPS, log_every=1, checkpoint={"every": 4})
    train(config, tmp_path / "run", progress=False)
    phase = open_run(tmp_path / "run").phase
    draws, located = random.Random(0), 0
    inner = [p for p in phase.layout.paths if p not in ("embed", "positions", "blocks/0/residual")]
    elementwise = [p for p in inner if phase.sites[p].site.kind is Kind.ELEMENTWISE]
    forwards = [p for p in inner if p != "loss"]
    for number in range(20):
        forward, step = bool(number % 2), draws.randrange(9, STEPS + 1)
        site = draws.choice(forwards if forward else elementwise)
        opened = open_run(tmp_path / "run", before=step)
        twin = open_run(tmp_path / "run", before=step)
        for _ in range(step - opened.step):
            batch = twin.next_batch()
        ending = site.removeprefix("blocks/0/")
        ending = f"blocks/0/{ending}" if ending != site else site
        with planted(ending, forward, batch, draws.random()) as where:
            found = replay(opened, step - 1 if step - 1 > opened.step else step, step).non_finite
        expected = (step, site, "y" if forward else "dx", where[-1] if where else None)
        actual = found and (found.step, found.site, found.tensor, found.index)
        print(expected, actual, found and found.value)
        located += actual == expected and not math.isfinite(found.value if found else 0)
    assert located == 20
