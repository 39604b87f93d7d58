"""What a policy comes to at each site of a model: the base, then the rules that reach it."""

from __future__ import annotations

import pytest

from lmjax.precision import sites
from lmjax.precision.grammar import parse_policy
from lmjax.precision.policy import PolicyError

SITES = [
    "embed",
    "positions",
    *(
        f"blocks/{index}/{site}"
        for index in range(3)
        for site in ("residual", "attention/norm", "attention/query", "attention/softmax", "mlp/up")
    ),
    "norm",
    "head",
    "loss",
]


@pytest.mark.parametrize("name", [site.name for site in sites.SITES.values() if site.wide])
def test_wide_sites_compute_in_f32_unless_a_rule_names_them(name: str):
    path = f"blocks/0/attention/{name}"
    compute = lambda text: parse_policy(text).resolve(path).compute.name
    assert compute("mixed_bf16") == "f32"
    assert compute("pure_f16") == "f32"
    assert compute("f64") == "f64"
    assert compute("mixed_bf16; blocks/0: c=bf16") == "f32", "a container does not narrow it"
    assert compute("mixed_bf16; **/attention: c=f16") == "f32"
    assert compute("mixed_bf16; blocks/0: c=f64") == "f64", "but it may widen it"
    assert compute(f"mixed_bf16; **/{name}: c=bf16") == "bf16"
    assert compute("mixed_bf16; blocks/0/**: c=bf16") == "bf16"
    assert compute("f32; **: c=f16") == "f16"


def test_what_a_wide_site_stores_follows_the_policy():
    assert parse_policy("pure_bf16").resolve("blocks/0/attention/norm").params.name == "bf16"


def test_a_container_sets_what_its_sites_follow():
    policy = parse_policy("mixed_bf16; blocks/1: c=f32")
    assert policy.resolve("blocks/1/attention/query").compute.name == "f32"
    assert policy.resolve("blocks/1/attention/query").output.name == "f32"
    assert policy.resolve("blocks/0/attention/query").compute.name == "bf16"


def test_the_last_rule_that_matches_decides():
    last = parse_policy("f32; **/query: c=bf16; blocks/*/attention/query: c=f16")
    assert last.resolve("blocks/2/attention/query").compute.name == "f16"
    swapped = parse_policy("f32; blocks/*/attention/query: c=f16; **/query: c=bf16")
    assert swapped.resolve("blocks/2/attention/query").compute.name == "bf16"
    partial = parse_policy("f32; **/query: c=bf16,p=f16; **/query: p=bf16")
    site = partial.resolve("blocks/2/attention/query")
    assert str(site) == "p=bf16,c=bf16,o=bf16"


def test_output_rules():
    named = parse_policy("f32; **/scores: o=bf16").resolve("blocks/0/attention/scores")
    assert (named.compute.name, named.output.name) == ("f32", "bf16")
    # A container's `o` would change every site inside; as in jmp it is what the container hands on.
    inside = parse_policy("f32; blocks/0: o=bf16,c=f32").resolve("blocks/0/attention/query")
    assert inside.output.name == "f32"
    assert parse_policy("mixed_bf16; head: o=bf16").resolve("head").output.name == "bf16"
    assert parse_policy("mixed_bf16; head: c=f16").resolve("head").output.name == "f32"


def test_negative_indices_count_from_the_last_block():
    policy = parse_policy("mixed_bf16; blocks/-1: c=f32; blocks/-3/**: c=f16")
    resolved = policy.resolve_all(SITES, depth=3)
    compute = [resolved[f"blocks/{i}/attention/query"].compute.name for i in range(3)]
    assert compute == ["f16", "bf16", "f32"]
    with pytest.raises(PolicyError, match="blocks/-4"):
        parse_policy("f32; blocks/-4: c=f16").resolve_all(SITES, depth=3)


def test_a_rule_that_matches_nothing_lists_the_paths():
    text = "f32; **/softmax: c=bf16;  **/sofmax: c=f32"
    with pytest.raises(PolicyError) as caught:
        parse_policy(text).resolve_all(SITES, depth=3)
    message = str(caught.value)
    assert "'**/sofmax' matches no site" in message
    assert "blocks/*/attention/softmax" in message
    assert "head" in message
    assert "blocks/1/" not in message, "block indices are folded"
    assert caught.value.position == text.index("**/sofmax")


