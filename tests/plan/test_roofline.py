"""A roofline counts arithmetic, memory and network, each at the rate of the data sheet."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from lmjax.model import parameter_count
from lmjax.plan import CHIPS, Chip, Collective, roofline
from lmjax.train import Config, phase_of

H100, V5P = CHIPS
MESH = {"data": 2, "fsdp": 8, "tensor": 1, "sequence": 1}


def gather(*axes: str, size: float = 8e9, group: int = 8) -> Collective:
    """An all-gather of so many bytes."""
    return Collective("all-gather", "bf16", size, group, axes, 1, "")


def test_arithmetic_is_six_flops_a_weight_and_token_and_attention(tiny: Callable[..., Config]):
    config = tiny("mixed_bf16", batch_size=32)
    model = config.model
    tokens = 32 * 16
    weights = model.layers * 12 * model.width**2 + model.vocab_size * model.width
    assert weights < parameter_count(model)
    attention = 12 * model.layers * model.width * config.context
    line = roofline(phase_of(config), MESH, [], H100)
    flops = tokens * (6 * weights + attention) / 16
    assert line.compute == pytest.approx(flops / H100.flops["bf16"])
    assert roofline(phase_of(tiny("f32", batch_size=32)), MESH, [], H100).compute == pytest.approx(
        flops / H100.flops["f32"]
    )
    assert line.tokens == tokens


def test_rematerialised_blocks_are_computed_once_more(tiny: Callable[..., Config]):
    once = roofline(phase_of(tiny()), MESH, [], V5P).compute
    again = roofline(phase_of(tiny(model={"remat": "full"})), MESH, [], V5P).compute
    assert 1.2 < again / once < 4 / 3, "all but the head"


def test_narrow_operands_are_multiplied_at_their_rate(tiny: Callable[..., Config]):
    fp8 = "mixed_bf16,w=e4m3@tensor,x=e4m3@tensor"
    plain, narrow = (
        roofline(phase_of(tiny(p)), MESH, [], H100).compute for p in ("mixed_bf16", fp8)
    )
    assert narrow < plain


@pytest.mark.parametrize(
    ("chip", "axes", "group", "rate"),
    [
        (H100, ("fsdp",), 8, H100.near),  # within a node
        (H100, ("data",), 2, H100.far),  # one of each node
        (H100, ("data", "fsdp"), 16, 8 * H100.far),  # all eight ports of a node
        (V5P, ("data", "fsdp"), 16, V5P.near),
    ],
)
def test_a_group_sends_as_fast_as_what_it_crosses(
    chip: Chip, axes: tuple[str, ...], group: int, rate: float, tiny: Callable[..., Config]
):
    line = roofline(phase_of(tiny()), MESH, [gather(*axes, group=group)], chip)
    assert line.sent == pytest.approx(8e9 * (group - 1) / group / rate)
    assert line.network == {" x ".join(axes): line.sent}


def test_the_longest_of_three_is_the_bound(tiny: Callable[..., Config]):
    line = roofline(phase_of(tiny()), MESH, [gather("data", group=2)], H100)
    assert line.bound == "network"
    assert line.least == line.sent
    assert line.most == pytest.approx(line.compute + line.memory + line.sent)
