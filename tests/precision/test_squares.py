"""Norms are right wherever they can be represented, and have the plain formula's bits elsewhere."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmjax.precision.squares import root_sum_square, scale_for_squares, tree_root

MAGNITUDES = [1e-37, 1e-25, 1e-19, 1e-3, 1.0, 1e9, 2e19, 1e30, 1e36]


def drawn(magnitude: float, shape: tuple[int, ...] = (5, 7), seed: int = 0) -> jax.Array:
    values = np.random.default_rng(seed).normal(size=shape) * magnitude
    return jnp.asarray(values.astype(np.float32))


def exact_norm(*arrays: jax.Array) -> float:
    return float(np.sqrt(sum(np.sum(np.square(np.asarray(x, np.float64))) for x in arrays)))


@pytest.mark.parametrize("in_order", [False, True])
@pytest.mark.parametrize("magnitude", MAGNITUDES)
def test_a_norm_is_right_although_squares_overflow_or_vanish(magnitude: float, in_order: bool):
    tree = {"a": drawn(magnitude), "b": drawn(magnitude * 1e-2, (3,), 1), "c": jnp.zeros((0, 2))}
    root = tree_root(tree, in_order=in_order)
    assert float(root.value) == pytest.approx(exact_norm(tree["a"], tree["b"]), rel=1e-6)


def test_a_norm_beyond_the_format_is_infinite_and_its_scaled_form_is_not():
    root = tree_root([jnp.full(100, 3e38, jnp.float32)])
    assert float(root.value) == np.inf
    assert float(root.scaled) / float(root.scale) == pytest.approx(3e39, rel=1e-6)


@pytest.mark.parametrize("broken", [np.inf, -np.inf, np.nan])
def test_a_norm_of_what_is_not_finite_is_not_finite(broken: float):
    assert not np.isfinite(float(tree_root([jnp.asarray([1.0, broken])]).value))
    assert not np.isfinite(float(root_sum_square(jnp.asarray([1e-30, broken]))))


def test_a_norm_of_zeros_is_zero():
    assert float(tree_root([jnp.zeros(3)]).value) == 0.0
    assert float(root_sum_square(jnp.zeros((2, 0)))) == 0.0


@pytest.mark.parametrize("exponent", [-31, -20, 0, 10, 31])
def test_ordinary_values_are_not_scaled_and_have_the_bits_of_the_plain_formula(exponent: int):
    x = drawn(2.0**exponent)
    x = x / jnp.max(jnp.abs(x)) * 2.0**exponent
    plain = jax.jit(lambda x: jnp.sqrt(jnp.sum(jnp.square(x))))
    assert float(scale_for_squares(jnp.max(jnp.abs(x)))) == 1.0
    assert float(jax.jit(tree_root)([x]).value) == float(plain(x))
    assert float(jax.jit(root_sum_square)(x)) == float(plain(x))


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_scales_are_powers_of_two_whose_reciprocals_are_normal(dtype: str):
    with jax.enable_x64(dtype == "float64"):
        info = np.finfo(dtype)
        ends = [info.smallest_subnormal, info.tiny, info.max, 2.0 ** (info.maxexp // 4)]
        scales = np.asarray(scale_for_squares(jnp.asarray([*ends, 0.0, np.inf, np.nan], dtype)))
    assert scales.dtype == dtype
    assert np.all(np.frexp(scales)[0] == 0.5)
    assert np.all((scales >= info.tiny) & (1 / scales >= info.tiny))
    assert np.all(scales[2:4] < 1)
    assert np.all(scales[:2] > 1)


def test_each_row_has_a_scale_of_its_own():
    x = jnp.stack([drawn(1e-25), drawn(1.0), drawn(1e30)])
    expected = [exact_norm(row) for row in x]
    np.testing.assert_allclose(root_sum_square(x, (1, 2)), expected, rtol=1e-6)


def test_wide_and_narrow_arrays_are_squared_in_the_widest():
    with jax.enable_x64(True):
        tree = [jnp.asarray([3e200], jnp.float64), jnp.asarray([4.0], jnp.bfloat16)]
        assert float(tree_root(tree).value) == pytest.approx(3e200, rel=1e-12)
