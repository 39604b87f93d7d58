"""A policy string means what jmp means by it, and its rules say the rest."""

from __future__ import annotations

import itertools

import jax
import jax.numpy as jnp
import jmp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lmjax.precision.policy import PRESETS, WIDE_SITES, PolicyError, parse_policy

JMP_NAMES = [
    "half",
    "full",
    "f64",
    "float64",
    "f32",
    "float32",
    "bf16",
    "bfloat16",
    "f16",
    "float16",
]
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


def dtypes(policy) -> tuple[np.dtype, ...]:
    """Stored, computed and handed on, of a `SitePolicy` or a `jmp.Policy`."""
    if isinstance(policy, jmp.Policy):
        return tuple(map(np.dtype, (policy.param_dtype, policy.compute_dtype, policy.output_dtype)))
    return policy.params.dtype, policy.compute.dtype, policy.output.dtype


def jmp_strings() -> list[str]:
    """Every combination of keys, each with every dtype name in every position."""
    texts = list(JMP_NAMES)
    for keys in (("p", "c", "o"), ("params", "compute", "output")):
        for size in (1, 2, 3):
            for chosen in itertools.permutations(keys, size):
                for shift in range(len(JMP_NAMES)):
                    names = [JMP_NAMES[(shift + 3 * i) % len(JMP_NAMES)] for i in range(size)]
                    texts.append(",".join(f"{k}={n}" for k, n in zip(chosen, names, strict=True)))
    return texts


def test_every_string_of_jmp_means_what_jmp_means():
    texts = jmp_strings()
    assert len(texts) > 300
    for text in texts:
        theirs, ours = jmp.get_policy(text), parse_policy(text)
        assert dtypes(ours.resolve("head")) == dtypes(theirs), text
        # Inside the model a site hands on its compute format: jmp's output is the model's.
        params, compute, _ = dtypes(theirs)
        assert dtypes(ours.resolve("embed")) == (params, compute, compute), text


def test_half_follows_the_backend_as_in_jmp(monkeypatch: pytest.MonkeyPatch):
    assert parse_policy("half").resolve("head").compute.name == "f16"
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    assert parse_policy("half").resolve("head").compute.name == "bf16"


def test_strings_that_jmp_refuses_are_refused():
    for text in ("", "f33", "p", "p=", "q=f32", "p=f32,", "p=f32;c=f16", "p=f32=f16", "=f32"):
        with pytest.raises(PolicyError):
            parse_policy(text)
    with pytest.raises(PolicyError, match="given twice"):  # the exception that the docs state
        parse_policy("p=f32,params=bf16")


def test_a_site_is_castable_by_jmp():
    site = parse_policy("p=f32,c=bf16,o=f16").resolve("head")
    tree = {"x": jnp.ones(2, jnp.float32), "n": jnp.arange(2, dtype=jnp.int32)}
    assert {k: v.dtype.name for k, v in site.to_compute(tree).items()} == {
        "x": "bfloat16",
        "n": "int32",
    }
    assert site.to_output(tree)["x"].dtype == jnp.float16
    assert str(site.jmp) == "p=full,c=bf16,o=f16"


@pytest.mark.parametrize(
    ("preset", "expected"),
    [
        ("mixed_bf16", ("float32", "bfloat16", "float32")),
        ("mixed_f16", ("float32", "float16", "float32")),
        ("pure_bf16", ("bfloat16",) * 3),
        ("pure_f16", ("float16",) * 3),
        ("mixed_bfloat16", ("float32", "bfloat16", "bfloat16")),
        ("mixed_float16", ("float32", "float16", "float16")),
        ("f32", ("float32",) * 3),
    ],
)
def test_presets(preset: str, expected: tuple[str, ...]):
    site = parse_policy(preset).resolve("head")
    assert tuple(dtype.name for dtype in dtypes(site)) == expected


def test_every_preset_is_tested_or_an_alias():
    assert set(PRESETS) == {
        "mixed_bf16", "mixed_f16", "pure_bf16", "pure_f16", "mixed_bfloat16", "mixed_float16",
    }  # fmt: skip


@pytest.mark.parametrize("name", sorted(WIDE_SITES))
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
    assert dtypes(partial.resolve("blocks/2/attention/query")) == dtypes(
        jmp.get_policy("p=bf16,c=bf16,o=bf16")
    )


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


@pytest.mark.parametrize(
    ("text", "offender"),
    [
        ("c=f33", "f33"),
        ("p=f32, c=bf61", "bf61"),
        ("p=f32,q=f16", "q"),
        ("  mixed_bf17", "mixed_bf17"),
        ("p=f32,c", None),
        ("f32; **/softmax", "**/softmax"),
        ("f32; **/softmax: c=nope", "nope"),
        ("f32; **/softmax: k=f16", "k=f16"),
        ("f32; : c=f16", ": c"),
        ("f32; a b: c=f16", " b"),
        ("f32; /norm: c=f16", "/norm"),
        ("f32; a//b: c=f16", "//b"),
        ("f32; norm/: c=f16", "/:"),
        ("p=f32,c=bf16,p=f16", "p=f16"),
        ("p=f32,c=e4m3", "e4m3"),
        ("f32;", None),
    ],
)
def test_the_position_points_at_the_offender(text: str, offender: str | None):
    with pytest.raises(PolicyError) as caught:
        parse_policy(text)
    expected = len(text) if offender is None else text.index(offender)
    assert caught.value.position == expected, str(caught.value)
    assert f"at character {expected}" in str(caught.value)
    assert repr(text) in str(caught.value)


def test_a_misspelt_format_gets_a_suggestion():
    with pytest.raises(PolicyError, match="did you mean 'bfloat16'"):
        parse_policy("c=bfloat61")


native = st.sampled_from(["f64", "f32", "bf16", "f16"])
setting = st.dictionaries(st.sampled_from("pco"), native, min_size=1).map(
    lambda values: ",".join(f"{key}={value}" for key, value in values.items())
)
pattern = st.sampled_from(["head", "**/softmax", "blocks/-1", "blocks/*/mlp/**", "blocks/[01]/**"])
rule = st.builds("{}: {}".format, pattern, setting)
policy_text = st.builds(
    lambda base, rules: "; ".join([base, *rules]),
    setting | st.sampled_from(sorted(PRESETS)) | native,
    st.lists(rule, max_size=3),
)


@given(policy_text)
def test_the_canonical_string_parses_to_the_same_policy(text: str):
    policy = parse_policy(text)
    again = parse_policy(str(policy))
    assert again == policy
    assert str(again) == str(policy)
    for path in SITES:
        assert again.resolve(path, 3) == policy.resolve(path, 3)


fragment = st.sampled_from(
    ["p", "c", "o", "params", "=", ",", ";", ":", "/", "**", "*", "-1", "[", "]", "?", "f", "bf",
     "e", "m", "int", "16", "32", "8", "0", " ", "\t", "\n", "half", "mixed_bf16", "norm", "²"]
)  # fmt: skip


def refusal(text: str) -> PolicyError | None:
    try:
        policy = parse_policy(text)
    except PolicyError as error:
        return error
    for path in SITES:
        policy.resolve(path, 3)
    return None


@settings(max_examples=400)
@given(st.lists(fragment, max_size=12).map("".join) | st.text(max_size=12))
def test_any_text_parses_or_is_a_policy_error_inside_the_text(text: str):
    error = refusal(text)
    if error is not None:
        assert error.position is not None
        assert 0 <= error.position <= len(text)
