"""Maps an instruction's `op_name` to the site or the part of a step that it belongs to.

Entering a site opens a `jax.named_scope` with its path (`SitePolicy.scope`), and the parts of a
step around the model open scopes of their own. JAX writes these names into the `op_name` of each
compiled instruction, between the names of its transformations:

    jit(step)/jvp()/while/body/closed_call/blocks/0-3/mlp/up/dot_general          forwards
    jit(step)/transpose(jvp())/while/body/closed_call/blocks/0-3/mlp/up/mul       backwards

Knows how JAX writes names, and layouts of sites.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass

from lmjax.precision.sites import Layout


@dataclass(frozen=True)
class Scope:
    """Where an instruction belongs.

    Attributes:
      path: stacked path of a place in the layout, or the name of a part of the step.
      members: which members of a stack share the instruction, in words: `0-3`; empty outside.
      backward: whether it is part of the backward pass.
    """

    path: str
    members: str = ""
    backward: bool = False


def scope_of(op_name: str, layout: Layout, parts: Collection[str]) -> Scope | None:
    """Returns the innermost site or part of a step that an `op_name` names, or None.

    Args:
      op_name: the attribute in HLO metadata.
      layout: the sites of the model.
      parts: names of scopes that are not sites.
    """
    return located(op_name, layout, parts)[0]


def located(
    op_name: str, layout: Layout, parts: Collection[str]
) -> tuple[Scope | None, tuple[str, ...]]:
    """Like `scope_of`, with the words of the name after the scope, the last an operation."""
    backward = "transpose(" in op_name
    # Names of separately compiled functions may look like sites; transformations wrap scopes.
    plain = re.sub(r"\b(p?jit|custom_\w+_call)\([^()]*\)", "", op_name)
    words = [word for word in re.split(r"[/()]", plain) if word]
    for start in range(len(words) - 1, -1, -1):
        if words[start] in parts:
            return Scope(words[start], "", backward), tuple(words[start + 1 :])
        stacked = words[start] == layout.stack.name
        if not stacked and layout.stack.name in words[:start]:
            continue
        first = start + 2 if stacked else start
        for end in range(len(words), first, -1):
            path = "/".join(words[first:end])
            path = layout.stack.path(path) if stacked else path
            if layout.has(path):
                members = words[start + 1] if stacked else ""
                return Scope(path, members, backward), tuple(words[end:])
    return None, tuple(words[-1:])
