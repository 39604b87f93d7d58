"""A warning comes exactly when doing the arithmetic shows that something is lost."""

from __future__ import annotations

import re

import jax.numpy as jnp
import numpy as np
import pytest

from lmjax.precision import parse_format
from lmjax.precision.rounding import quantize
from lmjax.train import resolve
from lmjax.train.cautions import half_ulp, warnings


@pytest.mark.parametrize("policy", ["f32", "mixed_bf16", "mixed_f16", "fp8", "nvfp4"])
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_policies_with_f32_masters_and_moments_are_fine(policy: str, family: str, tiny):
    assert (
        warnings(resolve(tiny(policy, family, optimizer={"learning_rate": 1e-5, "b2": 0.9999})))
        == []
    )


@pytest.mark.parametrize(("steps", "found"), [(5, 1), (3, 1), (6, 0)])
def test_a_warm_up_as_long_as_the_run_is_noted(steps: int, found: int, tiny):
    lines = warnings(resolve(tiny("f32", steps=steps, optimizer={"warmup_steps": 5})))
    assert len(lines) == found
    assert all("optimizer.warmup_steps=5" in line for line in lines)


@pytest.mark.parametrize("update", ["sr", "kahan"])
def test_repaired_updates_are_fine(update: str, tiny):
    assert warnings(resolve(tiny(f"p=bf16.{update}", optimizer={"learning_rate": 1e-5}))) == []


def test_the_warning_states_its_arithmetic_and_the_way_out(tiny):
    scales, weights = sorted(
        warnings(resolve(tiny("pure_bf16", optimizer={"learning_rate": 3e-5}))),
        key=lambda w: "0.02" in w,
    )
    assert "3.0e-05" in scales
    assert "of size 1," in scales
    assert "of size 0.02," in weights
    assert f"{2.0**-8:.1e}" in scales, "half the distance from 1 to the next bf16 number"
    assert f"{2.0**-14:.1e}" in weights, "0.02 lies between 2^-6 and 2^-5: 2^-6 times 2^-8"
    for line in (scales, weights):
        assert line.startswith("p=bf16:")
        assert "use p=bf16.sr, p=bf16.kahan or p=f32" in line


@pytest.mark.parametrize("name", ["bf16", "f16", "e4m3", "e5m7", "f32"])
@pytest.mark.parametrize("exponent", range(-24, -2))
def test_updates_are_reported_lost_exactly_when_adding_them_changes_nothing(
    name: str, exponent: int, tiny
):
    rate = 1.1 * 2.0**exponent  # no ties
    found = warnings(resolve(tiny(f"p={name},c=f32", optimizer={"learning_rate": rate})))
    reported = {float(re.search(r"of size ([\d.]+),", line)[1]) for line in found}
    lost = set()
    for size in (1.0, 0.02):
        stored = quantize(jnp.float32(size), name)
        if quantize(stored + jnp.float32(rate), name) == stored:
            lost.add(size)
    assert reported == lost


@pytest.mark.parametrize("name", ["bf16", "f16", "e4m3", "e3m2"])
def test_half_ulp_is_half_the_distance_to_the_next_value(name: str):
    table = parse_format(name).values()
    values = np.unique(table[np.isfinite(table) & (table > 0)])
    chosen = range(0, len(values) - 1, max(1, len(values) // 500))
    for value, following in ((values[i], values[i + 1]) for i in chosen):
        assert half_ulp(float(value), parse_format(name)) == (following - value) / 2
        assert half_ulp(float(value + following) / 2, parse_format(name)) == (following - value) / 2


@pytest.mark.parametrize("name", ["bf16", "f16", "e5m7", "e8m3", "f32"])
@pytest.mark.parametrize("b2", [0.9, 0.95, 0.99, 0.995, 0.998, 0.999, 0.9995, 0.9999])
def test_second_moments_are_reported_stuck_exactly_when_there_is_a_number_they_stay_at(
    name: str, b2: float, tiny
):
    found = warnings(resolve(tiny(f"f32,nu={name}", optimizer={"b2": b2})))
    epsilon = parse_format(name).epsilon
    first = 1.0 + epsilon * np.arange(0, min(2**12, round(1 / epsilon)))
    values = jnp.asarray(first, jnp.float32)
    stuck = bool(jnp.any(quantize(values * jnp.float32(b2), name) == values))
    assert bool(found) == stuck
    if found:
        (line,) = found
        assert line.startswith(f"nu={name}: with b2={b2:g} ")
        assert f"{1 - b2:.1e}" in line
        assert f"{epsilon / 2:.1e}" in line


def test_only_adamw_has_a_second_moment_to_stick(tiny):
    stuck = {"b2": 0.999}
    assert warnings(resolve(tiny("f32,nu=bf16", optimizer=stuck)))
    assert warnings(resolve(tiny("f32,nu=bf16", optimizer=stuck | {"name": "lion"}))) == []


def test_each_phase_is_judged_by_itself_and_by_the_learning_rates_it_sees(tiny):
    """Half a unit in the last place of 1 is 2^-8 in bf16: the cosine falls below it on its way."""
    rates = {"learning_rate": 1e-2, "warmup_steps": 5}
    assert warnings(resolve(tiny("0: bf16 | 30: f32", optimizer=rates))) == []
    (line,) = warnings(resolve(tiny("0: f32 | 90: bf16", optimizer=rates)))
    assert line.startswith("from step 90 on, p=bf16: ")
    expected = 1e-3 + 9e-3 * (1 + np.cos(np.pi * (90 - 5) / 95)) / 2
    assert f"the phase's largest learning rate {expected:.1e}" in line
    (line,) = warnings(resolve(tiny("0: bf16 | 2: f32", optimizer=rates | {"learning_rate": 8e-3})))
    assert f"largest learning rate {8e-3 * 2 / 5:.1e}" in line, "of two steps of warm-up"
    assert line.startswith("from step 0 on, ")
    (line,) = warnings(resolve(tiny("0: f32 | 9: f32,nu=bf16", optimizer=rates | {"b2": 0.999})))
    assert line.startswith("from step 9 on, nu=bf16: ")


def test_a_policy_without_phases_is_judged_by_the_peak_learning_rate(tiny):
    first, *_ = warnings(resolve(tiny("bf16", optimizer={"learning_rate": 1e-5})))
    assert first.startswith("p=bf16: an update of the peak learning rate 1.0e-05 is less than half")
