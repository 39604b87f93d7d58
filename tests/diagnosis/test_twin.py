"""The twin: errors of every tensor, where they come from, and nothing when it is off."""

from __future__ import annotations

import dataclasses
import math
import random
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmjax.diagnosis import Twin, twin
from lmjax.diagnosis.twin import _squares_fit, phase_under
from lmjax.diagnosis.twin_plot import draw_twin, highest
from lmjax.model import apply, layout
from lmjax.optim.loss_scale import LossScaleConfig
from lmjax.train.step import make_scaled_loss

PLANTED = "blocks/1/mlp/up"


POLICY = f"p=f32,c=bf16; {PLANTED}: c=e5m2; loss: c=e5m2"


@pytest.fixture(scope="module")
def made(tiny, opened, draw_batch) -> Twin:
    """A run in bf16 with two sites in e5m2, against f32."""
    config = tiny(POLICY)
    return twin(opened(config), draw_batch(config))


def test_sites_in_a_narrow_format_are_named_and_no_other(made: Twin):
    assert made.sites == (PLANTED, "loss")
    assert made.first is not None
    assert made.first.path == f"{PLANTED}/y"
    own = {d.path: d.own_error for d in made.differences}
    assert 0.02 < own[f"{PLANTED}/y"] < 0.2  # two bits of mantissa, in operands and result
    assert 1e-3 < own["blocks/0/mlp/up/y"] < 4e-3  # seven


def test_tensors_come_in_the_order_of_computation(made: Twin):
    paths = [d.path for d in made.differences]
    assert len(set(paths)) == len(paths)
    forwards = [
        "embed/y", "embed/sum", "blocks/0/residual/entering", "blocks/0/attention/scores/y",
        "blocks/0/attention/out/y", "blocks/0/residual/between", "blocks/0/mlp/down/y",
        "blocks/0/residual/y", "blocks/1/residual/entering", "blocks/1/residual/y", "head/y",
        "loss/y",
    ]  # fmt: skip
    backwards = [
        "loss/dx", "head/dy", "head/dx", "blocks/1/mlp/down/dy", "blocks/1/mlp/down/dx",
        "blocks/1/attention/query/dx", "blocks/0/mlp/down/dx", "embed/dy", "embed/dx",
    ]  # fmt: skip
    places = [paths.index(path) for path in forwards + backwards]
    assert places == sorted(places)


def test_errors_are_those_of_the_logits_computed_without_a_twin(
    made: Twin, tiny, opened, draw_batch, compile_fast
):
    config = tiny(POLICY)
    run, tokens = opened(config), draw_batch(config)["inputs"]
    phases = run.phase, phase_under(run.phase, "f32")
    both = [
        compile_fast(lambda p, t, s=phase.sites: apply(p, t, config=config.model, sites=s))(
            run.state.params, tokens
        )
        for phase in phases
    ]
    a, b = (np.asarray(logits, np.float64) for logits in both)
    found = next(d for d in made.differences if d.path == "head/y")
    expected = np.linalg.norm(a - b) / np.linalg.norm(b)
    assert found.relative_error == pytest.approx(expected, rel=0.02)
    assert found.bits == pytest.approx(-math.log2(expected), abs=0.03)
    cosine = np.sum(a * b) / np.linalg.norm(a) / np.linalg.norm(b)
    assert 1 - found.cosine == pytest.approx(1 - cosine, rel=0.05)
    assert found.largest_error == pytest.approx(np.abs(a - b).max() / np.abs(b).max(), rel=0.05)


def test_a_second_run_is_for_squares_that_overflow_or_underflow():
    assert _squares_fit({"x": np.float32(0), "y": np.array([1, np.inf, 1e9], np.float32)})
    assert not _squares_fit({"x": np.float32(1), "y": np.array([1, 1e-10], np.float32)})


