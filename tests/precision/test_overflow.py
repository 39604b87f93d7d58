"""The rule for overflow, infinity and NaN, in every place where a policy gives a tensor a format.

`precision/rounding.py` states it. Hardware is the reference where it has the format; an emulated
copy of such a format must do the same to the bit.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lmjax.model.cache import LayerCache
from lmjax.optim.storage import _encode, apply_updates, convert_moments, convert_params
from lmjax.parallel.reduction import _rounded, _sum
from lmjax.precision import parse_policy
from lmjax.precision.formats import Format, integer, parse_format
from lmjax.precision.matmul import einsum
from lmjax.precision.policy import SitePolicy
from lmjax.precision.quantizer import Quantizer, parse_quantizer
from lmjax.precision.rounding import quantize
from lmjax.precision.stored import decode, encode
from lmjax.precision.summation import sum_of_products

NATIVE = ["f16", "bf16", "e5m2", "e3m4"]
NO_INFINITY = ["e4m3", "e4m3fnuz", "e5m2fnuz", "e3m2", "e2m3", "e2m1", "e5m0", "int8", "int4"]
SPECIAL = [0.0, 1.0, -3.25, 1e30, -1e30, math.inf, -math.inf, math.nan]
SITE = "blocks/0/mlp/up"


def site_of(text: str) -> SitePolicy:
    return parse_policy(text).resolve(SITE)


def emulated(name: str) -> Format:
    """A format of hardware without its dtype, under a name that nothing treats specially."""
    return dataclasses.replace(parse_format(name), name=f"{name} emulated", dtype=None)


def step_above(number_format: Format) -> float:
    """From the largest value to the next one, if the format went on."""
    largest, code = number_format.largest_finite, number_format.largest_code
    return largest - number_format._magnitude(code - 1) if number_format.mantissa_bits else largest


def around(number_format: Format) -> np.ndarray:
    """Numbers around the end of a format, and some that are not finite; both signs."""
    largest, step = number_format.largest_finite, step_above(number_format)
    ends = np.asarray([largest, largest + step / 2, largest + step, 2 * largest], np.float64)
    ends = ends[ends < np.finfo(np.float32).max].astype(np.float32)
    near = [np.nextafter(ends, np.float32(0)), ends, np.nextafter(ends, np.float32(np.inf))]
    positive = np.concatenate([*near, np.asarray(SPECIAL, np.float32)])
    return np.concatenate([positive, -positive])


def bits(x: Any) -> bytes:
    """The bits of an array, with one pattern for every NaN."""
    x = np.asarray(x, np.float32)
    return np.where(np.isnan(x), np.float32(np.nan), x).tobytes()


# --- rounding


@pytest.mark.parametrize("overflow", ["clamp", "fail", "native"])
@pytest.mark.parametrize("name", NATIVE)
def test_an_emulated_format_with_infinities_overflows_as_its_hardware_does(name, overflow):
    x = around(parse_format(name))
    with np.errstate(over="ignore"):
        expected = x.astype(parse_format(name).dtype).astype(np.float32)
    assert bits(quantize(jnp.asarray(x), emulated(name), overflow=overflow)) == bits(expected)
    assert np.isinf(expected).any()


@pytest.mark.parametrize("name", NATIVE)
def test_stochastic_rounding_of_an_emulated_format_is_that_of_the_native_one(name):
    x, key = jnp.asarray(around(parse_format(name))), jax.random.key(3)
    native = quantize(x, name, "stochastic", key, "clamp").astype(parse_format(name).dtype)
    assert bits(quantize(x, emulated(name), "stochastic", key, "clamp")) == bits(native)
    assert bits(quantize(x, name, "stochastic", key, "native")) == bits(native)


@pytest.mark.parametrize("name", NO_INFINITY)
def test_a_format_without_infinities_clamps_or_fails_but_never_hides(name):
    number_format = parse_format(name)
    x = around(number_format)
    clamped = np.asarray(quantize(jnp.asarray(x), number_format, overflow="clamp"))
    failed = np.asarray(quantize(jnp.asarray(x), number_format, overflow="fail"))
    saturated = np.asarray(quantize(jnp.asarray(x), number_format))
    lost = ~np.isfinite(x)
    assert np.isnan(clamped[lost]).all()
    assert bits(clamped[~lost]) == bits(saturated[~lost])
    assert np.isnan(failed[lost]).all()
    inside = np.isfinite(failed)
    assert bits(failed[inside]) == bits(clamped[inside])
    # A rounding moves a number by at most half of the last step; a clamp by more, but for a tie.
    step = step_above(number_format)
    moved = np.abs(clamped[~lost].astype(np.float64) - x[~lost])
    assert np.isnan(failed[~lost][moved > step / 2]).all()
    assert np.isfinite(failed[~lost][moved < step / 2]).all()


@st.composite
def formats(draw: st.DrawFn) -> Format:
    """Any format that a policy can name, made up or not."""
    if draw(st.booleans()):
        return parse_format(f"e{draw(st.integers(2, 8))}m{draw(st.integers(0, 20))}")
    return draw(st.sampled_from([parse_format(n) for n in NO_INFINITY] + [integer(13)]))


NUMBERS = st.lists(st.floats(width=32) | st.sampled_from(SPECIAL), min_size=16, max_size=16)


@settings(max_examples=30)
@given(number_format=formats(), numbers=NUMBERS)
def test_no_rounding_hides_a_number_that_is_not_finite(number_format: Format, numbers: list[float]):
    x = np.asarray(numbers, np.float32)
    lost = ~np.isfinite(x)
    for overflow in ("clamp", "fail"):
        y = np.asarray(quantize(jnp.asarray(x), number_format, overflow=overflow))
        assert not np.isfinite(y[lost]).any()
        assert np.isnan(y[np.isnan(x)]).all()
        limit = max(number_format.largest_finite, -number_format.smallest_finite)
        assert (np.abs(y[np.isfinite(y)]) <= limit).all()
        if number_format.has_infinity:
            assert (np.isinf(y) >= np.isinf(x)).all()
            assert np.array_equal(np.isnan(y), np.isnan(x))
        else:
            assert not np.isinf(y).any()
    if not number_format.has_infinity:
        inside = np.abs(x) <= number_format.largest_finite
        assert np.isfinite(y[inside]).all(), "fail spares what the format holds"


# --- sites


@pytest.mark.parametrize("name", ["e5m9", "tf32", "e5m2", "e4m3", "e2m1"])
def test_every_role_of_a_site_keeps_infinity_and_nan(name: str):
    site = site_of(f"p={name},c={name},o={name}")
    x = jnp.asarray([math.inf, -math.inf, math.nan], jnp.float32)
    for cast in (site.to_params, site.to_compute, site.to_output):
        y = np.asarray(cast(x))
        assert not np.isfinite(y).any()
        assert np.isinf(y).sum() == (2 if site.compute.has_infinity else 0)


@pytest.mark.parametrize("name", ["e5m9", "e5m2", "e4m3"])
@pytest.mark.parametrize("adapts", [False, True])
def test_cotangents_arrive_in_the_format_of_what_they_are_cotangents_of(name, adapts):
    site = site_of(f"p=f32,c={name},o={name}")
    site = dataclasses.replace(site, cotangents="fail" if adapts else "clamp")
    g = jnp.asarray([1.0 + 2.0**-12, 2.0**-40, 1e9, -1e9, math.inf], jnp.float32)
    for cast in (site.to_compute, site.to_output):
        _, back = jax.vjp(cast, jnp.zeros_like(g))
        arrived = np.asarray(back(g)[0])
        assert arrived[:2].tolist() == [1.0, 0.0]
        if site.compute.has_infinity:
            assert arrived[2:].tolist() == [math.inf, -math.inf, math.inf]
        elif adapts:
            assert np.isnan(arrived[2:]).all()
        else:
            assert arrived[2:4].tolist() == [448.0, -448.0]
            assert np.isnan(arrived[4])


def gradients(site: SitePolicy, x: float, w: float, g: float) -> list[np.ndarray]:
    """y, dx and dw of a product of `[1, 1, 4]` and `[4, 1]`, full of the same numbers."""
    arrays = jnp.full((1, 1, 4), x, jnp.float32), jnp.full((4, 1), w, jnp.float32)
    y, back = jax.vjp(lambda x, w: einsum("btk,kn->btn", x, w, site), *arrays)
    return [np.asarray(part, np.float32) for part in (y, *back(jnp.full_like(y, g)))]


@pytest.mark.parametrize("operand", ["e5m2", "e4m3", "e2m1", "int8", "e5m7", "tf32"])
@pytest.mark.parametrize("lost", [math.inf, math.nan])
def test_a_plain_operand_shows_what_is_not_finite(operand: str, lost: float):
    site = site_of(f"f32,w={operand},x={operand},g={operand}")
    assert not np.isfinite(gradients(site, lost, 1.0, 1.0)[0]).any()
    assert not np.isfinite(gradients(site, 1.0, lost, 1.0)[0]).any()
    assert not any(np.isfinite(part).any() for part in gradients(site, 1.0, 1.0, lost)[1:])


@pytest.mark.parametrize(
    ("policy", "dx"), [("c=bf16,g=e5m2", math.inf), ("c=bf16,g=e4m3", 448.0), ("c=e4m3", 448.0)]
)
def test_a_clamped_cotangent_is_an_overflow_while_the_loss_scale_adapts(policy: str, dx: float):
    site = site_of(f"p=f32,{policy}")
    _, *plain = gradients(site, 1.0, 1.0, 1e6)
    _, *adapting = gradients(dataclasses.replace(site, cotangents="fail"), 1.0, 1.0, 1e6)
    assert all((part == dx).all() for part in plain)
    assert not any(np.isfinite(part).any() for part in adapting)
    forward, *_ = gradients(dataclasses.replace(site, cotangents="fail"), 1e6, 1.0, 1.0)
    assert np.isfinite(forward).all(), "a lower loss scale would not help the forward pass"


def test_tf32_products_keep_the_infinity_of_their_operands():
    site = site_of("f32,m=tf32")
    for number in (math.inf, float(np.finfo(np.float32).max)):
        x = jnp.full((1, 1, 1), number, jnp.float32)
        product = sum_of_products("btk,kn->btn", x, jnp.ones((1, 1), jnp.float32), site)
        assert float(product[0, 0, 0]) == math.inf


@pytest.mark.parametrize("name", ["f16", "e5m7", "e5m2", "e4m3", "e2m1"])
@pytest.mark.parametrize("chunk", ["", "@block1"])
@pytest.mark.parametrize("number", [math.inf, math.nan, 1e6])
def test_an_accumulator_shows_what_it_cannot_hold(name: str, chunk: str, number: float):
    x = jnp.asarray([[[number, 1.0, -1e6 if math.isinf(number) else 1.0]]], jnp.float32)
    site = site_of(f"f32,a={name}{chunk}")
    total = sum_of_products("btk,kn->btn", x, jnp.ones((3, 1), jnp.float32), site)
    assert not np.isfinite(np.asarray(total)).any()


# --- reductions


@pytest.mark.parametrize("name", ["tf32", "e5m7", "e5m2", "e4m3", "e2m1", "bf16", "f16", "f32"])
@pytest.mark.parametrize("lost", [math.inf, -math.inf, math.nan])
def test_one_part_that_is_not_finite_makes_the_sum_so(name: str, lost: float):
    site = site_of(f"f32,r={name}")
    parts = jnp.ones((8, 3), jnp.float32).at[5, 1].set(lost)
    total = np.asarray(_sum(parts, 8, site), np.float32)
    assert np.isfinite(total).tolist() == [True, False, True]
    in_order = functools.reduce(lambda a, b: _rounded(a + b, site), _rounded(parts / 8, site))
    assert np.isfinite(np.asarray(in_order)).tolist() == [True, False, True]


@pytest.mark.parametrize(("name", "end"), [("e5m7", math.inf), ("f16", math.inf), ("e4m3", None)])
def test_a_sum_beyond_the_format_is_not_finite(name: str, end: float | None):
    parts = jnp.full((8, 1), 1e5 if name != "e4m3" else 500.0, jnp.float32)
    total = float(_sum(parts, 8, site_of(f"f32,r={name}"))[0])
    assert total == end if end else math.isnan(total)


# --- stored tensors

QUANTIZERS = [
    "int8", "int4", "int13", "e4m3", "e3m2", "e2m1", "e5m2", "e5m7", "tf32", "f16", "bf16",
    "int8@tensor", "int4@block4", "e4m3@channel", "mxfp4", "mxint8", "nvfp4", "e4m3@block4.e8m0",
]  # fmt: skip


@settings(max_examples=40)
@given(kind=st.sampled_from(QUANTIZERS), numbers=NUMBERS)
def test_no_stored_form_hides_a_number_that_is_not_finite(kind: str, numbers: list[float]):
    quantizer, x = parse_quantizer(kind), np.asarray(numbers, np.float32)
    lost = ~np.isfinite(x)
    for overflow in ("clamp", "fail"):
        stored = encode(jnp.asarray(x), quantizer, overflow=overflow)
        y = np.asarray(decode(stored, quantizer))
        assert not np.isfinite(y[lost]).any()
        if quantizer.groups == "none":
            rounded = quantize(jnp.asarray(x), quantizer.format, overflow=overflow)
            assert bits(y) == bits(rounded)


@pytest.mark.parametrize("kind", ["int8", "int4", "int13"])
def test_integers_without_a_factor_are_held_where_a_nan_is(kind: str):
    quantizer = parse_quantizer(kind)
    first, last = int(quantizer.format.smallest_finite), int(quantizer.format.largest_finite)
    every = np.asarray([*range(first, last + 1), math.nan], np.float32)
    assert bits(decode(encode(jnp.asarray(every), quantizer), quantizer)) == bits(every)


@pytest.mark.parametrize("kind", QUANTIZERS)
def test_a_moment_that_fails_is_seen_in_the_next_step_and_the_next_phase(kind: str):
    quantizer = parse_quantizer(kind)
    moment = jnp.asarray([1.0, 2.0, math.nan, math.inf] * 4, jnp.float32)
    read = np.asarray(decode(_encode(moment, quantizer), quantizer))
    assert not np.isfinite(read[2::4]).any()
    assert not np.isfinite(read[3::4]).any()

    class State(tuple):
        mu = property(lambda self: self[0])

        def _replace(self, mu: Any) -> State:
            return State((mu,))

    old, new = ({"w": dataclasses.replace(site_of("f32"), mu=q)} for q in (quantizer, F32))
    there = convert_moments(State(({"w": _encode(moment, quantizer)},)), old, new).mu["w"]
    assert not np.isfinite(np.asarray(there)[2::4]).any()


F32 = Quantizer(parse_format("f32"))


@pytest.mark.parametrize("kind", ["int8", "int4", "e4m3", "e5m7", "int8@channel"])
def test_a_moment_beyond_a_format_without_factors_is_seen(kind: str):
    quantizer = parse_quantizer(kind)
    read = decode(_encode(jnp.asarray([1.0, 1e6], jnp.float32), quantizer), quantizer)
    assert np.isfinite(np.asarray(read)).tolist() == [True, quantizer.groups != "none"]


@pytest.mark.parametrize("kind", ["int8", "e4m3", "e2m1", "e5m2", "int8@channel", "mxfp4"])
def test_the_cache_shows_keys_and_values_that_are_not_finite(kind: str):
    sites = {name: site_of(f"f32,kv={kind}") for name in ("scores", "combine")}
    k = jnp.ones((1, 3, 2, 4), jnp.float32).at[0, 1].set(math.nan)
    v = jnp.ones((1, 3, 2, 4), jnp.float32).at[0, 2].set(math.inf)
    cache = LayerCache.empty((1, 4, 2, 4), sites).extended(k, v, 0, sites)
    keys, values = cache.read(sites)
    assert np.isfinite(np.asarray(keys)).all(axis=(0, 2, 3)).tolist() == [True, False, True, True]
    finite = np.isfinite(np.asarray(values)).all(axis=(0, 2, 3)).tolist()
    assert finite == [True, True, False, True]


@pytest.mark.parametrize("update", ["", ".sr", ".kahan"])
@pytest.mark.parametrize("name", ["e5m7", "e5m2", "e4m3", "e2m1", "f16"])
def test_a_parameter_shows_an_update_that_is_not_finite(name: str, update: str):
    sites = {"w": site_of(f"p={name}{update},c=f32")}
    params = {"w": sites["w"].to_params(jnp.ones(3, jnp.float32))}
    residuals = {"w": jnp.zeros_like(params["w"])} if update == ".kahan" else {}
    change = {"w": jnp.asarray([math.inf, math.nan, 0.0], jnp.float32)}
    for _ in range(2):
        params, residuals = apply_updates(params, change, residuals, sites, jax.random.key(0))
        finite = np.isfinite(np.asarray(params["w"], np.float32)).tolist()
        assert finite == [False, False, True]
        change = {"w": jnp.zeros(3, jnp.float32)}


@pytest.mark.parametrize(("new", "end"), [("e5m7", math.inf), ("f16", math.inf), ("e4m3", 448.0)])
def test_parameters_overflow_alike_when_the_policy_changes(new: str, end: float):
    old, after = {"w": site_of("p=f32,c=f32")}, {"w": site_of(f"p={new},c=f32")}
    params = {"w": jnp.asarray([1e6, math.inf, math.nan], jnp.float32)}
    stored = np.asarray(convert_params(params, {}, old, after)[0]["w"], np.float32)
    assert stored[0] == end
    assert not np.isfinite(stored[1:]).any()
