"""Probes measure what they say, and measuring changes nothing."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmjax.precision import exact, parse_format, parse_policy, probes, quantize
from lmjax.precision.matmul import einsum, hand_on
from lmjax.precision.past import Slope
from lmjax.precision.probes import (
    EXPONENTS,
    Census,
    Fate,
    FullCensus,
    Maximum,
    Probe,
    Rounded,
    Spread,
    combine,
    exponent_histogram,
    report,
    report_cotangent,
    rescale_cotangent,
)

CENSUS = Census.empty()


def spread_out(shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
    """f32 numbers over 60 binades, one in eight of them 0."""
    generator = np.random.default_rng(seed)
    x = generator.normal(size=shape) * 2.0 ** generator.uniform(-40, 20, shape)
    return np.where(generator.random(shape) < 1 / 8, 0, x).astype(np.float32)


def summary(census: Census) -> dict[str, float]:
    """Its numbers but for exponents, by name."""
    return {
        "size": float(census.size),
        "maximum": float(census.maximum),
        **{fate.name: float(census.elements(fate)) for fate in Fate},
    }


def counted(x: np.ndarray, name: str) -> dict[str, float]:
    """The census of a plain cast, recomputed from the table of the format's values."""
    form = parse_format(name)
    table = np.sort(np.abs(form.values()[np.isfinite(form.values())]))
    before = np.abs(x.astype(np.float64))
    nearest = table[np.clip(np.searchsorted(table, before), 0, len(table) - 1)]
    lower = table[np.clip(np.searchsorted(table, before) - 1, 0, len(table) - 1)]
    rounded = np.where(before - lower < nearest - before, lower, nearest)
    fates = {
        "ZERO": np.sum(before == 0),
        "UNDERFLOW": np.sum((before > 0) & (rounded == 0)),
        "SUBNORMAL": np.sum((rounded > 0) & (rounded < form.smallest_normal)),
        "OVERFLOW": np.sum(before > form.largest_finite),
    }
    other = x.size - sum(fates.values())
    return {"size": x.size, "maximum": before.max(), "OTHER": other, **fates}


@pytest.mark.parametrize("name", ["f16", "e4m3", "e5m2", "e2m1"])
def test_a_census_equals_numpy_on_the_same_tensor(name: str):
    x = spread_out((64, 96))
    census = exact.jit(lambda x: Census.of(Rounded(x, x, quantize(x, name), parse_format(name))))(x)
    expected = counted(x, name)
    assert summary(census) == expected
    assert min(expected["ZERO"], expected["UNDERFLOW"], expected["OVERFLOW"]) > 0
    exponents = np.floor(np.log2(np.abs(x[x != 0]).astype(np.float64))).astype(int)
    histogram = np.bincount(exponents + 127, minlength=EXPONENTS)
    histogram[0] = np.sum(x == 0)
    np.testing.assert_array_equal(census.histogram, histogram)


def test_the_histogram_has_a_place_for_everything():
    tiny, huge = np.float32(2.0**-126), np.float32(3e38)
    x = np.asarray([0.0, -0.0, 1e-45, tiny, 1.0, -1.99, 2.0, huge, np.inf, np.nan], np.float32)
    counts = np.asarray(exponent_histogram(jnp.asarray(x)))
    assert {int(i): int(counts[i]) for i in np.flatnonzero(counts)} == {
        0: 3, 1: 1, 127: 2, 128: 1, 254: 1, 255: 2
    }  # fmt: skip


def test_a_spread_samples_large_tensors_and_misses_no_maximum():
    x = spread_out((300, 401))
    x[123, 45] = 2.0**30
    spread = Spread.of(Rounded(x, x, x, parse_format("f32")))
    assert float(spread.maximum) == 2.0**30
    assert float(jnp.sum(spread.histogram)) == pytest.approx(x.size, rel=1e-6)
    whole = np.asarray(exponent_histogram(jnp.asarray(x)))
    assert np.abs(np.asarray(spread.histogram) - whole).sum() / x.size < 0.15


def test_counts_grow_where_a_sum_of_ones_in_f32_would_stop():
    size = 2**24 + 5 * 128

    def counts() -> list[jax.Array]:
        x = jnp.zeros(size, jnp.bfloat16)
        census = FullCensus.of(Rounded(x, x, x, parse_format("bf16")))
        return [census.elements(Fate.ZERO), exponent_histogram(x)[0]]

    assert list(map(float, exact.jit(counts)())) == [size, size]


