"""Products in narrow dtypes: where they are native, and that they are the emulated ones.

The native forms run on the CPU here, which widens them: what a GPU's or TPU's kernels make of them
is not tested.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from lmjax.precision import contraction, matmul
from lmjax.precision.backend import Backend, planned_for, this_backend
from lmjax.precision.block_scaled import Blocks, block_scaled_product
from lmjax.precision.contraction import roles_of
from lmjax.precision.formats import parse_format
from lmjax.precision.grammar import parse_policy
from lmjax.precision.matmul import einsum
from lmjax.precision.native import (
    Sums,
    in_words,
    is_block_scaled,
    multiplied,
    native_dtypes,
    products,
    summary,
)
from lmjax.precision.policy import SitePolicy
from lmjax.precision.quantizer import parse_quantizer
from lmjax.precision.settings import Operand

B200, H100, A100, CPU, TPU = (
    Backend("gpu", (10, 0)),
    Backend("gpu", (9, 0)),
    Backend("gpu", (8, 0)),
    Backend("cpu"),
    Backend("tpu"),
)
E4M3, E5M2, INT8 = (np.dtype(d) for d in (ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2, np.int8))


def linear(text: str) -> SitePolicy:
    return parse_policy(text).resolve("blocks/0/mlp/up")


@pytest.mark.parametrize(
    ("backend", "x", "w", "expected"),
    [
        (H100, "e4m3", "e4m3", (E4M3, E4M3)),
        (H100, "e4m3", "e5m2", (E4M3, E5M2)),
        (H100, "e5m2", "e4m3", (E5M2, E4M3)),
        (H100, "e5m2", "e5m2", None),
        (H100, "e4m3", "bf16", None),
        (H100, "e4m3", "int8", None),
        (H100, "e4m3fnuz", "e4m3fnuz", None),
        (Backend("gpu", (8, 9)), "e4m3", "e4m3", (E4M3, E4M3)),
        (A100, "e4m3", "e4m3", None),
        (A100, "int8", "int8", (INT8, INT8)),
        (A100, "int8", "int4", (INT8, INT8)),
        (A100, "int8", "int9", None),
        (TPU, "int8", "int8", (INT8, INT8)),
        (TPU, "e4m3", "e4m3", None),
        (CPU, "int8", "int8", None),
        (CPU, "e4m3", "e4m3", None),
    ],
)
def test_what_hardware_multiplies(backend: Backend, x: str, w: str, expected: Any):
    assert native_dtypes(backend, parse_format(x), parse_format(w), terms=4096) == expected


@pytest.mark.parametrize(
    ("policy", "backend", "lengths", "expected"),
    [
        ("mxfp8", B200, (96,), True),
        ("mxfp8", B200, (5, 64), True),
        ("mxfp8", B200, (64, 5), False),  # no whole blocks
        ("mxfp8", B200, (), False),
        ("mxfp8", H100, (96,), False),
        ("mxfp8", Backend("gpu", (12, 0)), (96,), False),
        ("mxfp8", TPU, (96,), False),
        ("mxfp8,w=mxfp8_e5m2", B200, (96,), True),
        ("mxfp8,w=mxfp8_e5m2,x=mxfp8_e5m2", B200, (96,), False),
        ("mxfp8,w=e4m3@block64.e8m0", B200, (128,), False),
        ("mxfp8,a=bf16", B200, (96,), True),
        ("mxfp8,a=bf16@block32", B200, (96,), False),
        ("mxfp8,w=e4m3@tensor", B200, (96,), False),
        ("nvfp4", B200, (48,), True),
        ("nvfp4,w=e2m1@block16.e4m3", B200, (48,), True),
        ("nvfp4,w=mxfp4", B200, (96,), False),
        ("mixed_bf16,w=mxfp4,x=mxfp4", B200, (96,), False),
        ("mixed_bf16", B200, (96,), False),
    ],
)  # fmt: skip
def test_which_blocks_hardware_multiplies(policy, backend, lengths, expected):
    site = linear(policy)
    assert is_block_scaled(backend, site, site.activations, site.weights, lengths) == expected


def test_a_sum_of_integers_must_fit_int32():
    int8 = parse_format("int8")
    longest = (2**31 - 1) // (128 * 128)
    assert native_dtypes(TPU, int8, int8, longest) == (INT8, INT8)
    assert native_dtypes(TPU, int8, int8, longest + 1) is None


@pytest.mark.parametrize(
    ("quantizer", "compute", "expected"),
    [
        ("e4m3", "bf16", "e4m3"),
        ("e4m3@tensor", "f16", "e4m3"),
        ("e5m2@channel", "bf16", "e5m2"),
        ("int8@channel", "bf16", "int8"),
        ("int16@tensor", "f32", "int16"),
        ("int16@tensor", "bf16", "bf16"),  # does not hold its elements
        ("f16@tensor", "bf16", "bf16"),
        ("bf16@tensor", "f32", "f32"),  # sums of elements would overflow
        ("mxfp8", "bf16", "bf16"),
        ("int8@channel.affine", "bf16", "bf16"),
        ("e4m3@tensor", "e5m7", "e4m3"),
        ("mxfp8", "e5m7", "f32"),
    ],
)
def test_elements_are_multiplied_where_their_factor_can_wait(quantizer, compute, expected):
    operand = Operand(parse_quantizer(quantizer))
    assert multiplied(operand, parse_format(compute)).name == expected


def test_an_operand_without_quantizer_is_of_the_compute_format():
    assert multiplied(None, parse_format("e5m7")).name == "e5m7"


def test_the_backend_in_use_is_described(monkeypatch):
    assert this_backend() == CPU
    for capability, expected in (("9.0", (9, 0)), ("12.1", (12, 1)), ("gfx942", (0, 0))):
        device = SimpleNamespace(platform="gpu", compute_capability=capability)
        monkeypatch.setattr(jax, "devices", lambda device=device: [device])
        assert this_backend() == Backend("gpu", expected)


def test_the_outermost_plan_decides():
    with planned_for(H100), planned_for(TPU):
        assert this_backend() == H100
    assert this_backend() == CPU


# --- products


SPEC = "btk,kn->btn"


def product_and_gradients(site: SitePolicy, x: Any, w: Any, g: Any) -> tuple[jax.Array, ...]:
    y, pullback = jax.vjp(functools.partial(einsum, SPEC, site=site), x, w)
    return (y, *pullback(g.astype(y.dtype)))


def operands() -> list[jax.Array]:
    generator = np.random.default_rng(0)
    draw = lambda *shape: generator.normal(size=shape) * 2.0 ** generator.integers(-4, 5, shape)
    return [jnp.asarray(draw(*s), jnp.float32) for s in ((3, 5, 37), (37, 23), (3, 5, 23))]


@pytest.fixture
def on(monkeypatch) -> Callable[[Backend], None]:
    """Makes the next trace believe that it is for another backend."""
    return lambda backend: monkeypatch.setattr(matmul, "this_backend", lambda: backend)


def operand_dtypes(equations: Any, site: SitePolicy) -> list[tuple[str, ...]]:
    jaxpr = jax.make_jaxpr(functools.partial(product_and_gradients, site))(*operands())
    dots = equations(jaxpr, "dot_general")
    return [tuple(v.aval.dtype.name for v in (*dot.invars, *dot.outvars)) for dot in dots]


FP8 = ("float8_e4m3fn", "float8_e5m2")


@pytest.mark.parametrize(
    ("policy", "backend", "expected"),
    [
        ("fp8", CPU, [("bfloat16", "bfloat16", "float32")] * 3),
        ("fp8", H100, [(FP8[0], FP8[0], "float32"), (*FP8[::-1], "float32"), (*FP8, "float32")]),
        ("fp8,g=e4m3@tensor.delayed", H100, [(FP8[0], FP8[0], "float32")] * 3),
        ("f32,w=e4m3,x=e4m3,g=e4m3,m=tf32", H100, [(FP8[0], FP8[0], "float32")] * 3),
        ("fp8,g=e4m3,a=bf16", H100, [(FP8[0], FP8[0], "float32")] * 3),
        ("fp8,a=bf16@block16", H100, [("float32",) * 3] * 3),
        ("mxfp8", H100, [("bfloat16", "bfloat16", "float32")] * 3),
        ("int8", CPU, [("bfloat16", "bfloat16", "float32")] * 3),
        ("int8", TPU, [("int8", "int8", "int32")] * 3),
        # Nothing would show a NaN: elements have none, and the factor is not taken from them.
        ("int8,x=int8,g=int8@tensor.delayed", TPU, [("bfloat16", "bfloat16", "float32")] * 3),
        ("mixed_bf16,w=int8@channel", TPU, [("bfloat16", "bfloat16", "float32")] * 3),
    ],
)  # fmt: skip
def test_what_the_dot_is_given(policy: str, backend: Backend, expected, on, equations, monkeypatch):
    monkeypatch.setattr(contraction, "_on_one_cpu", jnp.einsum)
    on(backend)
    found = operand_dtypes(equations, linear(policy))
    assert found == expected or found == [expected[0], expected[2], expected[1]]


@pytest.mark.parametrize(
    ("policy", "backend"),
    [
        ("fp8", H100),
        ("f32,w=e4m3@channel,x=e4m3,g=e5m2@channel", H100),
        ("mixed_bf16,w=int8@channel,x=int8@tensor,g=int4@channel", TPU),
    ],
)
def test_native_products_are_the_emulated_ones(policy: str, backend: Backend, on, compile_fast):
    site, drawn = linear(policy), operands()
    run = lambda: compile_fast(functools.partial(product_and_gradients, site))(*drawn)
    emulated = run()
    on(backend)
    for actual, expected in zip(run(), emulated, strict=True):
        assert actual.dtype == expected.dtype
        if backend == TPU:  # sums of so few integers are exact in f32 as well
            np.testing.assert_array_equal(actual, expected)
        spacing = float(jnp.finfo(site.compute.dtype).eps)
        size = float(jnp.max(jnp.abs(expected)))
        np.testing.assert_allclose(actual, expected, rtol=spacing, atol=1e-6 * size)


@pytest.mark.parametrize(("policy", "backend"), [("fp8", H100), ("int8", TPU), ("int8", CPU)])
def test_a_failure_stays_visible(policy: str, backend: Backend, on, compile_fast):
    """In its own row where that has a factor of its own, everywhere where the tensor has one."""
    on(backend)
    x, w, g = operands()
    run = compile_fast(functools.partial(product_and_gradients, linear(policy)))
    for bad in (np.nan, np.inf):
        y, _, dw = run(x.at[1, 2, 3].set(bad), w, g)
        hit = np.isnan(np.asarray(y, np.float32)).all(-1)
        assert hit[1, 2]
        assert hit.sum() == (hit.size if policy == "fp8" else 1)
        assert np.isnan(np.asarray(dw, np.float32)[3]).all()


def test_under_vmap_each_product_has_factors_of_its_own(on, compile_fast):
    on(H100)
    one = functools.partial(product_and_gradients, linear("fp8"))
    for mapped in compile_fast(jax.vmap(one))(*(jnp.stack([a, 2 * a]) for a in operands())):
        assert np.any(mapped[0] != 0)
        np.testing.assert_array_equal(mapped[1], 4 * mapped[0])


# --- block-scaled products

SIZES = {"b": 2, "t": 64, "k": 96, "n": 32, "g": 2, "s": 32, "h": 64}


def dequantized(x: Any, w: Any, of_x: Any, of_w: Any, preferred_element_type: Any) -> jax.Array:
    """What `jax.nn.scaled_matmul` computes, which JAX has for GPUs alone."""
    wide = functools.partial(jnp.asarray, dtype=preferred_element_type)
    times = lambda a, factors: (
        wide(a) * jnp.repeat(wide(factors), a.shape[2] // factors.shape[2], 2)
    )
    return jnp.einsum("bmk,bnk->bmn", times(x, of_x), times(w, of_w), precision="highest")


@pytest.fixture
def on_b200(on, monkeypatch) -> Callable[[], list[str]]:
    """Makes the next trace believe that it is for a B200; returns the dtypes that it multiplies."""
    found: list[str] = []

    def noted(*operands: jax.Array, **options: Any) -> jax.Array:
        found.append(" ".join(operand.dtype.name for operand in operands))
        return dequantized(*operands, **options)

    def begin() -> list[str]:
        monkeypatch.setattr(jax.nn, "scaled_matmul", noted)
        on(B200)
        return found

    return begin


def drawn(*axes: str) -> list[jax.Array]:
    generator = np.random.default_rng(0)
    sizes = ([SIZES[axis] for axis in one] for one in axes)
    return [jnp.asarray(generator.normal(size=size) / 8, jnp.float32) for size in sizes]


@pytest.mark.parametrize("spec", [SPEC, "btk,btn->kn", "bkgts,bskh->btkgh", "bkgts,btkgh->bskh"])
def test_any_product_is_block_scaled_along_its_last_sum(spec, on_b200):
    found, (operands, _, _) = on_b200(), spec.partition("->")
    plan, blocks, whole = roles_of(spec), [], []
    summed = (plan.x_summed, plan.w_summed)
    for array, axes in zip(drawn(*operands.split(",")), summed, strict=True):
        size = [n // 32 if axis == axes[-1] else n for axis, n in enumerate(array.shape)]
        factors = 2.0 ** jnp.asarray(np.random.default_rng(1).integers(-3, 4, size), jnp.float32)
        blocks.append(Blocks(array.astype(E4M3), factors.astype(jnp.float8_e8m0fnu)))
        spread = jnp.repeat(factors, 32, axes[-1])
        whole.append(np.asarray(array.astype(E4M3), np.float32) * spread)
    product = block_scaled_product(spec, *blocks)
    np.testing.assert_allclose(product, jnp.einsum(spec, *whole), rtol=1e-5, atol=1e-5)
    assert found == ["float8_e4m3fn float8_e4m3fn float8_e8m0fnu float8_e8m0fnu"]


@pytest.mark.parametrize(
    ("policy", "dtypes"),
    [
        ("mxfp8", "float8_e4m3fn float8_e4m3fn float8_e8m0fnu float8_e8m0fnu"),
        # In f32, as the emulation rounds element times factor, and hardware does not.
        ("nvfp4,c=f32", "float4_e2m1fn float4_e2m1fn float8_e4m3fn float8_e4m3fn"),
    ],
)
def test_block_scaled_products_are_the_emulated_ones(policy, dtypes, on_b200, compile_fast):
    """And both show a NaN or an infinity in its own row alone, if no factor is the tensor's."""
    site, (x, w) = linear(policy), drawn("btk", "kn")
    multiply = lambda: compile_fast(lambda x: einsum(SPEC, x, w, site))
    emulated, found = multiply()(x), on_b200()
    native = multiply()
    size, spacing = float(jnp.max(jnp.abs(emulated))), float(jnp.finfo(emulated.dtype).eps)
    assert native(x).dtype == emulated.dtype
    np.testing.assert_allclose(native(x), emulated, rtol=8 * spacing, atol=1e-6 * size)
    for bad in (np.nan, np.inf):
        hit = np.isnan(np.asarray(native(x.at[1, 2, 3].set(bad)), np.float32)).all(-1)
        assert hit[1, 2]
        assert hit.sum() == (1 if policy == "mxfp8" else hit.size)
    assert found == [dtypes]


