"""What is held between computations: the dtypes of its parts, and the numbers read back."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmjax.precision.formats import parse_format
from lmjax.precision.quantizer import parse_quantizer
from lmjax.precision.scaling import fake_quantize
from lmjax.precision.stored import decode, encode, holder

HOLDERS = {
    "bf16": "bfloat16",
    "e4m3": "float8_e4m3fn",
    "int4": "int8",
    "e3m2": "float8_e5m2",
    "e2m3": "float8_e3m4",
    "e4m2": "float8_e5m2",
    "e5m7": "float16",
    "e8m5": "bfloat16",
    "tf32": "float32",
    "int3": "int8",
    "int5": "int8",
    "int13": "int16",
}


@pytest.mark.parametrize(("name", "dtype"), HOLDERS.items())
def test_the_holder_of_a_format_is_the_narrowest_dtype_of_bytes(name: str, dtype: str):
    number_format = parse_format(name)
    held = holder(number_format)
    assert held.name == dtype
    if number_format.bits <= 16:
        values = number_format.values()
        np.testing.assert_array_equal(values.astype(held).astype(np.float64), values)


def test_the_fractions_of_mxint8_are_held():
    mxint8 = parse_quantizer("mxint8").format
    values = mxint8.values()
    assert values[1] == 2.0**-6
    np.testing.assert_array_equal(values.astype(holder(mxint8)).astype(np.float64), values)


KINDS = {
    "e5m2": ("float8_e5m2",),
    "e3m2": ("float8_e5m2",),
    "e4m3@channel": ("float8_e4m3fn", "float32"),
    "int5@block3": ("int8", "float32"),
    "int8@channel.affine": ("int8", "float32", "int8"),
    "mxfp4": ("float8_e3m4", "float8_e8m0fnu"),
    "e4m3@tensor": ("float8_e4m3fn", "float32"),
    "nvfp4": ("float8_e3m4", "float8_e4m3fn", "float32"),
}
"""Dtypes of elements, factors, and zero points or the factor of factors."""


@pytest.fixture(scope="module")
def stored(compile_fast: Any) -> Any:
    """For each kind: what is stored, what is read back, and what quantizing does, along axis 1."""
    x = np.random.default_rng(0).normal(size=(3, 40, 5)).astype(np.float32)
    x *= np.float32(2.0) ** np.arange(-130, -125, dtype=np.float32)  # factors of every size

    def run(x: jax.Array) -> Any:
        given = {kind: parse_quantizer(kind) for kind in KINDS}
        held = {kind: encode(x, quantizer, axis=1) for kind, quantizer in given.items()}
        read = {kind: decode(held[kind], q, axis=1) for kind, q in given.items()}
        return held, read, {kind: fake_quantize(x, q, axis=1) for kind, q in given.items()}

    return compile_fast(run)(x)


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_read_back_is_what_quantizing_gives(kind: str, stored: Any):
    held, read, expected = (part[kind] for part in stored)
    assert tuple(leaf.dtype.name for leaf in jax.tree.leaves(held)) == KINDS[kind]
    assert read.dtype == jnp.float32
    np.testing.assert_array_equal(read, expected)


@pytest.mark.parametrize("kind", ["int8@channel", "mxfp8"])
def test_a_failure_stays_visible(kind: str, compile_fast: Any):
    quantizer = parse_quantizer(kind)
    x = np.asarray([[1.0, np.inf], [1.0, 2.0]], np.float32)
    read = compile_fast(lambda x: decode(encode(x, quantizer), quantizer))(x)
    assert np.isnan(read[0]).all()
    assert np.isfinite(read[1]).all()
