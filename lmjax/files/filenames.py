"""File names as users type them, and as libraries accept them.

Many libraries read a path as more than a name: as a pattern (`[1]`, `*`), a URL (`gs:/`), or
encodable text. Pass `plain(path)` to such a library. Imports the standard library only.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import hashlib
import os
import re
import shutil
import sys
import tempfile
from pathlib import Path

# Letters of any script, digits, and punctuation without special meaning in any library we found.
_PLAIN = re.compile(r"(?!/(?:gs|s3|az|hf)/)[\w/.,+=@ -]+")


def expanded(path: str | os.PathLike[str]) -> Path:
    """The path that was typed, with `~` and `~user` expanded.

    Call it once, on user input: a directory may itself be named `~`.
    """
    return Path(os.path.expanduser(path))


def user_cache() -> Path | None:
    """The platform's folder for caches (on Linux: XDG Base Directory Specification).

    None: this user has no home directory.
    """
    if sys.platform == "win32":
        chosen = os.environ.get("LOCALAPPDATA") or "~/AppData/Local"
    elif sys.platform == "darwin":
        chosen = "~/Library/Caches"
    else:
        chosen = os.environ.get("XDG_CACHE_HOME", "")
        if not os.path.isabs(chosen):  # the specification says to ignore it
            chosen = "~/.cache"
    found = expanded(chosen)
    return found / "lmjax" if found.is_absolute() else None


def printable(text: object) -> str:
    r"""The text on one line, with everything but visible characters and spaces escaped.

    `printable("a\nb")` is `a\nb`, four characters, so a message about a file stays on one line and
    cannot move the cursor or change colours.
    """
    return "".join(
        character if character.isprintable() else character.encode("unicode_escape").decode()
        for character in str(text)
    )


def no_math(text: str) -> str:
    r"""The text with dollar signs escaped (`\$`), which Matplotlib reads as math delimiters.

    Matplotlib loses its own `parse_math=False` when it wraps lines.
    """
    return text.replace("$", r"\$")


def is_plain(path: str | os.PathLike[str]) -> bool:
    """Whether no library reads an absolute path as a pattern, a URL or undecodable bytes."""
    return _PLAIN.fullmatch(os.fspath(path)) is not None


def plain(path: Path) -> Path:
    """A plain path to the same place: the path itself, or a symbolic link to it.

    Links live in a private temporary directory that is removed at exit. The target may be missing
    yet.

    Raises:
      OSError: no writable temporary directory has a plain name.
    """
    absolute = Path(os.path.abspath(path))
    if is_plain(absolute):
        return absolute
    link = _links(os.getpid()) / hashlib.sha256(os.fsencode(absolute)).hexdigest()[:32]
    # Recreated if a cleaner of temporary files has removed it during a long run.
    link.parent.mkdir(mode=0o700, exist_ok=True)
    with contextlib.suppress(FileExistsError):
        link.symlink_to(absolute)
    return link


@functools.cache
def _links(process: int) -> Path:
    """The directory of the process's links; a forked process gets its own."""
    for parent in (tempfile.gettempdir(), "/tmp", "/var/tmp"):
        if not is_plain(parent):
            continue
        try:
            folder = Path(tempfile.mkdtemp(prefix="lmjax-", dir=parent))
        except OSError:
            continue
        atexit.register(_remove, folder, process)
        return folder
    raise OSError("no temporary directory can be written; set TMPDIR to one")


def _remove(folder: Path, process: int) -> None:
    if os.getpid() == process:
        shutil.rmtree(folder, ignore_errors=True)