def test_a_block_scaled_product_of_mapped_and_unmapped_operands(on_b200):
    on_b200()
    x, w = drawn("bkt", "kn")
    blocks = lambda a: Blocks(a.astype(E4M3), jnp.ones((*a.shape[:-2], 3, a.shape[-1]), E4M3))
    one = lambda x: block_scaled_product("kt,kn->tn", blocks(x), blocks(w))
    np.testing.assert_array_equal(jax.vmap(one)(x), jnp.stack([one(x[0]), one(x[1])]))


# --- factors after the sum


def test_a_factor_that_is_subnormal_in_f32_multiplies_the_sum():
    """2**-127 is the smallest e8m0; CPUs take it for 0 when they multiply."""
    x, w = jnp.full((1, 1, 1), 2.0**-120), jnp.full((1, 1), 2.0**60)
    y = einsum(SPEC, x.astype(jnp.float32), w.astype(jnp.float32), linear("f32,x=e4m3@tensor.e8m0"))
    assert float(y[0, 0, 0]) == 2.0**-60


@pytest.mark.parametrize("kind", ["bf16@tensor", "f32@tensor", "e4m3@block1"])
def test_factors_of_wide_elements_and_of_blocks_do_not_wait(kind: str):
    """The largest element would be the largest f32, and the sum of two products infinite."""
    ones = jnp.ones((1, 1, 2), jnp.float32)
    y = einsum(SPEC, ones, ones[0].T, linear(f"f32,x={kind},w={kind}"))
    assert float(y[0, 0, 0]) == pytest.approx(2.0, rel=2**-7)


