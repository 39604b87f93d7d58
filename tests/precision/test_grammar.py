"""What can be written: jmp's strings and what they mean to jmp, and everything beyond them."""

from __future__ import annotations

import itertools

import jax
import jax.numpy as jnp
import jmp
import numpy as np
import pytest

from lmjax.precision.grammar import PRESETS, parse_policy
from lmjax.precision.keys import KEYS, OPERANDS
from lmjax.precision.policy import PolicyError

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
PATHS = ["embed", "blocks/0/attention/query", "blocks/2/attention/softmax", "head", "loss"]


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


def test_steps_of_phases_may_begin_with_zeros_but_not_be_longer_than_an_int_reads():
    assert [n for n, _ in parse_policy("00:f32 | 01000000000: bf16").phases] == [0, 10**9]
    for step in ("1" * 11, "0" * 200 + "1"):
        with pytest.raises(PolicyError, match="expected a phase"):
            parse_policy(f"0: f32 | {step}: bf16")


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


NARROW = {
    "fp8": ("e4m3@tensor", "e4m3@tensor", "e5m2@tensor"),
    "mxfp8": ("mxfp8.rceil", "mxfp8.rceil", "mxfp8.rceil"),
    "nvfp4": ("nvfp4", "nvfp4", "nvfp4.sr"),
    "int8": ("int8@channel", "int8@channel", "int8@channel"),
}


@pytest.mark.parametrize("preset", NARROW)
def test_presets_of_narrow_operands_are_mixed_bf16_elsewhere(preset: str):
    rows = parse_policy(preset).resolve("blocks/0/attention/query").rows()
    assert (rows["w"], rows["x"], rows["g"]) == NARROW[preset]
    assert parse_policy(preset).resolve("head") == parse_policy("mixed_bf16").resolve("head")


@pytest.mark.parametrize(
    ("apex", "ours"),
    [("O0", "f32"), ("O1", "autocast_f16"), ("O2", "mixed_f16"), ("O3", "pure_f16")],
)
def test_presets_of_apex(apex: str, ours: str):
    assert parse_policy(apex) == parse_policy(ours)


@pytest.mark.parametrize("narrow", ["bf16", "f16"])
def test_rules_of_a_preset_come_before_those_after_it(narrow: str):
    rules = f"**/attention: c={narrow}; **/mlp: c={narrow}; head: c={narrow}"
    policy = parse_policy(f"autocast_{narrow},mu=bf16; blocks/0: c=f32; head: c=f32")
    assert policy == parse_policy(f"f32,mu=bf16; {rules}; blocks/0: c=f32; head: c=f32")
    computed = lambda path: policy.resolve(path).compute.name
    assert computed("blocks/0/mlp/up") == computed("head") == "f32"
    assert computed("blocks/1/mlp/up") == narrow
    phases = parse_policy(f"0: autocast_{narrow} | 9: f32")
    assert phases.at(3) == parse_policy(f"autocast_{narrow}")
    assert phases.at(9) == parse_policy("f32")


def test_a_rule_after_a_preset_with_rules_is_complained_about_where_it_stands():
    sites = ["embed", "blocks/0/attention/query", "blocks/0/mlp/up", "head"]
    parse_policy("autocast_bf16").resolve_all(sites)
    with pytest.raises(PolicyError, match="'nothing/here' matches no site") as failure:
        parse_policy("autocast_bf16; nothing/here: c=f32").resolve_all(sites)
    assert failure.value.position == 15


def test_every_preset_is_tested():
    assert set(PRESETS) == {
        "mixed_bf16", "mixed_f16", "pure_bf16", "pure_f16", "mixed_bfloat16", "mixed_float16",
        "autocast_bf16", "autocast_f16", *NARROW, "O0", "O1", "O2", "O3",
    }  # fmt: skip


