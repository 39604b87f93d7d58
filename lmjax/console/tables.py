"""Tables for people, at any width of a terminal and in files and pipes.

A table that runs out of room loses nothing. The key, which is what a reader types next, comes first
and stays on one line. Settings that do not vary are stated once, below the table.
Where the columns do not fit side by side, long text is wrapped in the last of them, and the columns
that still have no room are printed below each row with their titles. In files and pipes, nothing is
wrapped.

Knows how to write lines to a terminal (rich), and nothing about what tables contain.
"""

from __future__ import annotations

import functools
import sys
import textwrap
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from rich.cells import cell_len
from rich.console import Console
from rich.text import Text

from lmjax.files.filenames import printable

Role = Literal["key", "setting", "value", "number", "text"]

GAP, INDENT, HANGING = "  ", "    ", "  "
LEAST_TEXT = 24
"""Cells of the terminal; text is not wrapped into a narrower column."""


@dataclass(frozen=True)
class Column:
    """A column of a table.

    Attributes:
      title: what its cells are.
      role: `key`: the name of a row, always the first column, never cut or wrapped. `setting`: said
        once below the table if it is the same in all rows, or in all rows the same as another
        setting. `value`: a few characters. `number`: the same, aligned on the right. `text`:
        sentences, which may be wrapped; these columns come last.
    """

    title: str
    role: Role = "value"


def print_table(
    columns: Sequence[Column], rows: Iterable[Sequence[str]], *, each: str = "row"
) -> None:
    """Prints a table to standard output, as wide as the terminal if it is one.

    Args:
      columns: the key first.
      rows: the text of their cells. What is not printable in it is shown as an escape.
      each: what a row is about, for the sentence about settings that are the same in every row.
    """
    console = Console(highlight=False, emoji=False)
    lines = table_lines(columns, rows, each=each, width=terminal_width())
    for number, line in enumerate(lines):
        console.print(Text(line, style="bold" if number == 0 else ""), soft_wrap=True)


def print_sentences(lines: Iterable[str]) -> None:
    """Prints lines of prose, wrapped between words if standard output is a terminal."""
    width = terminal_width()
    filled = functools.partial(
        textwrap.fill, subsequent_indent=HANGING, break_long_words=False, break_on_hyphens=False
    )
    for line in lines:
        print(filled(line, width) if width else line)


def terminal_width() -> int | None:
    """Cells of a line of standard output; None in a file or a pipe, where nothing is wrapped."""
    return Console().width if sys.stdout.isatty() else None


def table_lines(
    columns: Sequence[Column],
    rows: Iterable[Sequence[str]],
    *,
    each: str = "row",
    width: int | None = None,
) -> list[str]:
    """The lines of a table, the header first.

    Args:
      columns, rows, each: as for `print_table`.
      width: of the terminal in cells; None for no limit. Only a key longer than the width makes
        a line exceed it.

    Returns:
      The placement of columns with the fewest lines; among equals, the one with the most columns
      side by side.

    Raises:
      ValueError: a key that is not the first column, or text before another column.
    """
    roles = [column.role for column in columns]
    texts = roles.count("text")
    if roles.index("key") or roles.count("key") > 1 or "text" in roles[: len(roles) - texts]:
        raise ValueError(f"columns are a key, others and then text; they are {', '.join(roles)}")
    titles = [printable(column.title) for column in columns]
    cells = [[printable(cell) for cell in row] for row in rows]
    kept, sentence = _folded(titles, roles, cells, each)
    table = _Table(
        [titles[index] for index in kept],
        [roles[index] for index in kept],
        [[row[index] for index in kept] for row in cells],
    )
    placed = (table.lines(count, width) for count in range(len(kept), 0, -1))
    lines = min((found for found in placed if found), key=len)
    if sentence:
        lines += _wrapped(sentence, width, HANGING)
    return lines