def test_a_narrow_accumulator_holds_sums_of_elements():
    """Ones become 448 in e4m3, so f16 ends at the first product of two of them; f32 does not."""
    ones = jnp.ones((1, 1, 2), jnp.float32)
    product = lambda text: float(einsum(SPEC, ones, ones[0].T, linear(text))[0, 0, 0])
    assert product("f32,x=e4m3@tensor,w=e4m3@tensor") == pytest.approx(2.0, rel=1e-6)
    assert product("f32,x=e4m3@tensor,w=e4m3@tensor,a=f16") == np.inf


# --- in words


def test_products_in_words():
    def words(text: str, backend: Backend, rows: int = 16) -> str:
        policy, path = parse_policy(text), "blocks/0/mlp/up"
        sites = {path: policy.resolve(path) for path in (path, "embed")}
        sums = {path: Sums((96,), (64,), (rows, 64))}
        (product,) = products(sites, sums, backend).values()
        return in_words(product)

    assert words("fp8", H100) == "native"
    assert words("fp8", A100) == "emulated in bf16"
    assert words("fp8,a=bf16@block4", H100) == "emulated in f32"
    assert words("fp8,g=mxfp8", H100) == ("y native, dx emulated in bf16, dw emulated in bf16")
    assert words("mxfp8", B200) == words("nvfp4", B200) == "native"
    assert words("mxfp8", H100) == "emulated in bf16"
    assert words("int8", A100) == "native"
    assert words("int8", TPU, rows=2**11) == "y native, dx native, dw emulated in bf16"
    assert words("mixed_bf16", TPU) == words("f32", CPU) == "native"
    assert words("f32,m=tf32", A100) == words("f32,a=bf16@block4", A100) == "emulated in f32"
    assert words("mixed_f16", CPU) == "emulated in f32"
    assert words("p=f32,c=e5m7", A100) == "emulated in f32"
    assert words("p=f32,c=e4m3", H100) == "native"


