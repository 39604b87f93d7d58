"""The one dot product: the formats of its operands, of its sum and of both its gradients."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmjax.precision import contraction, matmul
from lmjax.precision.backend import Backend, planned_for
from lmjax.precision.grammar import parse_policy
from lmjax.precision.matmul import einsum
from lmjax.precision.probes import Census, Probe

SIZES = dict(zip("btskghdnv", (2, 5, 5, 2, 3, 4, 6, 7, 9), strict=True))
SPECS = ["btk,kn->btn", "btd,vd->btv", "btkgh,bskh->bkgts", "bkgts,bskh->btkgh"]
FORMATS = {"f32": np.float32, "bf16": jnp.bfloat16, "f16": np.float16}


def operands(spec: str, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Two f32 operands and a cotangent, none of them representable in 16 bits."""
    inputs, _, output = spec.partition("->")
    generator = np.random.default_rng(seed)
    return tuple(
        generator.normal(size=[SIZES[index] for index in axes]).astype(np.float32)
        for axes in (*inputs.split(","), output)
    )


def rounded(x: np.ndarray, dtype: type) -> np.ndarray:
    return np.asarray(x).astype(np.float32).astype(dtype).astype(np.float64)


def reference(spec: str, dtype: type, x: np.ndarray, w: np.ndarray, g: np.ndarray):
    """The product and its two gradients: operands rounded once, summed in f64, rounded once."""
    inputs, _, y_axes = spec.partition("->")
    x_axes, w_axes = inputs.split(",")
    x, w, g = (rounded(a, dtype) for a in (x, w, g))
    return (
        rounded(np.einsum(spec, x, w), dtype),
        rounded(np.einsum(f"{y_axes},{w_axes}->{x_axes}", g, w), dtype),
        rounded(np.einsum(f"{x_axes},{y_axes}->{w_axes}", x, g), dtype),
    )


def product_and_gradients(spec: str, name: str, x, w, g):
    site = parse_policy(name).resolve("head")
    y, pullback = jax.vjp(
        functools.partial(einsum, spec, site=site), jnp.asarray(x), jnp.asarray(w)
    )
    return (y, *pullback(jnp.asarray(g).astype(y.dtype)))


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("spec", SPECS)
def test_product_and_both_gradients_round_once(spec: str, name: str):
    dtype = FORMATS[name]
    x, w, g = operands(spec)
    ours = product_and_gradients(spec, name, x, w, g)
    assert ours[0].dtype == dtype
    assert ours[1].dtype == ours[2].dtype == np.float32, "gradients have the operands' own dtype"
    # f32 sums in another order than f64 does; where that crosses a rounding boundary, the narrow
    # results are neighbours. Two roundings, or a narrow accumulator, would do worse.
    spacing = float(jnp.finfo(dtype).eps)
    for actual, expected in zip(ours, reference(spec, dtype, x, w, g), strict=True):
        actual = np.asarray(actual, np.float64)
        np.testing.assert_allclose(actual, expected, rtol=spacing, atol=4e-6)
        if name != "f32":
            assert np.mean(actual == expected) > 0.99


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("spec", SPECS)
def test_all_three_products_have_narrow_operands_and_a_wide_sum(spec: str, name: str, equations):
    x, w, g = map(jnp.asarray, operands(spec))
    jaxpr = jax.make_jaxpr(lambda x, w, g: product_and_gradients(spec, name, x, w, g))(x, w, g)
    dots = equations(jaxpr, "dot_general")
    assert len(dots) == 3
    for dot in dots:
        assert {v.aval.dtype.name for v in dot.invars} == {np.dtype(FORMATS[name]).name}
        assert dot.params["preferred_element_type"] == np.float32
        assert dot.outvars[0].aval.dtype == np.float32
        highest = jax.lax.Precision.HIGHEST
        assert (dot.params["precision"] == (highest, highest)) == (name == "f32")


def test_products_are_summed_in_f32():
    # In a bf16 accumulator 256 + 1 is 256 again.
    ones = jnp.ones((1, 1, 4096), jnp.bfloat16)
    site = parse_policy("bf16").resolve("head")
    assert einsum("btk,kn->btn", ones, jnp.ones((4096, 1), jnp.bfloat16), site)[0, 0, 0] == 4096.0


def test_operands_are_rounded_to_the_compute_format():
    # 1 + 2^-10 is 1 in bf16: in f32 the difference to 1 would survive the product.
    x = jnp.full((1, 1, 1), 1.0 + 2.0**-10, jnp.float32)
    w = jnp.full((1, 1), 2.0**10, jnp.float32)
    product = lambda name: float(
        einsum("btk,kn->btn", x, w, parse_policy(name).resolve("head"))[0, 0, 0]
    )
    assert product("p=f32,c=bf16") == 2.0**10
    assert product("f32") == 2.0**10 + 1.0


