"""The manifest of a folder: the files it must have, with a digest of each.

`manifest.sha256` has the format of `sha256sum`: `sha256sum -c manifest.sha256` checks a folder
without lmjax. It is written last, so a folder without a manifest is incomplete.

Knows files and digests, not their content.
"""

from __future__ import annotations

import hashlib
import os
import re
from pathlib import Path

NAME = "manifest.sha256"
LINE = re.compile(r"([0-9a-f]{64})  (\S.*)")


class Damaged(Exception):
    """A folder does not match its manifest."""


def seal(folder: Path) -> None:
    """Writes the manifest of a folder; returns when the whole folder is flushed to disk."""
    lines = [f"{_digest(path, sync=True)}  {name}\n" for name, path in files(folder).items()]
    (folder / NAME).write_text("".join(lines), encoding="utf-8")
    _digest(folder / NAME, sync=True)
    for directory in (*(path for path in folder.rglob("*") if path.is_dir()), folder):
        sync_directory(directory)


def check(folder: Path) -> None:
    """Verifies that every file of a folder is unchanged since the folder was sealed.

    An extra file counts as damage, as it could mean a truncated manifest; hidden files, which file
    systems and file managers leave behind, are ignored.

    Raises:
      Damaged: a file differs; the message says which and how.
    """
    expected = _read(folder / NAME)
    present = files(folder)
    for name in sorted(expected.keys() | present.keys()):
        if name not in present:
            raise Damaged(f"{name} is missing")
        if name not in expected:
            raise Damaged(f"{name} is not in {NAME}")
        try:
            digest = _digest(present[name])
        except OSError as error:
            raise Damaged(f"{name} cannot be read ({error.strerror})") from error
        if digest != expected[name]:
            raise Damaged(f"{name} does not have the SHA-256 that {NAME} says")


def _read(path: Path) -> dict[str, str]:
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise Damaged(f"{NAME} is missing") from error
    except (OSError, UnicodeDecodeError) as error:
        raise Damaged(f"{NAME} cannot be read ({error})") from error
    matches = [LINE.fullmatch(line) for line in text.split("\n")[:-1]]
    if not matches or None in matches or not text.endswith("\n"):
        raise Damaged(f"{NAME} is not a list of digests")
    return {match[2]: match[1] for match in matches if match}


def files(folder: Path) -> dict[str, Path]:
    """The files below a folder by name, except the manifest and hidden files."""
    found = {
        path.relative_to(folder).as_posix(): path
        for path in sorted(folder.rglob("*"))
        if path.is_file() and not path.name.startswith(".")
    }
    found.pop(NAME, None)
    return found


def _digest(path: Path, *, sync: bool = False) -> str:
    with path.open("rb") as file:
        if sync:
            os.fsync(file.fileno())
        return hashlib.file_digest(file, "sha256").hexdigest()


def sync_directory(folder: Path) -> None:
    """Flushes a folder's own entries, not only the files they name, to disk."""
    if os.name != "posix":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
