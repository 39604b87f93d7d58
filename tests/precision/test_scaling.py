"""Scale factors: block formats against vectors worked out by hand, and the rules for the rest."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmjax.precision.bits import largest_magnitude
from lmjax.precision.past import init_scale_state, update_scale_state
from lmjax.precision.quantizer import Quantizer, parse_quantizer
from lmjax.precision.rounding import quantize
from lmjax.precision.scaling import (
    dequantize,
    fake_quantize,
    quantize_with_scale,
    scale_from_maximum,
)

NAN, INF = np.nan, np.inf
NAMES = [
    "e4m3@tensor",
    "e5m2@channel.e8m0",
    "e2m1@block8.e4m3",
    "int8@channel",
    "int8@tensor.affine",
    "int4@block16.affine",
    "mxfp8",
    "mxfp8_e5m2",
    "mxfp6",
    "mxfp6_e2m3",
    "mxfp4",
    "mxint8",
    "mxfp4.rceil",
    "nvfp4",
]


def block(*head: float, size: int = 32) -> np.ndarray:
    """These numbers, and zeros up to the size of a block."""
    return np.array([*head, *[0.0] * (size - len(head))], np.float32)


# name, input, expected stored factor, expected elements (in the element format), all by hand from
# X = 2**(floor(log2(amax)) - emax), element = round(input / X), saturating (MX v1.0, section 6.3).
MX_VECTORS: dict[str, tuple[str, list[float], float, list[float]]] = {
    # floor(log2 5) = 2, emax 2: factor 1; 2.5 is a tie between 2 and 3 (even mantissa: 2)
    "mxfp4": ("mxfp4", [5, 2.5, -0.3, 0.25, 0.2], 1.0, [4, 2, -0.5, 0, 0]),
    # floor(log2 7.9) = 2: factor 1, and 7.9 saturates at 6
    "mxfp4 saturates": ("mxfp4", [7.9, -7.9, 1], 1.0, [6, -6, 1]),
    # floor(log2 0.1) = -4: factor 2**-6; 0.1 * 64 = 6.4, 0.03 * 64 = 1.92
    "mxfp4 below one": ("mxfp4", [0.1, 0.03], 2.0**-6, [6, 2]),
    # floor(log2 1000) = 9, emax 8: factor 2; 500 saturates at 448, 3 / 2 = 1.5; half the smallest
    # element is a tie with zero
    "mxfp8": ("mxfp8", [1000, 3, 2**-9, 2**-10], 2.0, [448, 1.5, 0, 0]),
    # emax 15: factor 2**-15 for amax 1; 1 becomes 2**15; 2**-31 becomes the smallest, 2**-16
    "mxfp8_e5m2": ("mxfp8_e5m2", [1, 2.0**-31, 1.75], 2.0**-15, [2**15, 2.0**-16, 57344]),
    # emax 4: factor 2**-4 for amax 1.9; 1.9 * 16 = 30.4 saturates at 28
    "mxfp6": ("mxfp6", [1.9, 0.3], 2.0**-4, [28, 5]),
    # emax 2: factor 1/4 for amax 1.9; 7.6 saturates at 7.5; 0.3 * 4 = 1.2 is nearest to 1.25
    "mxfp6_e2m3": ("mxfp6_e2m3", [1.9, 0.3], 0.25, [7.5, 1.25]),
    # emax 0: factor 1 for amax 1.5; elements are multiples of 1/64; 0.01 * 64 = 0.64
    "mxint8": ("mxint8", [1.5, 0.01, -1.0], 1.0, [1.5, 1 / 64, -1]),
    # 1.999 * 64 = 127.9 saturates at 127; the other side has one step more, -128
    "mxint8 range": ("mxint8", [1.999, -1.999], 1.0, [127 / 64, -2]),
    # nothing but zeros: the smallest factor
    "zero block": ("mxfp4", [0, -0.0], 2.0**-127, [0, -0.0]),
    # amax 3 * 2**-127: floor(log2) - 2 = -128 is below the range of e8m0: -127
    "subnormal factor": ("mxfp4", [3 * 2.0**-127, 2.0**-128], 2.0**-127, [3, 0.5]),
    # amax is itself subnormal in float32, and so are all products of factor and element
    "subnormal block": ("mxfp8", [2.0**-130, 2.0**-136, 2.0**-137], 2.0**-127, [0.125, 2**-9, 0]),
    # the top of float32: factor 2**(127 - 2)
    "largest": ("mxfp4", [2.0**127, -(2.0**126)], 2.0**125, [4, -2]),
    "nan": ("mxfp8", [1, NAN, 2], NAN, [NAN, NAN, NAN]),
    "infinity": ("mxfp8", [1, -INF, 2], NAN, [NAN, NAN, NAN]),
}


@pytest.mark.parametrize("case", MX_VECTORS)
def test_mx_vectors(case: str) -> None:
    name, head, scale, elements = MX_VECTORS[case]
    quantizer = parse_quantizer(name)
    x = jnp.asarray(block(*head))
    quantized = jax.jit(lambda x: quantize_with_scale(x, quantizer))(x)
    stored = np.asarray(quantized.scale).view(np.uint32)
    if np.isnan(scale):
        assert np.isnan(np.asarray(quantized.scale)).all()
    else:
        np.testing.assert_array_equal(stored, np.array([scale], np.float32).view(np.uint32))
    values = np.asarray(quantized.values)
    np.testing.assert_array_equal(values[: len(elements)], np.array(elements, np.float32))

    back = np.asarray(dequantize(quantized, quantizer))
    expected = np.array(elements, np.float64) * scale
    np.testing.assert_array_equal(back[: len(elements)].astype(np.float64), expected)
    np.testing.assert_array_equal(np.asarray(fake_quantize(x, quantizer)), back)


def test_a_failure_stays_in_its_mx_block() -> None:
    x = np.concatenate([block(1.0), block(NAN, 1.0), block(3.0), block(INF), block(0.5)[:8]])
    actual = np.asarray(fake_quantize(jnp.asarray(x), parse_quantizer("mxfp8")))
    failed = np.isnan(actual)
    assert failed[32:64].all()
    assert failed[96:128].all()
    assert not failed[:32].any()
    assert not failed[64:96].any()
    assert actual[[0, 64, 128]].tolist() == [1.0, 3.0, 0.5]


def test_nvfp4_vector() -> None:
    # Tensor factor: 2688 / (448 * 6) = 1, rounded as 2688 * float32(1 / 2688).
    # First block: amax 2688, factor 448. 1000 / 448 = 2.23 goes to 2, 100 / 448 = 0.223 to 0.
    # Second: amax 7, 7 / 6 = 1.1667 goes to 1.125 in e4m3 (1.125 < 1.1667 < 1.1875 < 1.25).
    #   7 / 1.125 = 6.2 saturates at 6; -2 / 1.125 = -1.78 goes to -2; 0.3 / 1.125 = 0.267 to 0.5.
    # Third: amax 0.005, 0.005 / 6 = 2**-10.2 goes to 0 in e4m3: all is lost.
    # Fourth: amax 0.01, 0.01 / 6 = 2**-9.2 goes to 2**-9, subnormal: 0.01 * 512 = 5.12 goes to 6,
    #   and 0.001 * 512 = 0.512 goes to 0.5.
    x = np.concatenate(
        [
            block(2688, 1000, 100, size=16),
            block(7, -2, 0.3, size=16),
            block(0.005, size=16),
            block(0.01, 0.001, size=16),
        ]
    )
    quantizer = parse_quantizer("nvfp4")
    quantized = quantize_with_scale(jnp.asarray(x), quantizer)
    assert quantized.tensor_scale is not None
    assert abs(float(quantized.tensor_scale) - 1.0) < 1e-6
    assert quantized.scale.tolist() == [448.0, 1.125, 0.0, 2.0**-9]
    values = np.asarray(quantized.values).reshape(4, 16)
    assert values[:, :3].tolist() == [[6, 2, 0], [6, -2, 0.5], [0, 0, 0], [6, 0.5, 0]]
    assert not values[:, 3:].any()
    back = np.asarray(dequantize(quantized, quantizer)).reshape(4, 16)
    expected = values[:, :3] * np.array([[448], [1.125], [0], [2.0**-9]])
    np.testing.assert_allclose(back[:, :3], expected, rtol=1e-6)


@pytest.mark.parametrize("bad", [NAN, INF, -INF])
def test_nvfp4_failure_reaches_the_whole_tensor_through_its_factor(bad: float) -> None:
    x = np.concatenate([block(1.0, size=16), block(bad, size=16)])
    assert np.isnan(np.asarray(fake_quantize(jnp.asarray(x), parse_quantizer("nvfp4")))).all()


def test_nvfp4_zero_and_tiny_tensors() -> None:
    zeros = jnp.zeros((32,), jnp.float32)
    assert fake_quantize(zeros, parse_quantizer("nvfp4")).tolist() == [0.0] * 32
    # The tensor factor stops at 2**-117, where its product with an e4m3 factor is still normal.
    tiny = jnp.full((16,), 2.0**-120, jnp.float32)
    quantized = quantize_with_scale(tiny, parse_quantizer("nvfp4"))
    assert float(quantized.tensor_scale) == 2.0**-117  # type: ignore[arg-type]
    assert np.isfinite(np.asarray(fake_quantize(tiny, parse_quantizer("nvfp4")))).all()


def test_int8_per_channel_by_hand() -> None:
    # Rows of amax 127 and 1.27: factors 1 and 0.01 along the last axis.
    x = jnp.asarray([[127, -63.4, 2.5, 0], [1.27, -0.634, 0.025, 0]], jnp.float32)
    quantized = quantize_with_scale(x, parse_quantizer("int8@channel"))
    np.testing.assert_allclose(np.asarray(quantized.scale), [[1.0], [0.01]], rtol=1e-6)
    assert quantized.values[0].tolist() == [127, -63, 2, 0]
    assert quantized.values[1, :2].tolist() == [127, -63]


def test_affine_by_hand() -> None:
    # [-1, 4] onto [-128, 127]: factor 5 / 255 = 1 / 51, zero point -128 + 51 = -77.
    x = jnp.asarray([-1, 4, 0, 1, 0.5], jnp.float32)
    quantizer = parse_quantizer("int8@tensor.affine")
    quantized = quantize_with_scale(x, quantizer)
    assert quantized.zero_point is not None
    assert abs(float(quantized.scale) - 1 / 51) < 1e-8
    assert float(quantized.zero_point) == -77
    assert quantized.values[:4].tolist() == [-128, 127, -77, -26]
    assert float(dequantize(quantized, quantizer)[2]) == 0.0


def test_affine_range_always_contains_zero() -> None:
    quantizer = parse_quantizer("int8@tensor.affine")
    high = quantize_with_scale(jnp.asarray([100.0, 101.0], jnp.float32), quantizer)
    assert float(high.zero_point) == -128  # type: ignore[arg-type]
    low = quantize_with_scale(jnp.asarray([-100.0, -101.0], jnp.float32), quantizer)
    assert float(low.zero_point) == 127  # type: ignore[arg-type]
    zeros = jnp.zeros((4,), jnp.float32)
    assert fake_quantize(zeros, quantizer).tolist() == [0.0] * 4


def test_affine_spends_no_codes_on_negative_numbers_that_do_not_occur() -> None:
    x = jax.random.uniform(jax.random.key(0), (4096,), jnp.float32)
    errors = {
        name: float(jnp.mean((fake_quantize(x, parse_quantizer(name)) - x) ** 2))
        for name in ("int4@tensor", "int4@tensor.affine")
    }
    assert errors["int4@tensor.affine"] < errors["int4@tensor"] / 3


@pytest.mark.parametrize("name", NAMES)
def test_same_bits_eagerly_and_compiled(name: str) -> None:
    quantizer = parse_quantizer(name)
    x = jax.random.normal(jax.random.key(3), (5, 77), jnp.float32)

    def function(x: jax.Array) -> jax.Array:
        return fake_quantize(x * 3.0, quantizer) + 0.0

    expected = np.asarray(fake_quantize(x * 3.0, quantizer))
    np.testing.assert_array_equal(np.asarray(jax.jit(function)(x)), expected)
    if quantizer.groups != "tensor" and not quantizer.tensor_scale:
        rows = jax.lax.scan(lambda carry, rows: (carry, jax.vmap(function)(rows)), 0, x[None])[1][0]
        np.testing.assert_array_equal(np.asarray(rows), expected)


@pytest.mark.parametrize("name", ["e4m3@tensor", "e5m2@channel", "int8@channel"])
def test_f32_factors_follow_the_written_arithmetic(name: str) -> None:
    quantizer = parse_quantizer(name)
    x = np.random.default_rng(0).normal(size=(6, 40)).astype(np.float32)
    axis = None if quantizer.groups == "tensor" else -1
    amax = np.max(np.abs(x), axis=axis, keepdims=True)
    scale = amax * np.float32(1 / quantizer.format.largest_finite)
    scaled = x * (np.float32(1) / scale)
    expected = np.asarray(quantize(jnp.asarray(scaled), quantizer.format)) * scale
    actual = np.asarray(fake_quantize(jnp.asarray(x), quantizer))
    np.testing.assert_array_equal(actual, expected)


@pytest.mark.parametrize("name", ["e4m3@tensor", "int8@channel", "int4@block16.affine", "nvfp4"])
@pytest.mark.parametrize("axis", [0, 1])
def test_groups_run_along_the_axis(name: str, axis: int) -> None:
    quantizer = parse_quantizer(name)
    x = jax.random.normal(jax.random.key(0), (37, 5, 50), jnp.float32)
    actual = fake_quantize(x, quantizer, axis=axis)
    moved = fake_quantize(jnp.moveaxis(x, axis, -1), quantizer)
    np.testing.assert_array_equal(np.asarray(jnp.moveaxis(actual, axis, -1)), np.asarray(moved))


def test_blocks_do_not_see_each_other_and_the_last_may_be_short() -> None:
    quantizer = parse_quantizer("e4m3@block16")
    x = jax.random.normal(jax.random.key(0), (3, 40), jnp.float32)
    assert quantize_with_scale(x, quantizer).scale.shape == (3, 3)
    together = fake_quantize(x, quantizer)
    apart = [fake_quantize(x[:, i : i + 16], parse_quantizer("e4m3@channel")) for i in (0, 16, 32)]
    np.testing.assert_array_equal(np.asarray(together), np.concatenate(apart, axis=1))
    longer_than_the_axis = fake_quantize(x, parse_quantizer("e4m3@block64"))
    channel = fake_quantize(x, parse_quantizer("e4m3@channel"))
    np.testing.assert_array_equal(np.asarray(longer_than_the_axis), np.asarray(channel))


@pytest.mark.parametrize("name", ["e4m3@tensor", "int8@channel.affine", "mxfp4", "nvfp4"])
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_narrow_tensors_are_quantized_in_float32(name: str, dtype: Any) -> None:
    quantizer = parse_quantizer(name)
    x = jax.random.normal(jax.random.key(1), (4, 64), jnp.float32).astype(dtype)
    actual = fake_quantize(x, quantizer)
    assert actual.dtype == dtype
    wide = fake_quantize(x.astype(jnp.float32), quantizer).astype(dtype)
    np.testing.assert_array_equal(np.asarray(actual), np.asarray(wide))


def test_float64_keeps_its_precision() -> None:
    with jax.enable_x64(True):
        # Above the tie of 1 and 1.125 by less than float32 can tell; 256 makes the factor 1.
        x = jnp.asarray([256.0, 1.0625 + 2.0**-40], jnp.float64)
        actual = fake_quantize(x, parse_quantizer("e4m3@tensor.e8m0"))
        assert actual.dtype == jnp.float64
        assert actual.tolist() == [256.0, 1.125]


@pytest.mark.parametrize("name", ["e4m3@tensor", "mxfp4", "nvfp4", "int8@channel.affine", "e4m3"])
def test_derivative_is_the_identity(name: str) -> None:
    quantizer, key = parse_quantizer(name), jax.random.key(0)
    x = jax.random.normal(jax.random.key(1), (3, 40), jnp.float32)
    weights = jax.random.normal(jax.random.key(2), x.shape, jnp.float32)

    def loss(x: jax.Array) -> jax.Array:
        return jnp.sum(weights * fake_quantize(x, quantizer, rounding="stochastic", key=key))

    np.testing.assert_array_equal(np.asarray(jax.grad(loss)(x)), np.asarray(weights))


@pytest.mark.parametrize("name", ["mxfp4", "int8@tensor", "nvfp4"])
def test_stochastic_elements_are_unbiased(name: str) -> None:
    quantizer, draws = parse_quantizer(name), 4000
    row = np.linspace(-2.9, 2.9, 32).astype(np.float32)
    row[0] = 3.0  # the largest is on the grid of every one of these
    x = jnp.broadcast_to(jnp.asarray(row), (draws, 32))
    rounded = fake_quantize(x, quantizer, rounding="stochastic", key=jax.random.key(4))
    drawn = np.asarray(rounded, np.float64)
    error = drawn.mean(0) - row
    bound = 4 * drawn.std(0) / np.sqrt(draws) + 1e-6
    # int8 factors are float32 products; one rounding of x / scale is within the added 1e-6.
    assert (np.abs(error) < bound).all(), (error, bound)


@pytest.mark.parametrize(("name", "unbiased"), [("mxfp4", False), ("mxfp4.rceil", True)])
def test_stochastic_elements_are_unbiased_where_nothing_saturates(
    name: str, unbiased: bool
) -> None:
    """The mean of all draws, projected on `x`, to 3 standard deviations of rounding up or down."""
    quantizer, draws = parse_quantizer(name), 500
    x = np.random.default_rng(0).normal(size=(64, 32)).astype(np.float32)
    many = jnp.broadcast_to(jnp.asarray(x), (draws, *x.shape))
    drawn = fake_quantize(many, quantizer, rounding="stochastic", key=jax.random.key(4))
    error = np.asarray(drawn, np.float64).mean(0) - x
    factor = np.asarray(quantize_with_scale(jnp.asarray(x), quantizer).factor, np.float64)
    scaled = np.minimum(np.abs(x / factor), 6.0)
    step = np.where(scaled < 2, 0.5, np.where(scaled < 4, 1.0, 2.0))
    up = scaled / step % 1.0
    deviation = np.sqrt(np.sum(up * (1 - up) * np.square(step * factor * x)) / draws)
    assert (np.abs(np.sum(error * x)) < 3 * deviation) == unbiased
    # 0.9% of the energy of normal numbers is lost at the ends of binades.
    assert (np.sum(error * x) < -0.005 * np.sum(np.square(x))) == (not unbiased)


@pytest.mark.parametrize("element", ["mxfp4", "mxfp6_e2m3", "mxfp8", "mxint8"])
def test_rceil_takes_the_smallest_factor_under_which_nothing_saturates(element: str) -> None:
    quantizer = parse_quantizer(f"{element}.rceil")
    largest = quantizer.format.largest_finite
    exact = np.float32([largest, largest / 2, 1.0, 2.0**-130 * largest, 2.0**100 * largest])
    amax = np.concatenate([exact, np.nextafter(exact, np.float32(np.inf), dtype=np.float32), [0]])
    found = np.asarray(scale_from_maximum(jnp.asarray(amax), quantizer), np.float64)
    wanted = np.exp2(np.clip(np.ceil(np.log2(np.maximum(amax, 1e-300) / largest)), -127, 127))
    np.testing.assert_array_equal(found, wanted)


def test_delayed_factor_comes_from_the_history() -> None:
    quantizer = parse_quantizer("e4m3@tensor.delayed3")
    state = init_scale_state(quantizer)
    update = jax.jit(lambda state, amax: update_scale_state(state, amax, quantizer))
    assert float(state.scale) == 1.0
    seen, scales = [448.0, 896.0, 224.0, 112.0, 56.0], []
    for amax in seen:
        state = update(state, jnp.float32(amax))
        scales.append(float(state.scale))
    np.testing.assert_allclose(scales, [1, 2, 2, 2, 0.5], rtol=1e-6)
    assert state.history.tolist() == [56.0, 112.0, 224.0]


@pytest.mark.parametrize("bad", [NAN, INF])
def test_a_failed_step_leaves_no_trace_in_the_history(bad: float) -> None:
    quantizer = parse_quantizer("e4m3@tensor.delayed2")
    before = update_scale_state(init_scale_state(quantizer), jnp.float32(7.0), quantizer)
    after = update_scale_state(before, jnp.float32(bad), quantizer)
    assert after.history.tolist() == before.history.tolist()
    assert float(after.scale) == float(before.scale)


def test_an_observed_factor_is_recalibrated_every_n_steps() -> None:
    quantizer = parse_quantizer("int8@tensor.observed3")
    assert str(quantizer) == "int8@tensor.observed3"
    state, found = init_scale_state(quantizer), []
    for amax in [127.0, 254.0, NAN, 63.5, 63.5, 25.4, 12.7, 12.7]:
        state = update_scale_state(state, jnp.float32(amax), quantizer)
        found.append(float(state.scale))
    # After the first step, and after three more that are finite, by the largest of those.
    np.testing.assert_allclose(found, [1, 1, 1, 1, 2, 2, 2, 0.2], rtol=1e-6)


def test_a_learned_factor_begins_at_the_maximum_and_descends() -> None:
    quantizer = parse_quantizer("int4@tensor.learned")
    assert str(quantizer) == "int4@tensor.learned"
    state = init_scale_state(quantizer)
    step = jax.jit(lambda s, amax, slope: update_scale_state(s, amax, quantizer, slope))
    state = step(state, jnp.float32(14.0), jnp.float32(5.0))
    assert float(state.scale) == 2.0
    for slope in (3e-4, 3e-4, NAN):  # Adam moves by its rate, whatever the size of the slope
        state = step(state, jnp.float32(14.0), jnp.float32(slope))
    assert float(state.scale) == pytest.approx(2 * np.exp(-2 * 0.01), rel=1e-4)
    assert state.history[0] == 3


def test_zeros_leave_the_first_delayed_factor_alone() -> None:
    quantizer = parse_quantizer("e4m3@tensor.delayed2")
    state = update_scale_state(init_scale_state(quantizer), jnp.float32(0.0), quantizer)
    assert float(state.scale) == 1.0


def test_delayed_factor_saturates_but_shows_infinity() -> None:
    quantizer = parse_quantizer("e4m3@tensor.delayed")
    x = jnp.asarray([1000.0, 101.0, INF, NAN], jnp.float32)
    actual = fake_quantize(x, quantizer, scale=jnp.float32(0.5))
    assert actual[:2].tolist() == [224.0, 104.0]  # 101 / 0.5 lies between 192 and 208
    assert np.isnan(np.asarray(actual[2:])).all()


def test_largest_magnitude_sees_subnormals_and_nan() -> None:
    tiny = jnp.asarray([0.0, -(2.0**-140)], jnp.float32)
    assert np.asarray(largest_magnitude(tiny)).view(np.uint32) == 1 << 9
    assert np.isnan(largest_magnitude(jnp.asarray([1.0, NAN, INF], jnp.float32)))
    assert largest_magnitude(jnp.asarray([[1.0, -3.0]], jnp.bfloat16), 1).tolist() == [3.0]


@pytest.mark.parametrize(
    "name", [*NAMES, "e4m3", "e4m3@tensor.delayed7", "e2m1@block16.e4m3@tensor"]
)
def test_names_round_trip(name: str) -> None:
    quantizer = parse_quantizer(name)
    assert parse_quantizer(str(quantizer)) == quantizer
    assert hash(parse_quantizer(str(quantizer))) == hash(quantizer)


def test_block_formats_are_ordinary_quantizers() -> None:
    assert parse_quantizer("e4m3@block32.e8m0") == parse_quantizer("mxfp8")
    assert str(parse_quantizer("mxfp8_e4m3")) == "mxfp8"
    assert str(parse_quantizer("e2m1@block32.rceil.e8m0")) == "mxfp4.rceil"
    assert str(parse_quantizer("e2m1@block16.e4m3@tensor")) == "nvfp4"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("e4m3@row", "cannot read 'e4m3@row'"),
        ("e4m3@tensor8", "cannot read"),
        ("e4m3@block", "use blockN"),
        ("e4m3@block0", "use blockN"),
        ("e4m9x@tensor", "unknown number format"),
        ("e4m3@tensor.sideways", "unknown option 'sideways'"),
        ("e4m3.e8m0", "add @tensor"),
        ("e8m0@tensor", "for factors"),
        ("e4m3@tensor.affine", "zero point needs integer"),
        ("int8@tensor.e8m0.affine", "zero point needs integer"),
        ("e4m3@channel.delayed", "for the tensor"),
        ("e4m3@tensor.e4m3@tensor", "factor for the factors"),
        ("e4m3@tensor.rceil", "add .e8m0"),
        ("nvfp4.rceil", "add .e8m0"),
        ("", "cannot read"),
    ],
)
def test_bad_names_are_refused(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_quantizer(text)


def test_misuse_is_refused() -> None:
    x = jnp.ones((4,), jnp.float32)
    with pytest.raises(ValueError, match="has no factors"):
        quantize_with_scale(x, parse_quantizer("e4m3"))
    with pytest.raises(ValueError, match=r"pass scale=state\.scale"):
        fake_quantize(x, parse_quantizer("e4m3@tensor.delayed"))
    with pytest.raises(ValueError, match="and only then"):
        fake_quantize(x, parse_quantizer("e4m3@tensor"), scale=jnp.float32(1.0))
    with pytest.raises(ValueError, match=r"add \.delayed"):
        init_scale_state(parse_quantizer("e4m3@tensor"))
    with pytest.raises(ValueError, match="use f32, e8m0 or e4m3"):
        Quantizer(parse_quantizer("e4m3").format, "tensor", scale=parse_quantizer("bf16").format)


@pytest.mark.parametrize("name", ["e4m3@tensor", "mxfp8", "nvfp4", "int8@block16.affine"])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_nothing_is_promoted_or_broadcast_by_accident(name: str, dtype: Any) -> None:
    x = jax.random.normal(jax.random.key(0), (3, 20), jnp.float32).astype(dtype)
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        actual = fake_quantize(
            x, parse_quantizer(name), rounding="stochastic", key=jax.random.key(1)
        )
    assert actual.dtype == dtype


@pytest.mark.parametrize("name", ["e4m3@tensor", "int8@tensor", "int8@tensor.affine"])
def test_zero_tensors_get_the_smallest_normal_factor(name: str) -> None:
    quantizer = parse_quantizer(name)
    zeros = jnp.zeros((8,), jnp.float32)
    assert float(quantize_with_scale(zeros, quantizer).scale) == 2.0**-126
    assert fake_quantize(zeros, quantizer).tolist() == [0.0] * 8
