"""Every form in which a product may be written is the same product."""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmjax.precision import contraction
from lmjax.precision.backend import Backend
from lmjax.precision.one_row import row_times

SIZES = dict(zip("btskghdnvx", (2, 5, 6, 3, 2, 4, 6, 7, 9, 8), strict=True))
SPECS = [
    "btk,kn->btn", "btn,kn->btk", "btk,btn->kn",
    "btd,vd->btv", "btv,vd->btd", "btd,btv->vd",
    "btkgh,bskh->bkgts", "bkgts,bskh->btkgh", "btkgh,bkgts->bskh",
    "btk,tbn->kn", "btn,btk->nk", "nk,nv->kv", "bk,bk->", "bn,xn->xb",
]  # fmt: skip
FORMS = {
    # devices, backend, whether bf16 pays
    "one device": (1, "cpu", False),
    "one device, fast bf16": (1, "cpu", True),
    "eight devices": (8, "cpu", False),
    "another backend": (1, "gpu", False),
}


@pytest.fixture
def pretend(monkeypatch) -> Callable[[str], None]:
    """Makes the next trace believe that it is for one of the `FORMS`."""

    def pretend(form: str) -> None:
        devices, backend, pays = FORMS[form]
        monkeypatch.setattr(jax, "device_count", lambda: devices)
        monkeypatch.setattr(contraction, "this_backend", lambda: Backend(backend))
        monkeypatch.setattr(contraction, "bf16_pays", lambda: pays)

    return pretend


def contract(spec: str, x: jax.Array, w: jax.Array) -> jax.Array:
    precision = jax.lax.Precision("highest" if x.dtype == jnp.float32 else "default")
    return contraction.contract(spec, x, w, precision=precision, accumulate=jnp.float32)


def draw(spec: str, dtype=jnp.float32, alone: str = "") -> list[jax.Array]:
    """Operands; axes that are `alone` have length 1."""
    generator = np.random.default_rng(0)
    inputs = spec.partition("->")[0].split(",")
    shapes = [[1 if axis in alone else SIZES[axis] for axis in axes] for axes in inputs]
    return [jnp.asarray(generator.normal(size=s).astype(np.float32)).astype(dtype) for s in shapes]


@pytest.mark.parametrize(
    ("dtype", "alone"),
    [(jnp.float32, ""), (jnp.bfloat16, ""), (jnp.bfloat16, "btg"), (jnp.float16, "")],
    ids=("float32", "bfloat16", "bfloat16, one row", "float16"),
)
@pytest.mark.parametrize("spec", SPECS)
def test_every_form_is_the_product(spec: str, dtype, alone: str, pretend):
    x, w = draw(spec, dtype, alone)

    def in_every_form(x: jax.Array, w: jax.Array) -> list[jax.Array]:
        products = []
        for form in FORMS:
            pretend(form)
            products.append(contract(spec, x, w))
            stacked = jax.vmap(functools.partial(contract, spec))(x[None], w[None])
            products.append(stacked[0])
        return products

    expected = np.einsum(spec, np.asarray(x, np.float64), np.asarray(w, np.float64))
    for product in jax.jit(in_every_form)(x, w):
        assert product.dtype == np.float32
        np.testing.assert_allclose(product, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("spec", ["btk,kn->btn", "bthd,hdn->btn", "btn,nhd->bthd", "btd,vd->btv"])
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.int8])
def test_elements_of_weights_are_read_as_they_are(spec: str, dtype, equations, pretend):
    """One row; several rows under vmap are a product."""
    pretend("one device, fast bf16")
    x, _ = draw(spec, alone="bt")
    row, weights = jnp.round(4 * x).astype(dtype), spec.partition("->")[0].split(",")[1]
    shape = [SIZES[axis] for axis in weights]
    w = jnp.asarray(np.random.default_rng(1).integers(-127, 128, shape), jnp.int8)
    wide = jnp.int32 if dtype == jnp.int8 else jnp.float32
    product = functools.partial(
        contraction.contract, spec, precision=jax.lax.Precision.DEFAULT, accumulate=wide
    )
    assert contraction.few_rows(spec, row.shape) == 1
    assert not list(equations(jax.make_jaxpr(product)(row, w), "dot_general"))
    expected = np.einsum(spec, *(np.asarray(a, np.float64) for a in (row, w)))
    for elements in (w, w.astype(jnp.float32)):
        np.testing.assert_array_equal(product(row, elements), expected)
    rows = jnp.stack([row, -row, 2 * row])
    each = jax.vmap(product, in_axes=(0, None))
    assert list(equations(jax.make_jaxpr(each)(rows, w), "dot_general"))
    np.testing.assert_array_equal(each(rows, w), np.stack([expected, -expected, 2 * expected]))


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("terms", [1, 7, 31, 32, 48, 96, 262, 2080, 32 * 131])
def test_loops_over_a_row_add_up_every_product(terms: int, turned: bool):
    """Also where a number of terms has no divisor that suits, and where sums are of many parts."""
    drawn = np.random.default_rng(terms).integers(-8, 9, (terms, 6))
    w = jnp.asarray(drawn[:, 1:], jnp.float16)
    row = jnp.asarray(drawn[:, 0], jnp.bfloat16)
    given = {"turned": turned, "accumulate": jnp.float32}
    found = jax.jit(functools.partial(row_times, **given))(row, w.T if turned else w)
    np.testing.assert_array_equal(found, drawn[:, 0] @ drawn[:, 1:])