def _folded(
    titles: Sequence[str], roles: Sequence[Role], cells: Sequence[Sequence[str]], each: str
) -> tuple[list[int], str]:
    """Which columns to show, and a sentence about the settings that need no column."""
    kept: list[int] = []
    same: list[str] = []
    alike: dict[str, list[str]] = {}
    shown: dict[tuple[str, ...], str] = {}
    for index, (title, role) in enumerate(zip(titles, roles, strict=True)):
        values = tuple(row[index] for row in cells)
        if role != "setting" or len(values) < 2:
            kept.append(index)
        elif len(set(values)) == 1:
            same.append(f"{title} {values[0] or 'none'}")
        elif values in shown:
            alike.setdefault(shown[values], []).append(title)
        else:
            shown[values] = title
            kept.append(index)
    parts = [", ".join(same)] if same else []
    parts += [f"{_listed(others)} the same as {title}" for title, others in alike.items()]
    return kept, f"in every {each}: {'; '.join(parts)}" if parts else ""


def _listed(names: Sequence[str]) -> str:
    return " and ".join(filter(None, (", ".join(names[:-1]), names[-1])))


@dataclass(frozen=True)
class _Table:
    titles: Sequence[str]
    roles: Sequence[Role]
    rows: Sequence[Sequence[str]]

    def lines(self, count: int, width: int | None) -> list[str]:
        """The table with its first columns side by side and the others below each row.

        Returns:
          An empty list if `count` columns do not fit.
        """
        table = (self.titles, *self.rows)
        widths = [max(cell_len(row[index]) for row in table) for index in range(count)]
        if width is not None and count > 1:
            room = width - sum(widths[:-1]) - len(GAP) * (count - 1)
            if room < widths[-1]:
                least = max(LEAST_TEXT, cell_len(self.titles[count - 1]))
                if self.roles[count - 1] != "text" or room < least:
                    return []
                widths[-1] = room
        found = list(self._beside(self.titles, widths))
        for row in self.rows:
            found += self._beside(row, widths)
            found += self._below(row, count, width)
        return found

    def _beside(self, row: Sequence[str], widths: Sequence[int]) -> Iterator[str]:
        """The first cells of a row; the last one may span several lines."""
        *ahead, last = row[: len(widths)]
        # A key alone is not wrapped: its column is as wide as it is.
        first, *more = _wrapped(last, widths[-1]) or [""]
        padded = [
            _padded(cell, size, role)
            for cell, size, role in zip((*ahead, first), widths, self.roles, strict=False)
        ]
        yield GAP.join(padded).rstrip()
        start = sum(widths[:-1]) + len(GAP) * len(ahead)
        yield from (" " * start + line for line in more)

    def _below(self, row: Sequence[str], count: int, width: int | None) -> list[str]:
        """The other cells with their titles, as many per line as fit; each text on its own line."""
        room = None if width is None else width - len(INDENT)
        found: list[str] = []
        open_line = False
        for title, role, cell in list(zip(self.titles, self.roles, row, strict=True))[count:]:
            if not cell:
                continue
            pair = f"{title}: {cell}" if title else cell
            joined = f"{found[-1]}{GAP}{pair}" if open_line else pair
            if open_line and role != "text" and (room is None or cell_len(joined) <= room):
                found[-1] = joined
            else:
                found += _wrapped(pair, room, HANGING)
            open_line = role != "text"
        return [INDENT + line for line in found]


def _padded(cell: str, width: int, role: Role) -> str:
    space = " " * (width - cell_len(cell))
    return space + cell if role == "number" else cell + space


def _wrapped(text: str, width: int | None, hanging: str = "") -> list[str]:
    """The text in lines of at most `width` cells; all but the first are indented."""
    if width is None or cell_len(text) <= width:
        return [text]
    lines = [""]
    for word in text.split():
        ahead = lines[-1] and f"{lines[-1]} "
        if ahead.strip() and cell_len(ahead + word) <= width:
            lines[-1] = ahead + word
            continue
        if ahead.strip():
            lines.append("")
        for piece in _pieces(word, max(2, width - len(hanging))):
            if lines[-1]:
                lines.append("")
            lines[-1] = hanging * (len(lines) > 1) + piece
    return lines


def _pieces(word: str, width: int) -> Iterator[str]:
    """A word split at the width, never between a character and its combining marks."""
    piece = ""
    for character in word:
        if piece and cell_len(character) and cell_len(piece + character) > width:
            yield piece
            piece = ""
        piece += character
    yield piece
