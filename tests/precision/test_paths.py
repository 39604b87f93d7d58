"""One notation for parameters, sites and masks."""

from __future__ import annotations

import jax.numpy as jnp
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lmjax.precision import paths

component = st.text("abc01_-", min_size=1, max_size=4)
path = st.lists(component, min_size=1, max_size=5).map("/".join)


@pytest.mark.parametrize(
    ("pattern", "path", "expected"),
    [
        ("norm", "norm", True),
        ("norm", "blocks/0/norm", False),
        ("**/norm", "norm", True),
        ("**/norm", "blocks/3/attention/norm", True),
        ("**/norm", "blocks/3/attention/key_norm", False),
        ("blocks/*/norm", "blocks/3/norm", True),
        ("blocks/*/norm", "blocks/3/attention/norm", False),
        ("blocks/**/norm", "blocks/3/attention/norm", True),
        ("blocks/**", "blocks", True),
        ("blocks/**", "blocks/0/mlp", True),
        ("blocks/?", "blocks/7", True),
        ("blocks/?", "blocks/17", False),
        ("blocks/[0-3]/mlp", "blocks/2/mlp", True),
        ("blocks/[0-3]/mlp", "blocks/4/mlp", False),
        ("*", "a/b", False),
        ("**", "a/b", True),
        ("a/**/b/**/c", "a/b/x/b/c", True),
        ("NORM", "norm", False),
    ],
)
def test_matches(pattern: str, path: str, expected: bool):
    assert paths.matches(pattern, path) is expected


@given(path)
def test_a_path_matches_itself_and_double_star(path: str):
    assert paths.matches(path, path)
    assert paths.matches("**", path)
    assert paths.matches("**/" + path.rsplit("/", 1)[-1], path)


@given(path, component)
def test_a_pattern_does_not_reach_below_its_path(path: str, extra: str):
    assert not paths.matches(path, f"{path}/{extra}")
    assert paths.matches(f"{path}/**", f"{path}/{extra}")


def test_matches_any():
    assert paths.matches_any(("**/bias", "**/scale"), "blocks/norm/scale")
    assert not paths.matches_any(("**/bias", "**/scale"), "blocks/out/kernel")
    assert not paths.matches_any((), "a")


def test_ancestors_nearest_first():
    assert paths.ancestors("a/b/c") == ["a/b", "a"]
    assert paths.ancestors("a") == []


def test_flatten_sorts_by_path_string():
    tree = {"b": jnp.ones(2, jnp.float32), "a10": {"x": 1}, "a": {"y": [2, 3]}}
    assert list(paths.flatten(tree)) == ["a/y/0", "a/y/1", "a10/x", "b"]
    assert paths.flatten(tree)["a/y/1"] == 3
