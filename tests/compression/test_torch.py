"""int8 and int4 elements are those of torch for the same factors and zero points, bit for bit."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

from lmjax.precision.packed import pack
from lmjax.precision.quantizer import parse_quantizer
from lmjax.precision.scaling import quantize_with_scale

torch = pytest.importorskip("torch")


def weights(spread: float) -> np.ndarray:
    """f32[64, 48]: rows of very different sizes, zeros, ties of both signs and a row of zeros."""
    generator = np.random.default_rng(0)
    x = generator.normal(size=(64, 48)) * np.exp2(generator.uniform(-spread, spread, (64, 1)))
    x[3], x[4, ::3], x[5] = 0.0, 0.0, np.linspace(-1, 1, 48)
    x[6, :33] = np.arange(-16, 17) / 2.0
    return x.astype(np.float32)


@pytest.mark.parametrize("option", ["", ".affine"])
@pytest.mark.parametrize("spread", [0.0, 20.0])
def test_int8_is_that_of_quantize_per_tensor(option: str, spread: float) -> None:
    x, quantizer = weights(spread), parse_quantizer(f"int8@tensor{option}")
    ours = quantize_with_scale(jnp.asarray(x), quantizer)
    zero = 0 if ours.zero_point is None else int(ours.zero_point)
    theirs = torch.quantize_per_tensor(torch.tensor(x), float(ours.scale), zero, torch.qint8)
    np.testing.assert_array_equal(np.asarray(ours.values, np.int8), theirs.int_repr().numpy())
    dense = pack(jnp.asarray(x), quantizer, axis=0).dense()
    np.testing.assert_array_equal(dense, theirs.dequantize().numpy())


@pytest.mark.parametrize("option", ["", ".affine"])
def test_int8_is_that_of_quantize_per_channel(option: str) -> None:
    x, quantizer = weights(8.0), parse_quantizer(f"int8@channel{option}")
    ours = quantize_with_scale(jnp.asarray(x), quantizer, axis=1)
    scale = torch.tensor(np.asarray(ours.scale)[:, 0])
    zero = torch.zeros(64, dtype=torch.int64)
    if ours.zero_point is not None:
        zero = torch.tensor(np.asarray(ours.zero_point)[:, 0].astype(np.int64))
    theirs = torch.quantize_per_channel(torch.tensor(x), scale, zero, 0, torch.qint8)
    np.testing.assert_array_equal(np.asarray(ours.values, np.int8), theirs.int_repr().numpy())


@pytest.mark.parametrize("option", ["", ".affine"])
@pytest.mark.parametrize("groups", ["tensor", "channel"])
def test_int4_is_that_of_fake_quantization(groups: str, option: str) -> None:
    x, quantizer = weights(4.0), parse_quantizer(f"int4@{groups}{option}")
    stored = pack(jnp.asarray(x), quantizer, axis=1)
    assert stored.codes.nbytes == x.size // 2
    scale = np.asarray(stored.scale)
    zero = np.zeros_like(scale) if stored.zero_point is None else np.asarray(stored.zero_point)
    if groups == "tensor":
        theirs = torch.fake_quantize_per_tensor_affine(
            torch.tensor(x), float(scale), int(zero), -8, 7
        )
    else:
        theirs = torch.fake_quantize_per_channel_affine(
            torch.tensor(x),
            torch.tensor(scale[:, 0]),
            torch.tensor(zero[:, 0].astype(np.int32)),
            0,
            -8,
            7,
        )
    np.testing.assert_array_equal(stored.dense(), theirs.numpy())
