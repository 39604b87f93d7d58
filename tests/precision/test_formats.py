"""What a format is: its numbers, against ml_dtypes and the written definition."""

from __future__ import annotations

from fractions import Fraction

import ml_dtypes
import numpy as np
import pytest

from lmjax.precision.formats import Encoding, Format, format_table, integer, parse_format

ML_DTYPES = {
    "bf16": ml_dtypes.bfloat16,
    "f16": np.float16,
    "e4m3": ml_dtypes.float8_e4m3fn,
    "e4m3fnuz": ml_dtypes.float8_e4m3fnuz,
    "e5m2": ml_dtypes.float8_e5m2,
    "e5m2fnuz": ml_dtypes.float8_e5m2fnuz,
    "e3m4": ml_dtypes.float8_e3m4,
    "e8m0": ml_dtypes.float8_e8m0fnu,
    "e3m2": ml_dtypes.float6_e3m2fn,
    "e2m3": ml_dtypes.float6_e2m3fn,
    "e2m1": ml_dtypes.float4_e2m1fn,
}


@pytest.mark.parametrize("name", ML_DTYPES)
def test_table_is_that_of_ml_dtypes(name: str) -> None:
    format = parse_format(name)
    storage = np.uint16 if format.bits == 16 else np.uint8
    codes = np.arange(2**format.bits, dtype=storage)
    with np.errstate(invalid="ignore"):
        expected = codes.view(ML_DTYPES[name]).astype(np.float64)
    np.testing.assert_array_equal(format.values(), expected)
    numbers = ~np.isnan(expected)
    np.testing.assert_array_equal(
        np.signbit(format.values())[numbers], np.signbit(expected)[numbers]
    )


@pytest.mark.parametrize("name", [*ML_DTYPES, "f32", "f64"])
def test_characteristics_are_those_of_ml_dtypes(name: str) -> None:
    format = parse_format(name)
    info = ml_dtypes.finfo(ML_DTYPES.get(name, format.dtype))
    assert format.largest_finite == float(info.max)
    assert format.smallest_normal == float(info.smallest_normal)
    assert format.smallest_subnormal == float(info.smallest_subnormal)
    assert format.epsilon == float(info.eps)
    assert format.bits == info.bits


@pytest.mark.parametrize(
    ("name", "positive"),
    [
        ("e2m1", [0, 0.5, 1, 1.5, 2, 3, 4, 6]),
        ("int4", range(8)),
        ("e3m0", [0, 0.25, 0.5, 1, 2, 4, 8, np.nan]),
        ("e2m2", [0, 0.25, 0.5, 0.75, 1, 1.25, 1.5, 1.75, 2, 2.5, 3, 3.5, np.inf, *[np.nan] * 3]),
    ],
)
def test_small_tables_written_out(name: str, positive: list[float]) -> None:
    table = parse_format(name).values()
    np.testing.assert_array_equal(table[: len(positive)], np.array(positive, np.float64))


@pytest.mark.parametrize("bits", range(2, 17))
def test_integers_are_twos_complement(bits: int) -> None:
    half = 2 ** (bits - 1)
    np.testing.assert_array_equal(
        integer(bits).values(), np.concatenate([np.arange(half), np.arange(-half, 0)])
    )
    assert integer(bits).smallest_finite == -half
    assert integer(bits).largest_finite == half - 1


@pytest.mark.parametrize("name", ["e6m9", "e2m0", "e7m3", "tf32", "e8m22"])
def test_generic_formats_follow_ieee_754(name: str) -> None:
    exponent_bits, mantissa_bits = (8, 10) if name == "tf32" else map(int, name[1:].split("m"))
    format = parse_format(name)
    bias = 2 ** (exponent_bits - 1) - 1
    top = 2**exponent_bits - 2  # the exponent above is infinity and NaN, or NaN alone
    largest = (2 - Fraction(1, 2**mantissa_bits)) * Fraction(2) ** (top - bias)
    assert Fraction(format.largest_finite) == largest
    assert Fraction(format.smallest_subnormal) == Fraction(2) ** (1 - bias - mantissa_bits)
    assert format.has_infinity == bool(mantissa_bits)
    assert format.has_nan


def test_specials() -> None:
    nan_counts = {name: sum(map(len, parse_format(name).nan_codes)) for name in ML_DTYPES}
    assert nan_counts == {
        "bf16": 254,
        "f16": 2046,
        "e4m3": 2,
        "e4m3fnuz": 1,
        "e5m2": 6,
        "e5m2fnuz": 1,
        "e3m4": 30,
        "e8m0": 1,
        "e3m2": 0,
        "e2m3": 0,
        "e2m1": 0,
    }
    with_infinity = {name for name in ML_DTYPES if parse_format(name).has_infinity}
    assert with_infinity == {"bf16", "f16", "e5m2", "e3m4"}
    without_negative_zero = {n for n in ML_DTYPES if not parse_format(n).has_negative_zero}
    assert without_negative_zero == {"e4m3fnuz", "e5m2fnuz", "e8m0"}


@pytest.mark.parametrize(
    ("name", "canonical"),
    [
        ("float64", "f64"),
        ("full", "f32"),
        ("float32", "f32"),
        ("bfloat16", "bf16"),
        ("float16", "f16"),
        ("e5m10", "f16"),
        ("e8m7", "bf16"),
        ("e8m10", "tf32"),
        ("e8m23", "f32"),
        ("e4m3fn", "e4m3"),
        ("float8_e5m2fnuz", "e5m2fnuz"),
        ("e6m9", "e6m9"),
        ("int5", "int5"),
    ],
)
def test_names(name: str, canonical: str) -> None:
    assert parse_format(name).name == canonical
    assert parse_format(canonical) == parse_format(name)
    assert hash(parse_format(canonical)) == hash(parse_format(name))


@pytest.mark.parametrize(
    # float8_e4m3 is IEEE-like in ml_dtypes, unlike our e4m3: better refused than taken for it.
    "name",
    ["", "half", "e1m3", "e9m2", "e4m24", "e04m3", "int1", "int17", "int08", "BF16", "float8_e4m3"],
)
def test_other_names_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match=r"unknown number format .* accepted are f64"):
        parse_format(name)


def test_refusal_suggests_the_nearest_name() -> None:
    with pytest.raises(ValueError, match="did you mean 'bfloat16'"):
        parse_format("bfloat61")


def test_tables_end_at_16_bits() -> None:
    with pytest.raises(ValueError, match="table"):
        parse_format("tf32").values()


def test_inconsistent_descriptions_are_refused() -> None:
    with pytest.raises(ValueError, match="no exponent bits"):
        Format("odd", 4, 3, 7, Encoding.INTEGER)
    with pytest.raises(ValueError, match="no mantissa bits"):
        Format("odd", 8, 1, 127, Encoding.SCALE)
    with pytest.raises(ValueError, match="need a mantissa bit to differ in"):
        Format("odd", 4, 0, 7, Encoding.IEEE)


def test_table_for_people_says_what_is_native() -> None:
    rows = {row.name: row for row in format_table()}
    assert rows["e4m3"].native == "float8_e4m3fn"
    assert rows["tf32"].native == "emulated"
    assert rows["e4m3"].layout == "1+4+3 fn"
    assert rows["e8m0"].layout == "8+0 scale"
    assert rows["int8"].bias is None
    assert [row.name for row in format_table(["e6m9"])] == ["e6m9"]