def test_resolve_all_resolves_every_site():
    resolved = parse_policy("mixed_f16").resolve_all(SITES, depth=3)
    assert list(resolved) == SITES
    assert resolved["blocks/2/mlp/up"].compute.name == "f16"


@pytest.mark.parametrize("name", ["combine", "head", "scores"])
def test_narrow_operands_are_for_linear_layers_unless_a_rule_names_other_products(name: str):
    path = name if name == "head" else f"blocks/0/attention/{name}"
    narrow = "w=e4m3@tensor,x=mxfp8,g=e5m2@tensor.sr"

    def operands(text: str, site: str = path) -> list[str]:
        rows = parse_policy(text).resolve(site).rows()
        return [rows[key] for key in "wxg"]

    quantized = ["e4m3@tensor", "mxfp8", "e5m2@tensor.sr"]
    linear = "blocks/0/attention/query"
    assert operands(f"mixed_bf16,{narrow}") == ["bf16"] * 3
    assert operands(f"mixed_bf16,{narrow}", linear) == quantized
    assert operands(f"mixed_bf16; blocks/0: {narrow}") == ["bf16"] * 3, "a container passes nothing"
    assert operands(f"mixed_bf16; blocks/0: {narrow}", linear) == quantized
    assert operands(f"mixed_bf16; {path}: {narrow}") == quantized
    assert operands(f"mixed_bf16; **: {narrow}") == quantized
    assert operands(f"mixed_bf16; {path}: {narrow}", linear) == ["bf16"] * 3


def test_accumulators_moments_and_stored_updates_are_inherited_everywhere():
    policy = parse_policy("p=bf16.sr,c=bf16,a=bf16@block8,m=tf32,mu=bf16,nu=int8@block16")
    expected = {"p": "bf16.sr", "a": "bf16@block8", "m": "tf32", "mu": "bf16", "nu": "int8@block16"}
    for path in (*SITES, "blocks/0/attention/scores"):
        rows = policy.resolve(path).rows()
        assert {key: rows[key] for key in expected} == expected, path


def test_keys_and_values_are_kept_as_their_products_say():
    policy = parse_policy(
        "mixed_bf16,kv=int8@block32; **/scores: kv=e4m3@channel; blocks/2: kv=f16"
    )

    def kept(index: int) -> list[str]:
        products = (f"blocks/{index}/attention/{name}" for name in ("scores", "combine"))
        return [policy.resolve(path).rows()["kv"] for path in products]

    assert kept(0) == ["e4m3@channel", "int8@block32"]
    assert kept(2) == ["f16", "f16"]
    default = parse_policy("mixed_bf16").resolve("blocks/0/attention/scores")
    assert default.cache is None
    assert default.rows()["kv"] == "bf16"


def test_wide_sites_are_wide_for_emulated_formats_too():
    site = parse_policy("c=e4m3").resolve("blocks/0/attention/softmax")
    assert (site.compute.name, site.output.name) == ("f32", "f32")
    assert parse_policy("c=e4m3").resolve("blocks/0/mlp/up").compute.name == "e4m3"


def test_each_step_belongs_to_the_last_phase_that_has_started():
    policy = parse_policy("0: f32 | 3: bf16 | 7: f16")
    compute = [policy.at(step).resolve("head").compute.name for step in range(9)]
    assert compute == ["f32"] * 3 + ["bf16"] * 4 + ["f16"] * 2
    assert policy.phases == tuple((start, policy.at(start)) for start in (0, 3, 7))
    assert all(phase.phases == ((0, phase),) for _, phase in policy.phases)


def test_a_policy_without_phases_is_its_own_only_phase():
    policy = parse_policy("mixed_bf16; head: c=f32")
    assert policy.phases == ((0, policy),)
    assert policy.at(10**9) == policy


def test_a_policy_with_phases_does_not_say_what_a_site_is_at_no_step():
    policy = parse_policy("0: f32 | 7: f16")
    with pytest.raises(ValueError, match=r"changes with the step.*at\(step\)"):
        policy.resolve("head")
    with pytest.raises(ValueError, match="changes with the step"):
        policy.resolve_all(SITES)


def test_a_rule_of_a_later_phase_that_matches_nothing_is_pointed_at():
    text = "0: f32; **/softmax: c=bf16 | 7: f32; **/sofmax: c=f32"
    with pytest.raises(PolicyError) as caught:
        parse_policy(text).at(7).resolve_all(SITES, depth=3)
    assert caught.value.position == text.index("**/sofmax")
    assert repr(text) in str(caught.value)
