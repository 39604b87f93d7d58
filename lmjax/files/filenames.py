"""Names of files as people write them, and as libraries can bear them.

A file may be called almost anything. Many libraries take a path as more than a name: as a pattern
(`[1]`, `*`), as a URL (`gs:/`), as text that can be encoded. Whoever hands a path to such a library
hands it `plain(path)`. Imports the standard library only.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import hashlib
import os
import re
import shutil
import tempfile
from pathlib import Path

# Letters of any script, digits and punctuation that no library was found to give a meaning.
_PLAIN = re.compile(r"(?!/(?:gs|s3|az|hf)/)[\w/.,+=@ -]+")


def expanded(path: str | os.PathLike[str]) -> Path:
    """The path that was typed, with `~` and `~user` replaced by a home directory.

    Call it once, on what a person wrote: a directory may itself be called `~`.
    """
    return Path(os.path.expanduser(path))


def printable(text: object) -> str:
    r"""The text on one line: what is no visible character or space becomes an escape.

    `printable("a\nb")` is `a\nb`, four characters, so that a message about a file stays one line
    and cannot move the cursor or change colours.
    """
    return "".join(
        character if character.isprintable() else character.encode("unicode_escape").decode()
        for character in str(text)
    )


def no_math(text: str) -> str:
    r"""The text for Matplotlib, which reads what is between dollar signs as a formula: `\$`.

    Its own `parse_math=False` is forgotten where it wraps lines.
    """
    return text.replace("$", r"\$")


def is_plain(path: str | os.PathLike[str]) -> bool:
    """Whether no library takes an absolute path for a pattern, a URL or undecodable bytes."""
    return _PLAIN.fullmatch(os.fspath(path)) is not None


def plain(path: Path) -> Path:
    """A path to the same place that is plain: the path itself, or a symbolic link to it.

    Links are in a private temporary directory which is removed when the process ends. The place
    need not exist yet.

    Raises:
      OSError: no temporary directory can be written whose own name is plain.
    """
    absolute = Path(os.path.abspath(path))
    if is_plain(absolute):
        return absolute
    link = _links(os.getpid()) / hashlib.sha256(os.fsencode(absolute)).hexdigest()[:32]
    # Made again where a cleaner of temporary files has removed it during a long run.
    link.parent.mkdir(mode=0o700, exist_ok=True)
    with contextlib.suppress(FileExistsError):
        link.symlink_to(absolute)
    return link


@functools.cache
def _links(process: int) -> Path:
    """The directory of a process's links; a forked process gets its own."""
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
