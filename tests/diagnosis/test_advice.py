"""Advice: shares predicted from exponents are those that rounding makes, and the policy trains."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
from run_helpers import tiny as tiny_run

from lmjax.diagnosis import advise
from lmjax.diagnosis.advice import _ladders, _policy, _trained
from lmjax.diagnosis.exponents import GRADIENTS, Exponents, f16_loss_scales, predicted
from lmjax.precision import quantize
from lmjax.precision.grammar import parse_policy
from lmjax.runs.resolved import phase_of


def exponents(x: np.ndarray) -> Exponents:
    """As telemetry counts them."""
    magnitudes = np.abs(x[x != 0])
    found, counts = np.unique(np.floor(np.log2(magnitudes)), return_counts=True)
    by_exponent = {int(e): float(c) for e, c in zip(found, counts, strict=True)}
    return Exponents(float(x.size), float(magnitudes.max()), by_exponent)


@pytest.mark.parametrize("spread", [1e-4, 1.0, 300.0])
@pytest.mark.parametrize("text", ["e4m3", "e5m2", "f16", "e3m2"])
def test_predicted_shares_are_those_of_rounding(text: str, spread: float):
    draws = np.random.default_rng(0)
    x = (draws.normal(size=20_000) * spread * np.exp(draws.normal(size=20_000))).astype(np.float32)
    found = predicted(exponents(x), text)
    rounded = np.asarray(quantize(x, text))
    assert found.underflow == pytest.approx(np.mean(rounded == 0), rel=0.1, abs=1e-3)
    largest = {"e4m3": 448, "e5m2": 57344, "f16": 65504, "e3m2": 28}[text]
    assert found.overflow == pytest.approx(np.mean(np.abs(x) > largest), rel=0.1, abs=1e-3)


def test_a_tensor_that_is_scaled_loses_what_lies_too_far_below_its_maximum():
    x = np.array([1.0, 2.0**-17, 2.0**-18.5, 2.0**-30, 0.0])
    # e4m3 reaches from 448 down to 2^-9, of which half becomes 0: 2^-10 / 448 of the maximum.
    found = predicted(exponents(x), "e4m3@tensor")
    # The share of the exponent -19 below that is taken to be uniform.
    assert found.underflow == pytest.approx((1 + 2**-10 / 448 / 2**-19 - 1) / 5)
    assert found.overflow == 0
    assert predicted(exponents(x[:2]), "e4m3@tensor").underflow == 0


def test_the_loss_scale_of_f16_lifts_gradients_above_its_smallest_number():
    small = Exponents(100.0, 2.0**-20, {-30: 50.0, -20: 50.0})
    smallest, largest = f16_loss_scales({"head/dx": small, "head/y": small}, 0.01)
    assert smallest == 2.0**5  # half of 2^-24 is 2^-25, which becomes 0
    assert largest == 2.0**34
    assert f16_loss_scales({"head/dx": Exponents(1.0, 1.0, {0: 1.0})}, 0.01)[0] is None


def test_only_what_a_chip_is_fast_at_is_advised():
    assert _ladders("")[0].operands == ("e4m3@tensor", "e5m2@tensor")
    assert _ladders("h100")[0].operands == ("e4m3@tensor", "e5m2@tensor")
    assert [ladder.compute for ladder in _ladders("V100")] == [("f16", "f32")]
    assert [ladder.operands for ladder in _ladders("a100")] == [()]
    assert [ladder.compute for ladder in _ladders("tpu-v5p")] == [("bf16", "f32")]
    with pytest.raises(ValueError, match=r"there are .*H100"):
        _ladders("abacus")


def test_each_tensor_gets_the_first_format_that_it_has_room_for(tiny):
    phase = phase_of(tiny("f32"))
    easy = Exponents(100.0, 1.0, {-1: 100.0})
    spread = Exponents(100.0, 1.0, {-1: 50.0, -40: 50.0})
    wider = Exponents(100.0, 1.0, {-1: 50.0, -20: 50.0})
    found = {
        f"{path}/{role}": easy for path, site in phase.sites.items() for role in site.site.roles
    }
    found |= {"blocks/0/mlp/up/x": wider, "blocks/1/mlp/up/x": wider, "blocks/1/mlp/down/g": spread}
    text, chosen = _policy(phase, _ladders("")[0], found, budget=0.01)
    parse_policy(text)
    assert chosen["blocks/0/mlp/down/x"] == "e4m3@tensor"
    assert chosen["blocks/0/mlp/up/x"] == "e5m2@tensor"
    assert chosen["blocks/1/mlp/down/g"] == "bf16"
    assert text == (
        "p=f32,c=bf16,o=f32,w=e4m3@tensor,x=e4m3@tensor,g=e5m2@tensor; "
        "blocks/*/mlp/up: x=e5m2@tensor; blocks/1/mlp/down: g=bf16"
    )
    sites = phase_of(dataclasses.replace(phase.config, precision=text)).sites
    assert str(sites["blocks/1/mlp/up"].activations) == "e5m2@tensor"


MODELS = {
    "gpt2": {},
    "llama": {
        "positions": "rope", "norm": "rms", "activation": "swiglu", "bias": False, "tied": False,
        "mlp_width": 32,
    },
    "bert": {
        "family": "encoder", "norm_epsilon": 1e-12, "activation": "gelu_erf", "vocab_size": 257,
    },
}  # fmt: skip


@pytest.mark.long
@pytest.mark.parametrize("target", ["", "v100"])
@pytest.mark.parametrize("name", MODELS)
def test_the_advised_policy_trains_like_f32_and_loses_what_was_predicted(
    name: str, target: str, home
):
    """A V100 has f16, in which some gradients become 0 whatever the loss scale."""
    config = tiny_run(home, model=MODELS[name], telemetry={"exact": True})
    made = advise(config, target=target, steps=40, seeds=5)
    trial = made.trials[-1]
    print(name, made.flags, f"{trial.gap:+.4f} +- {trial.half_width:.4f}")
    assert made.precision == trial.precision != "f32"
    assert trial.gap <= 0.01
    assert math.isfinite(trial.half_width)
    shares = [
        (path, m.underflow, trial.predicted[path].underflow) for path, m in trial.measured.items()
    ]
    found, expected = (sum(share[column] for share in shares) for column in (1, 2))
    print("all tensors", found, expected)
    assert max(found, expected) < 1e-3 or 0.5 <= found / expected <= 2
    for path, found, expected in shares:
        if max(found, expected) > 1e-3:
            print(path, trial.formats[path], found, expected)
            assert 0.5 <= found / expected <= 2


@pytest.mark.long
@pytest.mark.parametrize(("name", "scale"), [("gpt2", 16.0), ("llama", 64.0), ("bert", 16.0)])
def test_gradients_underflow_in_f16_as_their_exponents_in_f32_say(name: str, scale: float, home):
    """With too small a loss scale, so that some of them do, and few make others vanish."""
    small = {"loss_multiplier": 2.0**-10, "batch_size": 16, "telemetry": {"exact": True}}
    config = tiny_run(home, model=MODELS[name], **small)
    (wide,) = _trained(config, "f32", 8, 1)
    (narrow,) = _trained(config, "p=f32,c=f16,o=f32", 8, 1, loss_scale=scale)
    compared = []
    for path, lost in narrow.lost_to(wide).items():
        exponents = wide.exponents[path].times(scale if path.endswith(GRADIENTS) else 1.0)
        expected = predicted(exponents, narrow.formats[path]).underflow
        if max(lost.underflow, expected) > 0.01 and narrow.formats[path] == "f16":
            compared.append((path, narrow.formats[path], lost.underflow, expected))
    print(name, *compared, sep="\n")
    near = [0.5 <= found / expected <= 2 for _, _, found, expected in compared]
    assert len(near) > 5
    assert sum(near) >= 0.9 * len(near)  # a sum of what vanished has more zeros than in f32