def test_a_census_of_a_large_tensor_counts_a_sample_and_a_full_one_all_elements():
    x = spread_out((400, 401))
    x[123, 45] = 2.0**30
    f16 = parse_format("f16")
    sampled, full = (kind.of(Rounded(x, x, quantize(x, f16), f16)) for kind in (Census, FullCensus))
    assert float(sampled.maximum) == float(full.maximum) == 2.0**30
    assert float(sampled.size) == float(full.size) == x.size
    expected = counted(x, "f16")
    assert summary(full) == expected
    for fate in Fate:
        share, true = summary(sampled)[fate.name] / x.size, expected[fate.name] / x.size
        assert share != true
        assert share == pytest.approx(true, abs=5 * np.sqrt(true / 2**14))
    np.testing.assert_array_equal(full.histogram, exponent_histogram(jnp.asarray(x)))
    assert float(jnp.sum(sampled.histogram)) == pytest.approx(x.size, rel=1e-6)


@pytest.mark.parametrize("shape", [(64, 384), (4096, 96), (512, 1024), (1000, 1000), (3, 70001)])
def test_a_sample_comes_from_all_columns_alike(shape: tuple[int, int]):
    """A column holds its number; a stride with a divisor of the sides would miss some."""
    columns = np.broadcast_to(np.arange(shape[1], dtype=np.float32), shape)
    sample = np.asarray(probes._sample(jnp.asarray(columns), 2**14))
    assert 2**13 < sample.size < 2**15
    parts = 8 * sample.astype(int) // shape[1]
    shares = np.bincount(parts, minlength=8) / sample.size
    assert np.abs(shares - 1 / 8).max() < 0.02


def test_two_tensors_are_measured_as_one():
    first, second = spread_out((8, 16)), spread_out((8, 16), seed=1) / 8
    f16 = parse_format("f16")
    one = lambda x: {"x": {"who": Census.of(Rounded(x, x, quantize(x, f16), f16))}}
    both = combine(one(jnp.asarray(first)), one(jnp.asarray(second)))
    jax.tree.map(np.testing.assert_array_equal, both, one(jnp.concatenate([first, second])))


def test_measurements_leave_a_scan_of_recomputed_blocks_as_gradients():
    weights = jnp.asarray([1.0, -3.0, 2.0], jnp.float32)
    stacked = jax.tree.map(lambda s: jnp.stack([s] * 3), {"up": Maximum.empty()})
    back = jax.tree.map(lambda s: jnp.stack([s] * 3), {"down": Maximum.empty()})
    f32 = parse_format("f32")

    @jax.checkpoint
    def block(x, layer):
        weight, up, down = layer
        x = report(x * weight, up, lambda: Rounded(x * weight, x, x, f32))
        return report_cotangent(x, down, lambda g: Rounded(g, g, g, f32)), None

    def loss(weights, up, down, x):
        return jnp.sum(jax.lax.scan(block, x, (weights, up, down))[0])

    x = jnp.asarray([0.5, 1.0], jnp.float32)
    gradient, up, down = exact.jit(jax.grad(loss, argnums=(0, 1, 2)))(weights, stacked, back, x)
    np.testing.assert_array_equal(up["up"].maximum, [1.0, 3.0, 6.0])
    np.testing.assert_array_equal(down["down"].maximum, [6.0, 2.0, 1.0])
    plain = jax.grad(lambda w: jnp.sum(x) * jnp.prod(w))(weights)
    np.testing.assert_array_equal(gradient, plain)


@pytest.mark.parametrize("policy", ["mixed_f16", "f32,c=bf16,w=e4m3,x=mxfp8,g=e5m2@tensor"])
def test_a_product_is_measured_before_it_is_rounded_and_not_changed(policy: str):
    site = parse_policy(policy).resolve("blocks/0/mlp/up")
    x = jnp.asarray(spread_out((2, 8, 32)) / 2.0**12)
    w = jnp.asarray(spread_out((32, 16), seed=1) / 2.0**12)
    slots = {role: {"who": CENSUS} for role in ("x", "w", "g", "dx", "dw")}

    def loss(x, w, slots):
        probe = Probe({}, slots) if slots else None
        y = hand_on(einsum("btk,kn->btn", x, w, site, probe=probe), site, probe)
        return jnp.sum(y.astype(jnp.float32)) * 2.0**-20

    gradient = exact.jit(jax.grad(loss, argnums=(0, 1, 2)))
    dx, dw, measured = gradient(x, w, slots)
    plain = gradient(x, w, {})
    np.testing.assert_array_equal(dx, plain[0])
    np.testing.assert_array_equal(dw, plain[1])
    census = {role: asked["who"] for role, asked in measured.items()}
    assert [int(census[r].size) for r in slots] == [x.size, w.size, 2 * 8 * 16, x.size, w.size]
    if policy == "mixed_f16":
        for role, tensor in {"x": x, "w": w}.items():
            expected = counted(np.asarray(tensor), "f16")
            assert summary(census[role]) == expected
        g = np.full((2, 8, 16), 2.0**-20, np.float64)
        cast = np.asarray(x, np.float64).astype(np.float16).astype(np.float64)
        before = np.einsum("btk,btn->kn", cast, g)
        assert int(census["dw"].elements(Fate.UNDERFLOW)) == np.sum(
            (before != 0) & (before.astype("f2") == 0)
        )
        assert int(census["dw"].elements(Fate.UNDERFLOW)) > 0
    else:
        expected = counted(np.asarray(site.to_compute(w), np.float32), "e4m3")
        assert int(census["w"].elements(Fate.OVERFLOW)) == expected["OVERFLOW"] > 0
        # With a factor the largest element becomes the largest value: nothing is beyond it.
        assert int(census["g"].elements(Fate.OVERFLOW)) == 0


