"""Random Hadamard transforms: what they are, what they leave alone, and what they are good for."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg

from lmjax.precision.grammar import parse_policy
from lmjax.precision.hadamard import random_signs, rotate
from lmjax.precision.matmul import einsum, hand_on
from lmjax.precision.policy import SitePolicy
from lmjax.precision.probes import Census, Fate, Probe
from lmjax.precision.quantizer import parse_quantizer
from lmjax.precision.scaling import fake_quantize
from lmjax.precision.sites import SITES

SIZES = {"b": 3, "t": 5, "s": 7, "k": 37, "n": 23, "h": 19, "g": 2}
SPECS = {
    "btk,kn->btn": "weights",
    "btkgh,bskh->bkgts": "activations",
    "bkgts,bskh->btkgh": "activations",
}
"""Products of the model; no size divides into blocks."""


def linear(text: str) -> SitePolicy:
    return parse_policy(text).resolve("blocks/0/mlp/up")


def operands(spec: str, seed: int = 0) -> list[np.ndarray]:
    """Two f32 operands and a cotangent."""
    inputs, _, output = spec.partition("->")
    sizes = SIZES | ({"k": 2} if "g" in spec else {})
    generator = np.random.default_rng(seed)
    shapes = [[sizes[index] for index in axes] for axes in (*inputs.split(","), output)]
    return [generator.normal(size=shape).astype(np.float32) for shape in shapes]


def product_and_gradients(
    spec: str,
    site: SitePolicy,
    x: Any,
    w: Any,
    g: Any,
    *,
    key: Any = None,
    factors: Any = None,
    unit: bool = False,
) -> tuple[jax.Array, ...]:
    probe = Probe(factors, {}) if factors else None
    kind = "scores" if SPECS.get(spec, "weights") == "activations" else "up"
    site = replace(site, site=SITES[kind])
    how = {"key": key, "probe": probe, "unit": unit}
    product = functools.partial(einsum, spec, site=site, **how)
    y, pullback = jax.vjp(product, jnp.asarray(x), jnp.asarray(w))
    return (y, *pullback(jnp.asarray(g).astype(y.dtype)))


# --- the transform


@pytest.mark.parametrize("size", [2, 32])
def test_the_matrix_is_that_of_hadamard_behind_signs(size: int):
    plain = rotate(jnp.eye(size, dtype=jnp.float32), -1, jnp.ones(size, jnp.float32))
    np.testing.assert_allclose(plain, scipy.linalg.hadamard(size) / math.sqrt(size), rtol=1e-7)
    signs = random_signs(size, jax.random.key(3))
    matrix = np.asarray(rotate(jnp.eye(size, dtype=jnp.float32), -1, signs), np.float64)
    np.testing.assert_array_equal(matrix, np.asarray(signs)[:, None] * np.asarray(plain))
    np.testing.assert_allclose(matrix @ matrix.T, np.eye(size), atol=1e-6)


@pytest.mark.parametrize("axis", [1, -1])
def test_blocks_are_cut_along_one_axis_that_is_filled_up_with_zeros(axis: int):
    signs = random_signs(4, jax.random.key(0))
    matrix = np.asarray(rotate(jnp.eye(4, dtype=jnp.float32), -1, signs), np.float64)
    x = np.random.default_rng(0).normal(size=(3, 6, 8))
    last = np.moveaxis(x, axis, -1)
    filled = np.pad(last, [(0, 0), (0, 0), (0, -last.shape[-1] % 4)])
    blocks = filled.reshape(*filled.shape[:-1], -1, 4) @ matrix
    expected = np.moveaxis(blocks.reshape(filled.shape), -1, axis)
    rotated = rotate(jnp.asarray(x, jnp.bfloat16), axis, signs)
    assert rotated.dtype == jnp.float32
    np.testing.assert_allclose(rotated, expected, atol=0.02)


def test_signs_are_random_with_a_key_and_fixed_without():
    draw = lambda seed: np.asarray(random_signs(64, jax.random.key(seed)))
    fixed = np.asarray(random_signs(64, None))
    np.testing.assert_array_equal(fixed, random_signs(64, None))
    for signs in (fixed, draw(1), draw(2)):
        assert set(signs.tolist()) == {1.0, -1.0}
    assert np.any(draw(1) != draw(2))


# --- in products


ROTATED = {"x": (True, False, True), "xb": (False, False, True), "g": (False, True, True)}
"""Which of y, dx and dw an option rotates where the second operand is weights."""


@pytest.mark.parametrize(
    ("spec", "unit"), [*((spec, False) for spec in SPECS), ("btk,kn->btn", True)]
)
def test_products_do_not_change_but_for_rounding(spec: str, unit: bool, compile_fast):
    """Numbers of f32 are rounded to f32 here, so that the rotation is all there is."""
    x, w, g = operands(spec)
    site = linear("f32,x=f32@tensor.rht4,g=f32@tensor.rht")
    run = compile_fast(functools.partial(product_and_gradients, spec, site, unit=unit))
    inputs, _, y_axes = spec.partition("->")
    x_axes, w_axes = inputs.split(",")
    products = {
        spec: (x, w),
        f"{y_axes},{w_axes}->{x_axes}": (g, w),
        f"{x_axes},{y_axes}->{w_axes}": (x, g),
    }
    rotated = run(x, w, g, key=jax.random.key(0))
    for actual, (product, pair) in zip(rotated, products.items(), strict=True):
        wanted = np.einsum(product, *(np.float64(a) for a in pair))
        # Without shared indices that are kept, this quotient is the number of terms, squared.
        terms = math.sqrt(pair[0].size * pair[1].size / wanted.size)
        wanted /= math.sqrt(terms) if unit else 1.0
        np.testing.assert_allclose(actual, wanted, atol=3e-6 * np.abs(wanted).max())


def test_an_option_rotates_its_products_and_no_others(compile_fast):
    spec = "btk,kn->btn"
    drawn = operands(spec)
    run = lambda text: compile_fast(functools.partial(product_and_gradients, spec, linear(text)))
    narrow = "int8@channel"
    plain = run(f"f32,x={narrow},g={narrow}")(*drawn)
    for key, expected in ROTATED.items():
        changed = run(f"f32,x={narrow},g={narrow}; **/up: {key}={narrow}.rht")(*drawn)
        differs = tuple(bool(np.any(a != b)) for a, b in zip(plain, changed, strict=True))
        assert differs == expected, key


def test_rotated_operands_are_quantized_along_the_last_axis_of_the_sum(compile_fast):
    """By hand, in f32: the weight gradient, which sums over batch and positions."""
    spec = "btk,kn->btn"
    x, w, g = operands(spec)
    site = linear("f32,xb=mxfp4.rht,g=mxfp4")
    ours = compile_fast(functools.partial(product_and_gradients, spec, site))(x, w, g)[2]

    @compile_fast
    def rotated(a: jax.Array) -> jax.Array:
        turned = rotate(a, 1, random_signs(16, None))
        return fake_quantize(turned, parse_quantizer("mxfp4"), axis=1)

    wanted = np.einsum("btk,btn->kn", np.float64(rotated(x)), np.float64(rotated(g)))
    np.testing.assert_allclose(ours, wanted, atol=1e-5 * np.abs(wanted).max())


def test_rotated_operands_are_rounded_to_the_compute_format(compile_fast):
    """A rotation by hand of two ones and 2^-9: half of their sum needs one bit more than bf16."""
    x = jnp.asarray([[[1.0, 1.0, 2.0**-7, 0.0]]], jnp.float32)
    w = jnp.eye(4, dtype=jnp.float32)
    sites = (linear(f"p=f32,c={c},x=f32@tensor.rht4") for c in ("f32", "bf16"))
    product = functools.partial(einsum, "btk,kn->btn")
    wide, narrow = (
        np.asarray(compile_fast(functools.partial(product, site=site))(x, w)) for site in sites
    )
    np.testing.assert_allclose(wide, x, atol=1e-6)
    assert narrow[0, 0, 2] != x[0, 0, 2]


def test_the_longer_block_counts_where_both_operands_ask_for_one(compile_fast):
    spec = "btk,kn->btn"
    x, w, _ = operands(spec)
    run = lambda text: compile_fast(functools.partial(einsum, spec, site=linear(text)))(x, w)
    mixed = run("f32,w=int8@channel.rht8,x=int8@channel.rht32")
    np.testing.assert_array_equal(mixed, run("f32,w=int8@channel,x=int8@channel.rht32"))
    assert np.any(mixed != run("f32,w=int8@channel.rht8,x=int8@channel"))


def test_a_delayed_factor_is_not_that_of_a_rotated_tensor(compile_fast):
    spec = "btk,kn->btn"
    drawn = operands(spec)
    run = lambda text: compile_fast(functools.partial(product_and_gradients, spec, linear(text)))
    far_off = {"x": jnp.float32(2.0**4)}
    delayed = run("f32,x=e4m3@tensor.delayed,g=mxfp4.rht")(*drawn, factors=far_off)
    current = run("f32,x=e4m3@tensor,g=mxfp4.rht")(*drawn)
    assert np.any(delayed[0] != current[0]), "the forward product is not rotated"
    np.testing.assert_array_equal(delayed[2], current[2])
    other = linear("f32,x=e4m3@tensor.delayed,xb=mxfp8")
    traced = functools.partial(product_and_gradients, spec, other, factors=far_off)
    jax.eval_shape(traced, *drawn)  # which refuses a factor where none is delayed


def test_a_product_that_sums_over_nothing_is_left_alone():
    ones = np.ones((2, 3), np.float32)
    ours = product_and_gradients("bk,bk->", linear("f32,g=e4m3@tensor.rht"), ones, ones, 1.0)
    np.testing.assert_array_equal(ours[1], ones)
    census = {"x": {"who": Census.empty()}}
    outer = lambda slots: einsum(
        "bk,n->bkn", ones, ones[0], linear("f32,x=e4m3@tensor.rht"), probe=Probe({}, slots)
    ).sum()
    assert jax.grad(outer)(census)["x"]["who"].size == ones.size


# --- what it is good for


def error_of(policy: str, outlier: float, compile_fast: Callable[..., Any]) -> float:
    """Relative squared error of a product whose activations have an outlier in each block of 32."""
    generator = np.random.default_rng(0)
    x, w = generator.normal(size=(1, 64, 512)), generator.normal(size=(512, 64))
    x[..., ::32] = outlier
    w[::32] /= outlier
    wanted = x @ w
    product = compile_fast(functools.partial(einsum, "btk,kn->btn", site=linear(policy)))
    found = product(np.float32(x), np.float32(w))
    return float(np.mean(np.square(np.asarray(found, np.float64) - wanted)) / np.mean(wanted**2))


@pytest.mark.parametrize(
    ("quantizer", "outlier", "factor"),
    [("int8@block32", 32.0, 8), ("mxfp4", 16.0, 2)],
)
def test_a_rotation_spreads_an_outlier_and_divides_the_error(
    quantizer: str, outlier: float, factor: float, compile_fast
):
    """By more where the grid is uniform: a 4-bit float is precise beside its own outliers."""
    error = lambda rht: error_of(f"f32,x={quantizer}{rht}", outlier, compile_fast)
    plain, rotated = error(""), error(".rht")
    assert rotated < plain / factor


def test_stochastic_rounding_of_rotated_operands_is_unbiased(compile_fast):
    """All three products, over signs and noise; the paper's recipe, both operands rounded."""
    generator = np.random.default_rng(0)
    shapes = ((1, 6, 3), (3, 5), (1, 6, 5))
    x, w, g = (generator.normal(size=shape).astype(np.float32) for shape in shapes)
    recipe = "mxfp4.rceil.rht4.sr"
    site = linear(f"f32,w={recipe},x={recipe},g={recipe}")
    count = 2048
    keys = jax.random.split(jax.random.key(1), count)
    one = lambda key: product_and_gradients("btk,kn->btn", site, x, w, g, key=key)
    samples = compile_fast(jax.vmap(one))(keys)
    expected = (x @ w, g @ w.T, x[0].T @ g[0])
    for drawn, wanted in zip(samples, expected, strict=True):
        drawn = np.asarray(drawn, np.float64)
        z = (drawn.mean(0) - wanted) * math.sqrt(count) / drawn.std(0)
        assert np.abs(z).max() < 4
        assert np.all(drawn.std(0) > 0.01), "nothing was rounded"