def test_second_operands_of_attention_are_activations():
    site = parse_policy("mixed_bf16; **/scores: x=e4m3,w=int8").resolve("blocks/0/attention/scores")
    path = "blocks/0/attention/scores"
    product = products({path: site}, {path: Sums((64,), (32,), (32,))}, H100)[path]
    assert {name: one.operands for name, one in product.items()} == {
        "y": ("e4m3", "e4m3"),
        "dx": ("bf16", "e4m3"),
        "dw": ("e4m3", "bf16"),
    }


def test_the_summary_names_each_kind_once():
    policy = parse_policy("fp8; **/down: g=e5m2@tensor,x=nvfp4")
    sites = {
        f"blocks/0/mlp/{name}": policy.resolve(f"blocks/0/mlp/{name}") for name in ("up", "down")
    }
    sums = dict.fromkeys(sites, Sums((96,), (64,), (4, 32)))
    assert summary(products(sites, sums, H100).values()) == {
        "native": [
            "e4m3@tensor x e4m3@tensor", "e5m2@tensor x e4m3@tensor", "e4m3@tensor x e5m2@tensor",
        ],
        "emulated": ["nvfp4 x e4m3@tensor in bf16", "nvfp4 x e5m2@tensor in bf16"],
    }  # fmt: skip
