"""One table of several: what was found of the same program for each of its targets, side by side.

A program is traced for each kind of device by itself, as its products and its attention are written
for it. What was traced for all is said once, and otherwise target by target.

Knows what one target's table holds.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from lmjax.inspection.inspection import Inspection
from lmjax.inspection.rows import TRACED, AuditRow, traced_for

Key = tuple[str, Any, str]


def side_by_side(found: Iterable[Inspection]) -> tuple[Inspection, ...]:
    """Inspections of the same name, of one target each, become one with all of their targets."""
    by_name: dict[str, list[Inspection]] = {}
    for one in found:
        by_name.setdefault(one.name, []).append(one)
    return tuple(_beside(name, same) for name, same in by_name.items())


def _beside(name: str, found: Sequence[Inspection]) -> Inspection:
    if len(found) == 1:
        return found[0]
    by_target = {one.targets[0]: {_key(row): row for row in one.rows} for one in found}
    rows = []
    for key in _order(found):
        own = {target: rows[key] for target, rows in by_target.items() if key in rows}
        rows.append(_joined(key, own, everywhere=len(own) == len(by_target)))
    shares = {target: share for one in found for target, share in one.shares.items()}
    return Inspection(name, rows, shares, tuple(by_target))


def _order(found: Sequence[Inspection]) -> list[Key]:
    """The rows of all; one that the first has not stands where it does in its own table."""
    order: list[Key] = []
    for one in found:
        place = 0
        for row in one.rows:
            if _key(row) not in order:
                order.insert(place, _key(row))
            place = order.index(_key(row)) + 1
    return order


def _key(row: AuditRow) -> Key:
    return row.site, row.direction, row.tensor


def _joined(key: Key, own: Mapping[str, AuditRow], *, everywhere: bool) -> AuditRow:
    compiled = {target: text for row in own.values() for target, text in row.compiled.items()}
    asked, traced = (
        _by_target({target: getattr(row, what) for target, row in own.items()})
        for what in ("asked", "traced")
    )
    joined = AuditRow(*key, asked, traced, compiled)
    for target, row in own.items():
        for finding in row.findings:
            shared = everywhere and all(finding in other.findings for other in own.values())
            column = traced_for(target) if finding.column == TRACED and not shared else None
            joined.note(finding.kind, finding.text, column or finding.column, finding.verdict)
    return joined


def _by_target(texts: Mapping[str, str]) -> str:
    """A text that is the same for all targets, or one for each."""
    targets: dict[str, list[str]] = {}
    for target, text in texts.items():
        if text:
            targets.setdefault(text, []).append(target)
    if len(targets) < 2:
        return next(iter(targets), "")
    return "; ".join(f"{', '.join(names)}: {text}" for text, names in targets.items())
