"""What holds for every file of lmjax: how long it is, what is public, what is said once."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import lmjax

ROOT = Path(lmjax.__file__).parent
LONGEST_FILE, LONGEST_FUNCTION = 400, 60


def sources() -> Iterator[tuple[str, str]]:
    """Name and text of every file."""
    for file in sorted(ROOT.rglob("*.py")):
        yield str(file.relative_to(ROOT)), file.read_text("utf-8")


def nodes() -> Iterator[tuple[str, ast.AST]]:
    """Every node of every file."""
    for name, text in sources():
        for node in ast.walk(ast.parse(text)):
            yield name, node


def test_files_and_functions_are_short() -> None:
    files = {name: text.count("\n") for name, text in sources()}
    functions = {
        f"{name}:{node.lineno} {node.name}": node.end_lineno - node.lineno + 1
        for name, node in nodes()
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.end_lineno
    }
    assert {name: lines for name, lines in files.items() if lines > LONGEST_FILE} == {}
    assert {name: lines for name, lines in functions.items() if lines > LONGEST_FUNCTION} == {}


def public(node: ast.AST, name: str = "") -> Iterator[tuple[str, ast.AST]]:
    """Classes, functions and methods that others may call."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.FunctionDef | ast.ClassDef) and not child.name.startswith("_"):
            yield f"{name}{child.name}", child
            if isinstance(child, ast.ClassDef):
                yield from public(child, f"{child.name}.")


def test_what_is_public_has_a_docstring() -> None:
    assert [
        f"{file}: {name}"
        for file, text in sources()
        for name, node in public(ast.parse(text))
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and ast.get_docstring(node) is None
    ] == []


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