VALUES = {
    "p": "bf16.kahan",
    "c": "f16",
    "o": "e5m7",
    "w": "mxfp8.sr",
    "x": "int8@channel.affine",
    "g": "e5m2@block16.e8m0.sr",
    "wb": "mxfp4.rceil.rht.sr",
    "xb": "int4@tensor.rht64",
    "a": "bf16@block16",
    "m": "tf32",
    "r": "bf16",
    "mu": "int8@block16",
    "nu": "bf16",
    "kv": "int4@block8.affine",
}
"""A value of every key, unlike what any other key of the table or a default would give."""


def test_every_key_has_a_value_in_the_table():
    assert set(VALUES) == set(KEYS)


@pytest.mark.parametrize("key", VALUES)
def test_a_key_and_its_long_name_set_the_same_thing_and_nothing_else(key: str):
    default = parse_policy("p=f32,c=bf16").resolve("head").rows()
    follows = {"o": "f16"} if key == "c" else {}  # the output follows compute, as in jmp
    follows |= {operand: "f16" for operand in (*OPERANDS, "kv") if key == "c"}
    follows |= {f"{key}b": VALUES[key]} if key in ("w", "x") else {}
    for name in (key, KEYS[key].long):
        written = {"p": "p=f32", "c": "c=bf16"} | {key: f"{name}={VALUES[key]}"}
        base = parse_policy(",".join(written.values()))
        rule = parse_policy(f"p=f32,c=bf16; head: {name}={VALUES[key]}")
        inherited = key not in OPERANDS  # the head's operands stay wide unless it is named
        expected = default | follows | {key: VALUES[key]}
        assert rule.resolve("head").rows() == expected | ({"o": "bf16"} if key == "c" else {})
        assert base.resolve("head").rows() == (expected if inherited else default)
        assert f"{key}={VALUES[key]}" in str(base), "canonical strings use the short name"


def test_a_preset_or_a_format_may_be_followed_by_changes():
    changed = parse_policy("mixed_bf16,a=bf16@block16")
    assert changed == parse_policy("p=f32,c=bf16,o=f32,a=bf16@block16")
    assert parse_policy("mixed_bf16 , c = f16") == parse_policy("mixed_f16")
    assert parse_policy("f32,mu=bf16; head: c=bf16") == parse_policy(
        "p=f32,c=f32,o=f32,mu=bf16; head: c=bf16"
    )


