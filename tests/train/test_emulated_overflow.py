"""Dynamic loss scaling of made-up formats: the course that the same format has in hardware."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from lmjax.optim.loss_scale import LossScaleConfig
from lmjax.precision import policy

STEPS = 60


@pytest.fixture(scope="module")
def course(tiny, draw_state, draw_batch, compiled_step) -> Any:
    """`course(precision)`: loss scales of 60 steps that raise it every other step, and skips."""

    def run(precision: str) -> tuple[list[float], int]:
        scale = LossScaleConfig(growth_interval=2)
        config = tiny(precision, model={"layers": 1}, loss_scale=scale).resolved()
        state, batch, step = draw_state(config), draw_batch(config), compiled_step(config)
        scales = []
        for _ in range(STEPS):
            state, metrics = step(state, batch)
            scales.append(float(np.log2(metrics["loss_scale"])))
            assert np.isfinite(float(metrics["loss"]))
        return scales, int(metrics["skipped_steps"])

    return run


@pytest.mark.long
def test_a_made_up_format_skips_steps_as_the_nearest_one_of_hardware_does(course):
    scales, skipped = course("p=f32,c=f16,o=f32")
    assert course("p=f32,c=e5m10,o=f32") == (scales, skipped)
    emulated, also_skipped = course("p=f32,c=e5m9,o=f32")
    assert skipped > 5
    assert abs(also_skipped - skipped) <= 3
    assert np.abs(np.subtract(emulated, scales)).max() <= 2


@pytest.mark.parametrize(
    "precision",
    [pytest.param("p=f32,c=e4m3,o=f32", marks=pytest.mark.long), "p=f32,c=bf16,o=f32,g=e4m3"],
)
def test_clamps_of_cotangents_lower_the_scale(course, precision: str):
    scales, skipped = course(precision)
    assert skipped > 5
    assert max(scales) < 20


@pytest.mark.long
def test_emulated_f16_has_the_course_of_f16(course, monkeypatch):
    scales, _ = course("p=f32,c=f16,o=f32")
    monkeypatch.setattr(policy, "NATIVE", ("f64", "f32", "bf16"))
    emulated, _ = course("p=f32,c=f16,o=f32,m=tf32; **: m=highest")
    assert emulated[:20] == scales[:20]
    assert np.abs(np.subtract(emulated, scales)).max() <= 2
