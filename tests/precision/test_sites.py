"""Sites are declared once, and what is not declared is refused."""

from __future__ import annotations

import jax.numpy as jnp
import pytest

from lmjax.model import layout
from lmjax.precision.grammar import parse_policy
from lmjax.precision.matmul import einsum
from lmjax.precision.sites import SITES, Kind, Layout, Place, Stack, site_at
from lmjax.runs.resolved import phase_of


def test_a_site_that_is_not_declared_is_refused():
    with pytest.raises(ValueError, match="blocks/0/mlp/pool is not a declared site"):
        site_at("blocks/0/mlp/pool")
    with pytest.raises(ValueError, match="not a declared site"):
        parse_policy("mixed_bf16").resolve("w")


@pytest.mark.parametrize("name", [s.name for s in SITES.values() if not s.is_product])
def test_a_product_at_a_site_that_is_not_declared_one_is_refused(name: str):
    site = parse_policy("fp8").resolve(name)
    with pytest.raises(ValueError, match=rf"einsum 'ab,bc->ac' at {name}.*declare it a product"):
        einsum("ab,bc->ac", jnp.ones((2, 2)), jnp.ones((2, 2)), site)


def test_the_kind_of_a_product_says_how_its_second_operand_is_quantized():
    policy = parse_policy("f32; **: w=e4m3,x=e5m2")
    weights, activations = policy.resolve("up"), policy.resolve("scores")
    assert (str(weights.second), str(weights.backward_second)) == ("e4m3", "e4m3")
    assert (str(activations.second), str(activations.backward_second)) == ("e5m2", "e5m2")


def test_a_wide_or_unquantized_site_says_why():
    assert {s.name for s in SITES.values() if s.unquantized} == {"scores", "combine", "head"}
    assert all(s.is_product for s in SITES.values() if s.unquantized)
    assert not any(s.is_product for s in SITES.values() if s.wide)
    assert [s.name for s in SITES.values() if s.logits] == ["head"]


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_a_layout_agrees_with_the_parameters_and_the_paths_of_policies(family: str, tiny):
    config = tiny(family=family)
    places = layout(config.model)
    assert list(phase_of(config).sites) == list(places.paths)
    for parameter in phase_of(config).param_sites:
        place = places.place_of_parameter(parameter)
        assert place.site.kind is not Kind.ACTIVATION_PRODUCT
        assert (place.stack is not None) == parameter.startswith("blocks/")
        assert len(place.paths) == (config.model.layers if place.stack else 1)
    assert all(
        places.input_format(p, phase_of(config).sites) is None
        for p in places.paths
        if is_product(p)
    )


def is_product(path: str) -> bool:
    return site_at(path).is_product


def test_an_input_arrives_in_the_format_that_the_site_before_hands_on(tiny):
    policy = (
        "f32; **/residual: c=f16,o=bf16; blocks/1/**/scores: o=f16; head: o=e5m2; embed: p=bf16"
    )
    config = tiny(policy, "llama")
    places = layout(config.model)
    arrives = lambda path: places.input_format(path, phase_of(config).sites).name
    assert arrives("embed") == "bf16"
    assert arrives("blocks/0/attention/norm") == arrives("blocks/0/mlp/norm") == "f16"
    assert arrives("norm") == "bf16", "what the last block hands on"
    assert (arrives("blocks/0/attention/softmax"), arrives("blocks/1/attention/softmax")) == (
        "f32",
        "f16",
    )
    assert arrives("blocks/0/attention/rope") == "f32"
    assert arrives("loss") == "e5m2"


def test_paths_lead_into_a_stack_and_out_of_it():
    stack = Stack("blocks", 2)
    assert stack.members("blocks/mlp/up") == ("blocks/0/mlp/up", "blocks/1/mlp/up")
    assert stack.member("0-1", "blocks/mlp/up") == "blocks/0-1/mlp/up"
    assert (stack.member(1), stack.within("blocks/mlp/up")) == ("blocks/1", "mlp/up")
    assert stack.holds("blocks/norm")
    assert not stack.holds("norm")
    assert not stack.holds("blocks2/x")


def test_equal_members_beside_each_other_are_one():
    stack = Stack("b", 4)
    inside = (Place(f"b/{name}", SITES[name], stack) for name in ("up", "out"))
    first, last = (Place(name, SITES[name]) for name in ("embed", "head"))
    places = Layout((first, *inside, last), stack)
    found = dict.fromkeys(places.paths, "x") | {"b/1/up": "y"}
    assert list(places.merged(found).items()) == [
        ("embed", "x"),
        ("b/0/up", "x"),
        ("b/0-3/out", "x"),
        ("b/1/up", "y"),
        ("b/2-3/up", "x"),
        ("head", "x"),
    ]
