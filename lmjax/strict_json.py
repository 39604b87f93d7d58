"""Strict JSON, as specified, for every file that lmjax reads or writes.

Python's own `json` reads and writes `NaN` and `Infinity`, which are not JSON; only this file uses
it. Infinities and NaNs are written as strings that `float` parses. Reading rejects text that other
parsers would reject, and duplicate names in an object.

Below all other rooms; depends on Python only.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn


def dumps(
    value: Any,
    *,
    indent: int | None = None,
    sort_keys: bool = False,
    ensure_ascii: bool = True,
) -> str:
    """A value as strict JSON, one line unless `indent` is given."""
    return json.dumps(
        _finite_or_text(value),
        indent=indent,
        sort_keys=sort_keys,
        ensure_ascii=ensure_ascii,
        allow_nan=False,
    )


def loads(text: str | bytes) -> Any:
    """Parses a JSON text.

    Raises:
      ValueError: it is not JSON, or an object has duplicate names.
    """
    return json.loads(text, parse_constant=_refused, object_pairs_hook=_unique)


def read(path: Path) -> Any:
    """The value in a JSON file.

    Raises:
      OSError: it cannot be read.
      ValueError: it does not hold JSON.
    """
    return loads(path.read_text(encoding="utf-8"))


def read_object(path: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
      OSError: it cannot be read.
      ValueError: it does not hold JSON, or no object.
    """
    value = read(path)
    if not isinstance(value, dict):
        raise ValueError("it holds no object")
    return value


def _finite_or_text(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _finite_or_text(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [_finite_or_text(part) for part in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(float(value))
    return value


def _refused(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is not JSON")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = sorted({name for name in names if names.count(name) > 1})
        raise ValueError(f"an object has {', '.join(map(repr, twice))} twice")
    return found
