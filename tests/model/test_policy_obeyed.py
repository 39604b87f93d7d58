"""Every word of a policy is obeyed by the program that is traced, and by no more than it names."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmjax.inspection.traced import scan_counts
from lmjax.model import apply, layers
from lmjax.parallel import sharding
from lmjax.precision import paths
from lmjax.runs.resolved import phase_of
from lmjax.train.step import make_scaled_loss, train_step

POLICIES = ["f32", "mixed_bf16", "mixed_f16", "pure_bf16", "pure_f16", "p=bf16,c=f16,o=f32"]
FAMILIES = ["gpt2", "llama"]
NARROW = {"bfloat16", "float16"}


@pytest.fixture(scope="module")
def gradient_jaxpr(tiny, draw_params, draw_batch) -> Callable[..., Any]:
    """The jaxpr of loss and gradients of a tiny model under a policy, traced once."""

    @functools.cache
    def trace(policy: str, family: str = "gpt2") -> Any:
        config = tiny(policy, family)
        mesh = sharding.make_mesh(config.mesh, jax.devices()[:1])
        gradients = jax.grad(make_scaled_loss(phase_of(config), mesh), has_aux=True)
        scale = jnp.ones((), jnp.float32)
        return jax.make_jaxpr(gradients)(
            draw_params(config), draw_batch(config), jax.random.key(0), scale
        )

    return trace


@pytest.fixture(scope="module")
def formats_of(gradient_jaxpr, equations) -> Callable[..., set[str]]:
    """The dtypes that a primitive computes in, among equations of one rank of result."""

    def formats(policy: str, primitive: str, family: str = "gpt2", ndim: int | None = None):
        found = equations(gradient_jaxpr(policy, family), primitive)
        ranks = [e for e in found if ndim is None or e.outvars[0].aval.ndim == ndim]
        return {e.outvars[0].aval.dtype.name for e in ranks}

    return formats


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("policy", POLICIES)
def test_compute_every_product_forward_and_backward(
    policy, family, gradient_jaxpr, equations, tiny
):
    compute = phase_of(tiny(policy)).sites["embed"].compute.dtype
    dots = equations(gradient_jaxpr(policy, family), "dot_general")
    # Eight products in a block (nine with a gate) and the head, each with two gradients; scores are
    # computed twice.
    assert len(dots) == {"gpt2": 28, "llama": 31}[family]
    for dot in dots:
        assert {operand.aval.dtype for operand in dot.invars} == {compute}
        assert dot.params["preferred_element_type"] == np.float32


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    ("policy", "narrow"),
    [("autocast_bf16", "bfloat16"), ("autocast_f16", "float16"), ("O1", "float16")],
)
def test_autocast_multiplies_in_16_bits_and_keeps_the_residual_stream_in_f32(
    policy, narrow, family, gradient_jaxpr, equations, tiny
):
    jaxpr = gradient_jaxpr(policy, family)
    dots = equations(jaxpr, "dot_general")
    assert len(dots) == {"gpt2": 28, "llama": 31}[family]
    assert {operand.aval.dtype.name for dot in dots for operand in dot.invars} == {narrow}
    config = tiny(policy, family)
    stream = (config.batch_size, config.context, config.model.width)
    for scan in equations(jaxpr, "scan"):  # forwards and backwards
        first, last = scan_counts(scan.params)
        carried = [v.aval for v in scan.invars[first : first + last] if v.aval.shape == stream]
        assert [aval.dtype.name for aval in carried] == ["float32"]
    gathers = equations(jaxpr, "gather")
    assert {e.outvars[0].aval.dtype.name for e in gathers if e.outvars[0].aval.ndim > 1} == {
        "float32"
    }
    narrow_sites = {
        path.split("/")[-1]
        for path, site in phase_of(config).sites.items()
        if site.compute.bits == 16
    }
    products = {"query", "key", "value", "scores", "combine", "out", "up", "down", "head"}
    assert narrow_sites == products | ({"gate"} if family == "llama" else set())


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("policy", POLICIES)
def test_params_are_stored_as_the_policy_says_before_and_after_a_step(
    policy, family, tiny, draw_batch
):
    from lmjax.runs.state import initial_state

    config = tiny(policy, family).resolved()
    stored = phase_of(config).sites["embed"].params.dtype
    before = jax.eval_shape(lambda: initial_state(config))
    mesh = sharding.make_mesh(config.mesh, jax.devices()[:1])
    after, _ = jax.eval_shape(train_step(phase_of(config), mesh), before, draw_batch(config))
    for state in (before, after):
        assert {leaf.dtype for leaf in jax.tree.leaves(state.params)} == {stored}
    types = lambda state: jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), state)
    assert types(before) == types(after)


def test_params_of_one_site_may_be_stored_otherwise(tiny, draw_params):
    config = tiny("f32; **/norm: p=bf16; embed: p=f16")
    stored = {p: x.dtype.name for p, x in paths.flatten(draw_params(config)).items()}
    for path, dtype in stored.items():
        expected = "bfloat16" if "norm" in path else "float16" if "embed" in path else "float32"
        assert dtype == expected, path
    from lmjax.model import initial_params

    shapes = jax.eval_shape(
        lambda: initial_params(jax.random.key(0), config.model, phase_of(config).sites)
    )
    assert {p: x.dtype.name for p, x in paths.flatten(shapes).items()} == stored


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("policy", POLICIES)
def test_output_is_the_format_of_the_logits(policy, family, tiny, draw_params, draw_batch):
    config = tiny(policy, family)
    run = functools.partial(apply, config=config.model, sites=phase_of(config).sites)
    logits = jax.eval_shape(run, draw_params(config), draw_batch(config)["inputs"])
    assert logits.dtype == phase_of(config).sites["head"].output.dtype
    only_output = tiny("p=f32,c=f32,o=bf16", family)
    run = functools.partial(apply, config=config.model, sites=phase_of(only_output).sites)
    logits = jax.eval_shape(run, draw_params(only_output), draw_batch(config)["inputs"])
    assert logits.dtype == jnp.bfloat16


@pytest.mark.parametrize("policy", ["mixed_bf16", "pure_f16"])
def test_named_sites_compute_in_f32(policy, formats_of):
    assert formats_of(policy, "exp", ndim=4) == {"float32"}, "softmax"
    assert formats_of(policy, "exp", ndim=3) == {"float32"}, "loss"
    assert formats_of(policy, "log") == {"float32"}, "loss"
    assert formats_of(policy, "rsqrt") == {"float32"}, "norm"
    assert formats_of(policy, "tanh") == {"float32"}, "GELU"
    assert formats_of(policy, "rsqrt", "llama", ndim=4) == {"float32"}, "query and key norm"
    assert formats_of(policy, "logistic", "llama") == {"float32"}, "SiLU"
    assert formats_of(policy, "cos", "llama") == {"float32"}, "rotary angles"


@pytest.mark.parametrize(
    ("rule", "family", "primitive", "ndim"),
    [
        ("**/softmax: c=bf16", "gpt2", "exp", 5),
        ("loss: c=bf16", "gpt2", "log", 2),
        ("**/norm: c=bf16", "gpt2", "rsqrt", None),
        ("**/activation: c=bf16", "gpt2", "tanh", None),
        ("**/activation: c=bf16", "llama", "logistic", None),
        ("**/rope: c=bf16", "llama", "cos", None),
        ("**/query_norm: c=bf16; **/key_norm: c=bf16", "llama", "rsqrt", 4),
    ],
)
def test_named_sites_compute_in_what_a_rule_says(rule, family, primitive, ndim, formats_of):
    assert formats_of(f"mixed_bf16; {rule}", primitive, family, ndim) == {"bfloat16"}


def test_a_rule_for_one_site_leaves_the_others(formats_of):
    policy = "mixed_bf16; **/softmax: c=bf16"
    assert formats_of(policy, "log") == formats_of(policy, "rsqrt") == {"float32"}
    assert formats_of(policy, "exp", ndim=3) == {"float32"}


def test_a_product_may_be_widened_alone(gradient_jaxpr, equations):
    dots = equations(gradient_jaxpr("mixed_bf16; head: c=f32"), "dot_general")
    wide = [dot for dot in dots if dot.invars[0].aval.dtype == np.float32]
    assert len(wide) == 3
    assert all(64 in {n for v in (*d.invars, *d.outvars) for n in v.aval.shape} for d in wide)


def test_an_f32_policy_has_no_narrow_number_anywhere(tiny, draw_state, draw_batch, equations):
    config = tiny("f32", "llama").resolved()
    mesh = sharding.make_mesh(config.mesh, jax.devices()[:1])
    jaxpr = jax.make_jaxpr(train_step(phase_of(config), mesh))(
        draw_state(config), draw_batch(config)
    )
    found = {
        v.aval.dtype.name for e in equations(jaxpr) for v in e.outvars if hasattr(v.aval, "dtype")
    }
    assert "float32" in found
    assert not found & NARROW


def test_the_residual_stream_is_narrow_too(gradient_jaxpr, equations):
    # An embedding without its cast would carry f32 through the whole model. A carry leaves a scan
    # in the shape in which it leaves the body; what is stacked has one axis more.
    carries = lambda policy: {
        after.aval.dtype.name
        for scan in equations(gradient_jaxpr(policy), "scan")
        for inside, after in zip(scan.params["jaxpr"].outvars, scan.outvars, strict=True)
        if inside.aval.shape == after.aval.shape == (4, 16, 16)
    }
    assert carries("mixed_bf16") == {"bfloat16"}
    assert carries("mixed_bf16; **/residual: c=f32") == {"float32"}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("policy", [*POLICIES, "f32; **: c=bf16", "mixed_bf16; blocks/1: c=f32"])
def test_the_loss_traces_under_strict_promotion(policy, family, gradient_jaxpr):
    assert gradient_jaxpr(policy, family).eqns


def forgotten_cast(self: Any, x: jax.Array, site: Any, context: Any) -> jax.Array:
    y = layers.einsum("btk,kn->btn", x, self.kernel[...], site)
    return site.to_output(y if self.bias is None else y + self.bias[...])


def test_an_accidental_upcast_is_an_error(tiny, draw_params, draw_batch, monkeypatch):
    config = tiny("mixed_bf16")
    monkeypatch.setattr(layers.Dense, "__call__", forgotten_cast)
    mesh = sharding.make_mesh(config.mesh, jax.devices()[:1])
    with pytest.raises(Exception, match=r"float32.*bfloat16|bfloat16.*float32"):
        jax.eval_shape(
            make_scaled_loss(phase_of(config), mesh), draw_params(config), draw_batch(config), None,
            jnp.ones((), jnp.float32),
        )  # fmt: skip


def test_the_gradients_carry_the_dtype_of_their_parameters(gradient_jaxpr, tiny, draw_params):
    def dtypes(policy: str) -> Iterator[str]:
        count = len(jax.tree.leaves(draw_params(tiny(policy))))
        return {v.dtype.name for v in gradient_jaxpr(policy).out_avals[:count]}

    assert dtypes("mixed_bf16") == {"float32"}
    assert dtypes("pure_f16") == {"float16"}
