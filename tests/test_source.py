"""What holds for every file of lmjax."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import lmjax

ROOT = Path(lmjax.__file__).parent


def nodes() -> Iterator[tuple[str, ast.AST]]:
    """Every node of every file."""
    for file in sorted(ROOT.rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text("utf-8"))):
            yield str(file.relative_to(ROOT)), node


def test_the_order_of_sums_is_read_in_one_place() -> None:
    """Everything else asks `Config.reductions`."""
    read = [
        name
        for name, node in nodes()
        if isinstance(node, ast.Attribute) and node.attr == "deterministic_reductions"
    ]
    assert read == ["runs/config.py"]


def test_the_name_of_a_class_has_one_meaning() -> None:
    files: dict[str, set[str]] = {}
    for name, node in nodes():
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
            files.setdefault(node.name, set()).add(name)
    assert {name: found for name, found in files.items() if len(found) > 1} == {}
