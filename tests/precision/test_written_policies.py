"""Any policy text: it survives its canonical string, or is refused inside the text."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lmjax.precision.grammar import PRESETS, parse_policy
from lmjax.precision.keys import KEYS
from lmjax.precision.policy import NATIVE, PolicyError

PATHS = ["embed", "blocks/0/attention/query", "blocks/2/attention/softmax", "head", "loss"]


def one_of(*texts: str) -> st.SearchStrategy[str]:
    return st.sampled_from(texts)


stored_format = one_of(*NATIVE, "tf32", "e4m3", "e5m2", "e3m2", "e5m7", "e8m3", "e4m3fnuz", "e4m0")
element = stored_format | one_of("int8", "int4", "e2m1", "e2m3")
size = st.integers(1, 300).map("@block{}".format)
groups = one_of("@tensor", "@channel") | size
mx = one_of("mxfp8", "mxfp8_e5m2", "mxfp6", "mxfp6_e2m3", "mxfp4", "mxint8")
shared = mx | (
    st.builds("{}.rceil".format, mx)
    | st.just("nvfp4")
    | st.builds("{}{}".format, element, groups)
    | st.builds("{}{}.e8m0{}".format, element, groups, one_of("", ".rceil"))
    | st.builds("{}{}.e4m3".format, element, groups)
    | st.builds("{}{}.e4m3@tensor".format, element, size)
    | st.builds("int8{}.affine".format, groups)
)
operand = st.builds("{}{}".format, element | shared, one_of("", ".sr")) | st.builds(
    "{}{}".format, shared, one_of(".rht", ".rht2.sr", ".sr.rht1024")
)
cache = element | st.builds(
    "{}{}{}".format, element, one_of("@channel") | size, one_of("", ".e8m0")
)
moment = element | st.builds("{}{}".format, element, one_of("@tensor") | size)
VALUE = {
    "p": st.builds("{}{}".format, stored_format, one_of("", ".sr", ".kahan")),
    "c": stored_format,
    "o": stored_format,
    "w": operand,
    "x": operand,
    "g": operand,
    "wb": operand,
    "xb": operand,
    "a": st.builds("{}{}".format, stored_format, st.just("") | size),
    "m": one_of("highest", "tf32", "default"),
    "r": stored_format,
    "mu": moment,
    "nu": moment,
    "kv": cache | one_of("mxfp8", "mxint8", "int4@channel.affine"),
}
"""Every way to write a value of each key."""

assignments = st.lists(one_of(*KEYS), min_size=1, unique=True).flatmap(
    lambda keys: st.tuples(
        *(st.builds("{}={}".format, one_of(key, KEYS[key].long), VALUE[key]) for key in keys)
    ).map(",".join)
)
pattern = one_of("head", "**/softmax", "blocks/-1", "blocks/*/mlp/**", "blocks/[01]/**", "**")
rule = st.builds("{}: {}".format, pattern, assignments)
name = one_of(*NATIVE, *PRESETS)
phase_text = st.builds(
    lambda base, rules: "; ".join([base, *rules]),
    assignments | name | st.builds("{},{}".format, name, assignments),
    st.lists(rule, max_size=3),
)
starts = st.sets(st.integers(1, 10**9), max_size=2).map(lambda later: [0, *sorted(later)])
phased_text = starts.flatmap(
    lambda starts: st.tuples(
        *(st.builds("{}{}:{}".format, one_of("", " ", "0"), st.just(n), phase_text) for n in starts)
    ).map("|".join)
)
policy_text = phase_text | phased_text


def test_every_key_is_generated():
    assert set(VALUE) == set(KEYS)


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_survive_their_canonical_string(preset: str):
    policy = parse_policy(preset)
    assert parse_policy(str(policy)) == policy
    assert str(policy) == PRESETS[preset]


@given(policy_text)
def test_the_canonical_string_parses_to_the_same_policy(text: str):
    policy = parse_policy(text)
    again = parse_policy(str(policy))
    assert again == policy
    assert str(again) == str(policy)
    assert [start for start, _ in again.phases] == [start for start, _ in policy.phases]
    for (_, ours), (_, theirs) in zip(again.phases, policy.phases, strict=True):
        for path in PATHS:
            assert ours.resolve(path, 3) == theirs.resolve(path, 3)


fragment = one_of(
    *KEYS, "params", "first_moment", "=", ",", ";", ":", "/", "**", "*", "-1", "[", "]", "?", ".",
    "@", "f", "bf", "e", "m", "int", "16", "32", "8", "0", "e4m3", "bf16", "mxfp8", "nvfp4", "sr",
    "kahan", "tensor", "channel", "block", "affine", "delayed", "tf32", " ", "\t", "\n", "half",
    "mixed_bf16", "fp8", "norm", "rht", ".rht32", "rceil", "²", "٣", "|", "0:", "7:", "| 100: f32",
)  # fmt: skip


def refusal(text: str) -> PolicyError | None:
    try:
        policy = parse_policy(text)
    except PolicyError as error:
        return error
    for _, phase in policy.phases:
        for path in PATHS:
            phase.resolve(path, 3)
    return None


@st.composite
def damaged(draw: st.DrawFn) -> str:
    """A policy with a few characters replaced by a fragment."""
    text = draw(policy_text)
    start = draw(st.integers(0, len(text)))
    return text[:start] + draw(fragment) + text[start + draw(st.integers(0, 4)) :]


@given(st.lists(fragment, max_size=12).map("".join) | st.text(max_size=12) | damaged())
def test_any_text_parses_or_is_a_policy_error_inside_the_text(text: str):
    error = refusal(text)
    if error is not None:
        assert error.position is not None
        assert 0 <= error.position <= len(text)