def test_it_is_drawn(made: Twin, tmp_path: Path):
    draw_twin(made, tmp_path / "twin.png", "a_$run")
    assert (tmp_path / "twin.png").read_bytes().startswith(b"\x89PNG")


def test_errors_far_above_the_bound_are_in_the_picture(made: Twin):
    """A gradient that is lost altogether has a relative error of 1, above all values."""
    assert highest(made) == max(max(d.relative_error for d in made.differences), made.bound)
    *others, last = made.differences
    lost = dataclasses.replace(last, relative_error=0.99, own_error=math.nan)
    assert highest(dataclasses.replace(made, differences=(*others, lost))) == 0.99
    endless = dataclasses.replace(last, relative_error=math.inf)
    assert highest(dataclasses.replace(made, differences=(*others, endless))) == 1e3


def test_a_step_without_a_twin_is_the_program_that_it_was(
    tiny, opened, draw_batch, monkeypatch: pytest.MonkeyPatch
):
    config = tiny("p=f32,c=bf16")
    run, batch = opened(config), draw_batch(config)

    def traced() -> str:
        gradient = jax.grad(make_scaled_loss(run.phase, run.mesh), has_aux=True)
        inputs = run.state.params, batch, jax.random.key(0), jnp.float32(1)
        return str(jax.make_jaxpr(gradient)(*inputs))

    with_taps = traced()
    same: Any = lambda x, *others: x
    monkeypatch.setattr("lmjax.precision.probes.handed_on", same)
    monkeypatch.setattr("lmjax.precision.matmul.handed_on", same)
    monkeypatch.setattr("lmjax.precision.matmul.tap_cotangent", same)
    monkeypatch.setattr("lmjax.model.sites.tap_cotangent", same)
    monkeypatch.setattr("lmjax.model.sites.tap", same)
    assert traced() == with_taps


@pytest.mark.long
@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize("precision", ["f32", "p=f32,c=bf16", "p=f32,c=bf16,w=e4m3@tensor"])
def test_the_twin_of_a_policy_with_itself_is_all_zeros(
    precision: str, family: str, tiny, opened, draw_batch
):
    config = tiny(precision, family)
    made = twin(opened(config), draw_batch(config), reference=precision)
    assert made.loss == made.reference_loss
    for d in made.differences:
        assert (d.relative_error, d.largest_error, d.non_finite, d.cosine) == (0, 0, 0, 1), d
        assert d.own_error == 0 or d.role == "dy", d
    assert made.first is None
    assert made.sites == ()


@pytest.mark.long
def test_gradients_whose_squares_vanish_have_the_errors_of_larger_ones(tiny, opened, draw_batch):
    """A power of two changes no relative error, as long as the exponents of bf16 suffice."""
    config, scale = tiny("p=f32,c=bf16"), 2.0**-64
    small = LossScaleConfig(kind="static", initial=scale, minimum=scale)
    configs = config, dataclasses.replace(config, loss_scale=small)
    both = (twin(opened(one), draw_batch(one)).differences for one in configs)
    for plain, scaled in zip(*both, strict=True):
        assert scaled.relative_error == pytest.approx(plain.relative_error, rel=1e-3), plain
        assert scaled.cosine == pytest.approx(plain.cosine, abs=1e-6), plain


@pytest.mark.long
@pytest.mark.parametrize(("count", "least"), [(1, 19), (2, 17)])
def test_planted_casts_are_named_in_nearly_all_draws(
    count: int, least: int, tiny, opened, draw_batch
):
    draws, named = random.Random(count), 0
    for seed in range(20):
        family = draws.choice(["gpt2", "llama"])
        config = tiny("p=f32,c=bf16", family)
        planted = draws.sample(list(layout(config.model).paths), count)
        rules = "".join(f"; {site}: c=e5m2" for site in planted)
        config = dataclasses.replace(config, precision=config.precision + rules)
        found = twin(opened(config, seed), draw_batch(config, seed)).sites
        print(family, planted, found)
        named += set(planted) <= set(found)
    assert named >= least
