"""Claim A1 turns red when the loss scaler is broken in ways that a loss curve hardly shows."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax
import pytest
from run_helpers import home

from experiments.ablations import loss_scale_invariants as invariants
from lmjax.ablation.evidence import Finding
from lmjax.optim import optimizer
from lmjax.optim.loss_scale import LossScaleConfig, all_finite, with_loss_scale
from lmjax.runs.checkpoint import Checkpoints, Restored

__all__ = ["home"]


def halve_on_growth(patch: pytest.MonkeyPatch) -> None:
    """Gradients are divided by the scale to come instead of the one that they were scaled by."""

    def broken(inner: Any, config: LossScaleConfig, *others: Any) -> Any:
        sound = with_loss_scale(inner, config, *others)

        def update(gradients: Any, state: Any, params: Any = None, **extra: Any) -> Any:
            grows = state.good_steps + 1 >= config.growth_interval
            gradients = jax.tree.map(lambda g: jnp.where(grows, g / 2, g), gradients)
            return sound.update(gradients, state, params, **extra)

        return optax.GradientTransformationExtraArgs(sound.init, update)

    patch.setattr(optimizer, "with_loss_scale", broken)


def advance_adam_on_skips(patch: pytest.MonkeyPatch) -> None:
    """A skipped step is one with zero gradients: moments decay, and their count increases."""

    def broken(inner: Any, config: LossScaleConfig, *others: Any) -> Any:
        sound = with_loss_scale(inner, config, *others)

        def update(gradients: Any, state: Any, params: Any = None, **extra: Any) -> Any:
            finite = all_finite(gradients)
            updates, new = sound.update(gradients, state, params, **extra)
            zeros = jax.tree.map(jnp.zeros_like, gradients)
            advanced = inner.update(zeros, state.inner, params)[1]
            moved = jax.tree.map(lambda n, a: jnp.where(finite, n, a), new.inner, advanced)
            return updates, new._replace(inner=moved)

        return optax.GradientTransformationExtraArgs(sound.init, update)

    patch.setattr(optimizer, "with_loss_scale", broken)


def lose_scale_on_resume(patch: pytest.MonkeyPatch) -> None:
    """A checkpoint is restored without its loss scale, which starts again at its first value."""
    sound = Checkpoints.restore

    def broken(self: Checkpoints, *arguments: Any, **options: Any) -> Restored:
        restored = sound(self, *arguments, **options)
        opt_state = restored.state.opt_state
        opt_state = opt_state._replace(scale=jnp.full_like(opt_state.scale, 2.0**10))
        return restored._replace(state=restored.state._replace(opt_state=opt_state))

    patch.setattr(Checkpoints, "restore", broken)


@pytest.mark.parametrize(
    ("finding", "break_it"),
    [
        (invariants.growth, halve_on_growth),
        pytest.param(invariants.skips, advance_adam_on_skips, marks=pytest.mark.long),
        pytest.param(invariants.resume, lose_scale_on_resume, marks=pytest.mark.long),
    ],
)
def test_each_defect_turns_its_finding_red(
    finding: Callable[[], Finding],
    break_it: Callable[[pytest.MonkeyPatch], None],
    home: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert finding().outcome == "confirmed"
    break_it(monkeypatch)
    assert finding().outcome == "refuted"
