"""Slash-separated paths and the patterns that name sets of them.

Parameters, sites of a policy and optimizer masks are all addressed by the same patterns, so that
users learn one notation. Knows only strings and JAX's key paths.

A pattern is a path whose components may hold shell wildcards (`*`, `?`, `[...]`); the component
`**` stands for any number of components, including none: `**/norm` matches `norm` and
`blocks/3/attention/norm`.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax


def matches(pattern: str, path: str) -> bool:
    """Whether `pattern` matches the whole `path`."""
    return _matches(pattern.split("/"), path.split("/"))


def matches_any(patterns: Sequence[str], path: str) -> bool:
    """Whether at least one of the patterns matches the whole path."""
    return any(matches(pattern, path) for pattern in patterns)


def _matches(pattern: Sequence[str], path: Sequence[str]) -> bool:
    if not pattern:
        return not path
    first, rest = pattern[0], pattern[1:]
    if first == "**":
        return any(_matches(rest, path[skipped:]) for skipped in range(len(path) + 1))
    return bool(path) and fnmatch.fnmatchcase(path[0], first) and _matches(rest, path[1:])


def ancestors(path: str) -> list[str]:
    """The paths above `path`, nearest first: `a/b/c` gives `a/b`, `a`."""
    parts = path.split("/")
    return ["/".join(parts[:length]) for length in range(len(parts) - 1, 0, -1)]


def flatten(tree: Any, is_leaf: Callable[[Any], bool] | None = None) -> dict[str, Any]:
    """Returns the leaves of a pytree by path, in path order; `is_leaf` may mark nodes as leaves.

    >>> flatten({"b": 2, "a": {"x": 1}})
    {'a/x': 1, 'b': 2}
    """
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree, is_leaf)
    by_path = {path_string(keys): leaf for keys, leaf in leaves}
    return {path: by_path[path] for path in sorted(by_path)}


def unflatten(flat: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the nested dict whose leaves have these paths.

    >>> unflatten({"a/x": 1, "b": 2})
    {'a': {'x': 1}, 'b': 2}
    """
    nested: dict[str, Any] = {}
    for path, leaf in flat.items():
        *parents, last = path.split("/")
        level = nested
        for parent in parents:
            level = level.setdefault(parent, {})
        level[last] = leaf
    return nested


def path_string(keys: Sequence[Any]) -> str:
    """A JAX key path as a slash-separated string."""
    return jax.tree_util.keystr(tuple(keys), simple=True, separator="/")
