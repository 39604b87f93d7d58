"""Compiled programs round where they say they round."""

from __future__ import annotations

import ast
import warnings
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lmjax
from lmjax.precision import exact


def test_canary_passes_on_this_backend():
    exact.check_canary.cache_clear()
    exact.check_canary()


def test_plain_jit_would_drop_roundings():
    dropped = exact.dropped_roundings(jax.jit)
    if not dropped:
        pytest.skip("XLA keeps every rounding of the canary on this backend without being told to")
    assert exact.dropped_roundings(exact.jit) == 0


def test_canary_refuses_a_backend_that_drops_roundings(monkeypatch: pytest.MonkeyPatch):
    def disobedient(function):  # computes the chain in f32, as a backend with a licence to would
        return lambda x: x.astype(jnp.float32) * jnp.float32(1.3)

    monkeypatch.setattr(exact.dropped_roundings, "__defaults__", (disobedient,))
    exact.check_canary.cache_clear()
    with pytest.raises(exact.ExcessPrecisionError, match="xla_allow_excess_precision"):
        exact.check_canary()


def test_canary_counts_every_value_that_bf16_cannot_represent():
    assert exact.dropped_roundings(lambda f: lambda x: x.astype(jnp.float32)) == 0
    between = jnp.float32(1.0) + jnp.float32(2.0**-9)
    assert exact.dropped_roundings(lambda f: lambda x: jnp.full(256, between)) == 256


def test_jit_hands_its_options_on():
    double = exact.jit(lambda x: x + x, donate_argnums=0)
    x = jnp.ones(4, jnp.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        np.testing.assert_array_equal(double(x), 2.0)
    assert x.is_deleted()


@pytest.mark.parametrize(
    ("dtype", "wide"), [("bfloat16", "f4"), ("float16", "f4"), ("float32", "f4"), ("float64", "f8")]
)
def test_accumulation_is_never_narrower_than_f32(dtype: str, wide: str):
    assert exact.at_least_f32(jnp.dtype(dtype)) == np.dtype(wide)


def uses_of_jax_jit(source: str) -> list[int]:
    """Lines on which a source compiles with `jax.jit` (or `pjit`) instead of `exact.jit`.

    `jax.jit(..., inline=True)` is not a separate program: it dissolves into the program that calls
    it, which is the one that has compiler options.
    """
    tree = ast.parse(source)
    inlined = {
        id(node)
        for call in ast.walk(tree)
        if isinstance(call, ast.Call) and any(k.arg == "inline" for k in call.keywords)
        for node in ast.walk(call)
    }
    lines = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and node.attr in ("jit", "pjit"):
            of_jax = isinstance(node.value, ast.Name) and node.value.id in ("jax", "nnx")
            if of_jax and id(node) not in inlined:
                lines.append(node.lineno)
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith(("jax", "flax")):
            lines += [node.lineno for name in node.names if name.name in ("jit", "pjit")]
    return lines


def test_every_program_of_lmjax_is_compiled_by_exact_jit():
    root = Path(lmjax.__file__).parent
    guilty = {
        str(file.relative_to(root)): lines
        for file in sorted(root.rglob("*.py"))
        if file != Path(exact.__file__) and (lines := uses_of_jax_jit(file.read_text("utf-8")))
    }
    assert guilty == {}


@pytest.mark.parametrize(
    "source", ["import jax\nf = jax.jit(g)", "from jax import jit", "@nnx.jit\ndef f(): ..."]
)
def test_the_search_for_jax_jit_finds_it(source: str):
    assert uses_of_jax_jit(source)