def test_several_rows_and_operands_with_shared_axes_are_products(pretend):
    pretend("one device")
    assert contraction.few_rows("btk,kn->btn", (1, 2, 7)) == 2
    assert not contraction.few_rows("btk,kn->btn", (1, contraction.FEW_ROWS + 1, 7))
    assert not contraction.few_rows("btkgh,bskh->bkgts", (1, 1, 2, 1, 4))
    pretend("eight devices")
    assert not contraction.few_rows("btk,kn->btn", (1, 1, 7))


@pytest.mark.parametrize("spec", ["btk,kn->btn", "bthd,hdn->btn", "btn,nhd->bthd", "btd,vd->btv"])
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.int8])
def test_weights_are_widened_in_pieces_for_a_few_rows(spec: str, dtype, equations, pretend):
    """To the bit as all at once, also where pieces do not divide the outputs."""
    pretend("one device, fast bf16")
    sizes = {"b": 3, "t": 2, "k": 512, "n": 520, "h": 4, "d": 130, "v": 2555}
    x_axes, w_axes = spec.partition("->")[0].split(",")
    generator = np.random.default_rng(0)
    of = lambda axes: generator.integers(-9, 10, [sizes[a] for a in axes]).astype(np.float32)
    x, w = jnp.asarray(of(x_axes), dtype), jnp.asarray(of(w_axes), jnp.int8)
    expected = np.einsum(spec, np.asarray(x, np.float64), np.asarray(w, np.float64))
    wide = jnp.int32 if dtype == jnp.int8 else jnp.float32
    product = functools.partial(
        contraction.contract, spec, precision=jax.lax.Precision.DEFAULT, accumulate=wide
    )
    for elements in (w, w.astype(dtype)):
        np.testing.assert_array_equal(jax.jit(product)(x, elements), expected)
        dots = equations(jax.make_jaxpr(product)(x, elements), "dot_general")
        largest = max(dot.invars[1].aval.size for dot in dots)
        ready = elements.dtype == dtype == jnp.bfloat16
        assert ready or largest <= 0.55 * w.size


@pytest.mark.parametrize("spec", SPECS)
def test_one_device_changes_nothing_but_shapes(spec: str, equations, pretend):
    pretend("one device")
    jaxpr = jax.make_jaxpr(functools.partial(contract, spec))(*draw(spec))
    shapes = {"dot_general", "reshape", "transpose", "optimization_barrier"}
    assert {e.primitive.name for e in equations(jaxpr)} <= shapes


def dot(equations, spec: str, dtype=jnp.float32):
    (dot,) = equations(
        jax.make_jaxpr(functools.partial(contract, spec))(*draw(spec, dtype)), "dot_general"
    )
    return dot


@pytest.mark.parametrize("form", FORMS)
def test_axes_that_a_mesh_may_divide_are_not_merged(form: str, equations, pretend):
    pretend(form)
    summed, _ = dot(equations, "btk,btn->kn").params["dimension_numbers"]
    assert len(summed[0]) == (1 if form.startswith("one device") else 2)


def test_the_last_index_of_the_result_comes_from_the_second_operand(equations, pretend):
    pretend("one device")
    # A softmax over s then reads its row in one piece.
    (product,) = dot(equations, "btkgh,bskh->bkgts").outvars
    assert product.aval.shape == tuple(SIZES[axis] for axis in "bktgs")


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_narrow_operands_are_multiplied_as_f32_where_that_is_faster(
    dtype, form: str, equations, pretend
):
    pretend(form)
    product = dot(equations, "btk,kn->btn", dtype)
    assert {operand.aval.dtype for operand in product.invars} == {np.dtype(dtype)}
    as_f32 = product.params["precision"] == jax.lax.DotAlgorithmPreset.F32_F32_F32
    _, backend, pays = FORMS[form]
    slow = dtype == jnp.float16 or (dtype == jnp.bfloat16 and not pays)
    assert as_f32 == (slow and backend == "cpu")


@pytest.mark.parametrize("form", ["one device", "one device, fast bf16"])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("spec", ["btk,btn->kn", "btd,btv->vd"])
def test_no_first_operand_is_summed_over_its_rows(spec, dtype, form, equations, pretend):
    pretend(form)
    summed, _ = dot(equations, spec, dtype).params["dimension_numbers"]
    assert summed == ((1,), (0,))


@pytest.mark.parametrize(
    ("vendor", "flags", "pays"),
    [
        ("AuthenticAMD", "avx512f avx512_bf16", True),
        ("AuthenticAMD", "avx512f", False),
        ("GenuineIntel", "avx512_bf16 avx512_fp16", False),
        ("GenuineIntel", "avx512_bf16 amx_bf16 amx_tile", True),
        (None, "", False),
    ],
)
def test_bf16_pays_where_the_processor_says_so(vendor, flags, pays, tmp_path, monkeypatch):
    path = tmp_path / "cpuinfo"
    if vendor is not None:
        path.write_text(f"processor\t: 0\nvendor_id\t: {vendor}\nflags\t\t: fpu {flags}\n\n")
    monkeypatch.setattr(contraction, "CPU_INFO", path)
    contraction.bf16_pays.cache_clear()
    try:
        assert contraction.bf16_pays() == pays
    finally:
        contraction.bf16_pays.cache_clear()


def test_what_waits_for_a_cotangent_is_unchanged_even_if_that_is_not_finite(pretend):
    pretend("one device")
    x = jnp.arange(6, dtype=jnp.float32).reshape(2, 3)
    for first in (1.0, jnp.inf, jnp.nan):
        waited = contraction.not_before(jnp.full((2,), first, jnp.float16), x)
        np.testing.assert_array_equal(waited, x)