@pytest.mark.parametrize(
    ("key", "text", "canonical"),
    [
        ("p", "bfloat16.sr", "bf16.sr"),
        ("p", "bf16.nearest", "bf16"),
        ("p", "e8m7", "bf16"),
        ("c", "float8_e4m3fn", "e4m3"),
        ("w", "float8_e4m3fn@tensor", "e4m3@tensor"),
        ("w", "mxfp8_e4m3.sr", "mxfp8.sr"),
        ("x", "e4m3@block32.e8m0", "mxfp8"),
        ("g", "e2m1@block16.e4m3@tensor", "nvfp4"),
        ("g", "mxfp4_e2m1.sr.rht016", "mxfp4.rht.sr"),
        ("wb", "e2m1@block32.rceil.e8m0.rht8", "mxfp4.rceil.rht8"),
        ("xb", "float8_e4m3fn", "e4m3"),
        ("a", "float32", "f32"),
        ("mu", "bfloat16", "bf16"),
        ("kv", "float8_e4m3fn@channel", "e4m3@channel"),
    ],
)
def test_names_of_the_same_thing_are_the_same_policy(key: str, text: str, canonical: str):
    assert str(parse_policy(f"f32,{key}={text}")) == str(parse_policy(f"f32,{key}={canonical}"))
    assert parse_policy(f"f32; head: {key}={text}").resolve("head").rows()[key] == canonical


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
        ("p=f32,c=e8m0", "e8m0"),
        ("p=f32,c=int8", "int8"),
        ("p=bf16.st", "bf16.st"),
        ("p=bf16.", "bf16."),
        ("p=.sr", ".sr"),
        ("c=bf16.sr", "bf16.sr"),
        ("f32,w=e8m0@tensor", "e8m0@tensor"),
        ("f32,w=e4m3@row", "e4m3@row"),
        ("f32,x=e4m3@block", "e4m3@block"),
        ("f32,x=e4m3@block0", "e4m3@block0"),
        ("f32,g=e5m2@tensor.kahan", "e5m2@tensor.kahan"),
        ("f32,g=e5m2.e8m0", "e5m2.e8m0"),
        ("f32,g=mxfp4.rht12", "mxfp4.rht12"),
        ("f32,g=mxfp4.rht0", "mxfp4.rht0"),
        ("f32,g=mxfp4.rht1", "mxfp4.rht1"),
        ("f32,g=mxfp4.rht2048", "mxfp4.rht2048"),
        ("f32,g=mxfp4.rht.rht8", "mxfp4.rht.rht8"),
        ("f32,g=mxfp4.sr.rht.sr", "mxfp4.sr.rht.sr"),
        ("f32,g=mxfp4.rhtx", "mxfp4.rhtx"),
        ("f32; **/up: x=bf16.rht", "bf16.rht"),
        ("f32,x=e4m3@tensor.delayed.rht", "e4m3@tensor.delayed.rht"),
        ("f32,xb=e4m3@tensor.delayed", "e4m3@tensor.delayed"),
        ("f32,wb=e8m0", "e8m0"),
        ("f32,x=nvfp4.rceil", "nvfp4.rceil"),
        ("f32,x=e4m3@tensor.rceil", "e4m3@tensor.rceil"),
        ("p=bf16.rht", "bf16.rht"),
        ("f32,kv=mxfp8.rht", "mxfp8.rht"),
        ("f32,a=bf16@block0", "bf16@block0"),
        ("f32,a=bf16@tensor", "bf16@tensor"),
        ("f32,a=int32", "int32"),
        ("f32,m=tf16", "tf16"),
        ("f32,mu=int8@channel", "int8@channel"),
        ("f32,nu=int8@tensor.affine", "int8@tensor.affine"),
        ("f32,nu=bf16.sr", "bf16.sr"),
        ("f32,r=e5m2@tensor", "e5m2@tensor"),
        ("f32,kv=e4m3@tensor", "e4m3@tensor"),
        ("f32,kv=nvfp4", "nvfp4"),
        ("f32,kv=e4m3@tensor.delayed", "e4m3@tensor.delayed"),
        ("f32,kv=int8@channel.sr", "int8@channel.sr"),
        ("f32; **/scores: kv=e8m0", "e8m0"),
        ("mixed_bf16,q=f16", "q"),
        ("mixed_bf16,fp8", "fp8"),
        ("mixed_bf16, a=bf17", "bf17"),
        ("mixed_bf16,mu=bf16,first_moment=f16", "first_moment"),
        ("f32; head: w=e4m3@tensr", "e4m3@tensr"),
        ("f32;", None),
        ("f32 | 1000: f16", "f32"),
        ("0: f32 | f16", "f16"),
        ("0: f32 | **/softmax: c=f16", "**/softmax"),
        ("0: f32 |", None),
        ("0: f32 || 9: f16", "| 9"),
        ("0 f32", "0 f32"),
        ("0", "0"),
        ("0:", None),
        ("5: f32 | 9: f16", "5"),
        ("-1: f32", "-1"),
        ("0: f32 | 1e3: f16", "1e3"),
        ("0: f32 | -9: f16", "-9"),
        ("0: f32 | ٣: f16", "٣"),
        ("0: f32 | 99999999999: f16", "99999999999"),
        ("0: f32 | 7: f16 | 7: bf16", "7: b"),
        ("0: f32 | 7: f16 |  6: bf16", "6: b"),
        ("0: f32 | 00: bf16", "00"),
        ("0: f32 | 7: c=f17", "f17"),
        ("0: f32 | 7: f16; **/norm: c=bf61", "bf61"),
        ("0: f32; a b: c=f16 | 7: f32", " b"),
    ],
)
def test_the_position_points_at_the_offender(text: str, offender: str | None):
    with pytest.raises(PolicyError) as caught:
        parse_policy(text)
    expected = len(text) if offender is None else text.index(offender)
    assert caught.value.position == expected, str(caught.value)
    assert f"at character {expected}" in str(caught.value)
    assert repr(text) in str(caught.value)