@pytest.mark.parametrize(
    "spec", ["bk,kn->b", "bk,bk->", "bb,bn->bn", "bx,bn->bn", "btk,kn->bn", "bk,kkn->bn"]
)
def test_specs_whose_gradient_is_not_a_product_are_refused(spec: str):
    inputs, _, _ = spec.partition("->")
    x, w = (jnp.ones((2,) * len(axes), jnp.float32) for axes in inputs.split(","))
    site = parse_policy("f32").resolve("head")
    if spec == "bk,bk->":  # every index stands in the other operand: a scalar product is fine
        assert einsum(spec, x, w, site) == 4.0
        return
    with pytest.raises(ValueError, match="every index of an operand"):
        einsum(spec, x, w, site)


@pytest.mark.parametrize(
    ("policy", "platform", "narrow"),
    [
        ("bf16,m=default", "gpu", 3),
        ("mixed_f16; **: m=default", "gpu", 3),
        ("bf16", "gpu", 0),
        ("bf16,m=default", "tpu", 0),
        ("bf16,m=default", "cpu", 0),
        ("f32,m=default", "gpu", 0),
        ("bf16,m=default,a=bf16", "gpu", 0),
        ("bf16,m=default,w=e4m3", "gpu", 1),  # dw, whose operands have no quantizer
        ("c=e5m4,m=default", "gpu", 0),
    ],
)
def test_gpus_return_products_in_16_bits_only_where_parts_of_sums_may_be_rounded(
    policy, platform, narrow, equations
):
    x, w, g = operands("btd,vd->btv")
    # Not the head, whose logits may have another format.
    site = parse_policy(policy).resolve("blocks/0/mlp/up")
    backend = Backend(platform, (9, 0) if platform == "gpu" else (0, 0))

    def gradients(x, w, g):
        y, pull = jax.vjp(functools.partial(einsum, "btd,vd->btv", site=site), x, w)
        return y, *pull(g.astype(y.dtype))

    with planned_for(backend):
        traced = jax.make_jaxpr(gradients)(x, w, g)
    products = equations(traced, "dot_general")
    assert len(products) == 3
    assert sum(dot.outvars[0].aval.dtype.itemsize == 2 for dot in products) == narrow
    for found, expected in zip(
        jax.core.eval_jaxpr(traced.jaxpr, traced.consts, x, w, g), gradients(x, w, g), strict=True
    ):
        assert found.dtype == expected.dtype
        np.testing.assert_allclose(np.float64(found), np.float64(expected), rtol=2**-6, atol=2**-6)


def test_a_gradient_that_is_measured_keeps_its_sums_in_f32_on_gpus(equations):
    x, w, g = operands("btd,vd->btv")
    site = parse_policy("bf16,m=default").resolve("blocks/0/mlp/up")
    probe = Probe({}, {"dw": {"census": Census.empty()}})

    def gradients(x, w, g):
        y, pull = jax.vjp(functools.partial(einsum, "btd,vd->btv", site=site, probe=probe), x, w)
        return pull(g.astype(y.dtype))

    with planned_for(Backend("gpu", (9, 0))):
        traced = jax.make_jaxpr(gradients)(x, w, g)
    wide = [dot.outvars[0].aval.dtype.itemsize for dot in equations(traced, "dot_general")]
    assert sorted(wide) == [2, 2, 4]


@pytest.mark.parametrize("policy", ["mixed_bf16", "mixed_f16", "f32"])
def test_one_cpu_keeps_weights_as_they_are_stored_and_casts_them_to_the_same_numbers(
    policy, monkeypatch
):
    x, w, g = map(jnp.asarray, operands("btd,vd->btv"))
    site = parse_policy(policy).resolve("blocks/0/mlp/up")
    found = {}
    for one in (True, False):
        monkeypatch.setattr(matmul, "is_one_cpu", lambda one=one: one)
        monkeypatch.setattr(contraction, "is_one_cpu", lambda one=one: one)
        y, pull = jax.vjp(functools.partial(einsum, "btd,vd->btv", site=site), x, w)
        kept = [leaf for leaf in jax.tree.leaves(pull) if getattr(leaf, "shape", ()) == w.shape]
        assert {leaf.dtype for leaf in kept} == {w.dtype if one else site.compute.dtype}
        found[one] = (y, *pull(g.astype(y.dtype)))
        nan = pull(jnp.full_like(y, jnp.nan))  # the 1 that orders the cast stays finite
        assert all(jnp.isnan(leaf).all() for leaf in nan)
    for kept, cast in zip(found[True], found[False], strict=True):
        assert kept.dtype == cast.dtype
        np.testing.assert_array_equal(kept, cast)