# --- what telemetry sees


def test_telemetry_counts_what_becomes_of_the_rotated_tensor(compile_fast: Callable[..., Any]):
    x, w, _ = operands("btk,kn->btn")
    x[..., 0], w[0] = 300.0, 300.0

    def censuses(policy: str) -> dict[str, Census]:
        site = linear(policy)

        def loss(x: jax.Array, w: jax.Array, slots: Any) -> jax.Array:
            probe = Probe({}, slots)
            y = hand_on(einsum("btk,kn->btn", x, w, site, probe=probe), site, probe)
            return jnp.sum(jnp.square(y))

        slots = {role: {"who": Census.empty()} for role in ("x", "w", "g")}
        measured = compile_fast(jax.grad(loss, argnums=2))(x, w, slots)
        return {role: slot["who"] for role, slot in measured.items()}

    narrow = "int8@channel"
    plain = censuses(f"f32,w={narrow},x={narrow},g={narrow}")
    rotated = censuses(f"f32,w={narrow},x={narrow}.rht,xb={narrow},wb={narrow}.rht,g={narrow}")
    for role, size in {"x": x.size, "w": w.size}.items():
        assert plain[role].elements(Fate.UNDERFLOW) > size / 2, "the outlier hides the others"
        assert rotated[role].elements(Fate.UNDERFLOW) < plain[role].elements(Fate.UNDERFLOW) / 2
        assert rotated[role].maximum == 300.0, "the maximum is that of the tensor"
    assert rotated["g"].size == 3 * 5 * 32, "as the product dx has it: 23 and zeros, rotated"