def test_a_policy_may_change_with_the_step():
    policy = parse_policy(" 0:mixed_bf16; **/norm: c=bf16|\n010 : f32,a=bf16 | 1000: f16")
    assert str(policy) == (
        "0: p=f32,c=bf16,o=f32; **/norm: c=bf16 | 10: p=f32,c=f32,o=f32,a=bf16 | "
        "1000: p=f16,c=f16,o=f16"
    )
    assert policy == parse_policy(str(policy))
    assert policy != parse_policy(str(policy).replace("1000", "1001"))
    assert policy != parse_policy("mixed_bf16; **/norm: c=bf16")
    assert policy.at(9) == parse_policy("mixed_bf16; **/norm: c=bf16")
    assert policy.at(10) == policy.at(999) == parse_policy("f32,a=bf16"), "the rule stays behind"


def test_a_single_phase_is_a_policy_without_phases():
    assert parse_policy("0: mixed_bf16; head: c=f32") == parse_policy("mixed_bf16; head: c=f32")
    assert str(parse_policy("0: f32")) == "p=f32,c=f32,o=f32"


def test_a_cache_of_one_factor_is_refused_with_the_reason():
    with pytest.raises(PolicyError, match=r"one position at a time.*@channel or FORMAT@blockN"):
        parse_policy("f32,kv=int8@tensor")


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ("e4m3.rht", "share a factor; write FORMAT@tensor.rht"),
        ("e4m3@tensor.delayed.rht", "before it is rotated; drop .delayed or .rht"),
        ("mxfp4.rht12", "blocks of 12; it must be a power of two from 2 to 1024"),
        ("mxfp4.sr.sr", "once at most"),
        ("nvfp4.rceil", "add .e8m0, or leave it out"),
    ],
)
def test_an_option_that_makes_no_sense_is_refused_with_the_reason(value: str, words: str):
    with pytest.raises(PolicyError, match=words):
        parse_policy(f"f32,xb={value}" if "delayed" not in value else f"f32,x={value}")


def test_backward_operands_follow_the_forward_ones_unless_they_are_set():
    policy = parse_policy("f32,w=mxfp4,x=mxfp8; **/up: wb=bf16; blocks/0/**: w=e4m3@tensor")
    read = lambda path: [policy.resolve(path).rows()[key] for key in OPERANDS]
    assert read("blocks/1/mlp/down") == ["mxfp4", "mxfp8", "f32", "mxfp4", "mxfp8"]
    assert read("blocks/1/mlp/up") == ["mxfp4", "mxfp8", "f32", "bf16", "mxfp8"]
    assert read("blocks/0/mlp/up") == ["e4m3@tensor", "mxfp8", "f32", "bf16", "mxfp8"]
    assert read("head") == ["f32"] * 5, "it inherits neither"


@pytest.mark.parametrize("key", OPERANDS)
def test_a_site_says_whether_its_products_need_a_random_key(key: str):
    random = lambda value: parse_policy(f"f32,{key}={value}").resolve("blocks/0/mlp/up").stochastic
    assert [random(f"mxfp4{option}") for option in ("", ".sr", ".rht")] == [False, True, True]


def test_a_misspelt_format_gets_a_suggestion():
    with pytest.raises(PolicyError, match="did you mean 'bfloat16'"):
        parse_policy("c=bfloat61")