def test_delayed_factors_reach_all_three_products():
    site = parse_policy("f32,w=e4m3@tensor.delayed,x=e4m3@tensor.delayed,g=e5m2@tensor.delayed")
    site = site.resolve("blocks/0/mlp/up")
    generator = np.random.default_rng(0)
    x, w = (jnp.asarray(generator.normal(size=s), jnp.float32) for s in ((1, 4, 8), (8, 8)))
    powers = {"x": 2.0**-5, "w": 2.0**-6, "g": 2.0**-12}

    def value_and_gradients(factors):
        probe = Probe({r: jnp.float32(f) for r, f in factors.items()}, {})
        y, back = jax.vjp(lambda x, w: einsum("btk,kn->btn", x, w, site, probe=probe), x, w)
        return y, *back(jnp.ones_like(y) / 3)

    def by_hand(factors):
        q = lambda t, r, f: quantize(t / factors[r], f) * factors[r]
        qx, qw = q(x, "x", "e4m3"), q(w, "w", "e4m3")
        g = q(jnp.ones((1, 4, 8), jnp.float32) / 3, "g", "e5m2")
        dot = lambda spec, a, b: np.einsum(spec, np.float64(a), np.float64(b))
        return (
            dot("btk,kn->btn", qx, qw), dot("btn,kn->btk", g, qw), dot("btk,btn->kn", qx, g)
        )  # fmt: skip

    for factors in (powers, powers | {"g": 2.0**-3}, powers | {"x": 2.0**-9}):
        for ours, expected in zip(value_and_gradients(factors), by_hand(factors), strict=True):
            np.testing.assert_allclose(ours, expected, rtol=1e-5, atol=1e-6)


def test_the_slope_of_a_learned_factor_is_that_of_lsq():
    """Next to autodiff of a product whose roundings pass gradients on and whose clips do not."""
    site = parse_policy("f32,w=int4@tensor.learned,x=int4@tensor.learned").resolve(
        "blocks/0/mlp/up"
    )
    generator = np.random.default_rng(0)
    x, w = (jnp.asarray(generator.normal(size=s), jnp.float32) for s in ((1, 4, 8), (8, 8)))
    target = jnp.asarray(generator.normal(size=(1, 4, 8)), jnp.float32)
    factors = {"x": jnp.float32(0.21), "w": jnp.float32(0.33)}

    def ours(slots):
        y = einsum("btk,kn->btn", x, w, site, probe=Probe(factors, slots))
        return jnp.sum(y * y * target)

    def theirs(factors):
        def q(t, s):
            units = t / s
            rounded = units + jax.lax.stop_gradient(jnp.round(units) - units)
            return jnp.where(units > 7, 7, jnp.where(units < -8, -8, rounded)) * s

        y = jnp.einsum("btk,kn->btn", q(x, factors["x"]), q(w, factors["w"]))
        return jnp.sum(y * y * target)

    found = jax.grad(ours)({role: {"delayed": Slope.empty()} for role in factors})
    wanted = jax.grad(theirs)(factors)
    for role in factors:
        np.testing.assert_allclose(found[role]["delayed"].slope, wanted[role], rtol=1e-4)
    np.testing.assert_allclose(found["w"]["delayed"].maximum, jnp.abs(w).max())


def test_a_cotangent_is_rescaled_and_its_value_is_not():
    x = jnp.asarray([1.0, 2.0], jnp.float16)
    y, back = jax.vjp(lambda x: rescale_cotangent(x, jnp.float32(2.0**-20)), x)
    np.testing.assert_array_equal(y, x)
    # 2^-20 is subnormal in f16, but 2^14 * 2^-20 is not: the product is taken in f32.
    np.testing.assert_array_equal(back(jnp.full(2, 2.0**14, jnp.float16))[0], [2.0**-6] * 2)
