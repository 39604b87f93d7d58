"""Objects below a URL of a store such as S3 or Google Cloud Storage: the only file that knows
fsspec.

A write is atomic, replaces any object of the same name and is visible to everyone afterwards;
nothing can be renamed. S3 and Google Cloud Storage guarantee this. The library handles credentials,
regions and endpoints, using the same variables and files as the store's own tools (for S3 also
`AWS_ENDPOINT_URL`).

Knows nothing about the objects' content.
"""

from __future__ import annotations

import contextlib
import glob
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path, PurePosixPath

import fsspec

from lmjax.errors import InputError

URL = re.compile(r"([a-z][a-z0-9+.-]+)://(.*)", re.DOTALL)
COLLAPSED = re.compile(r"([a-z][a-z0-9+.-]+):/[^/].*", re.DOTALL)
EXTRAS = {"s3": "s3", "s3a": "s3", "gs": "gs", "gcs": "gs"}
"""The extra of lmjax that installs the library of a scheme."""


class StoreError(RuntimeError):
    """The store cannot be reached or refuses; the message quotes it."""


def as_url(place: str | Path) -> str | None:
    """The URL of a place, without a trailing slash; None for a local path.

    Raises:
      InputError: it looks like a URL but does not name a place in a store.
    """
    text = str(place)
    if isinstance(place, Path):
        refuse_collapsed(place)
    match = URL.fullmatch(text)
    if match is None:
        return None
    scheme, path = match[1], match[2].strip("/")
    if scheme in ("file", "local"):
        raise InputError(f"{text} is on this machine; write it without {scheme}://")
    if not path:
        raise InputError(f"{text} names no place; write {scheme}://BUCKET/RUN")
    if "::" in path:
        raise InputError(f"{text} would be read as a chain of stores; choose a name without ::")
    return f"{scheme}://{path}"


def refuse_collapsed(path: Path) -> None:
    """Raises `InputError` for a path that was a URL before two slashes became one."""
    if COLLAPSED.fullmatch(str(path)):
        raise InputError(
            f"{path} looks like a URL; only a run can be in an object store, and in Python its URL "
            "must be a string"
        )


class Store:
    """The objects below a URL; an object's name is the part after the URL and a slash.

    Every method raises `StoreError` if the store fails.
    """

    def __init__(self, url: str):
        """Finds the library for a URL; does not contact the store.

        Raises:
          InputError: the library is not installed, or none is known.
        """
        self.url = url
        scheme = url.partition(":")[0]
        try:
            fsspec.get_filesystem_class(scheme)
        except ValueError as error:
            raise InputError(
                f"nothing is known about {scheme}://; use s3://BUCKET/RUN, gs://BUCKET/RUN or a "
                "directory"
            ) from error
        except ImportError as error:
            extra = EXTRAS.get(scheme)
            advice = f"pip install 'lmjax[{extra}]'" if extra else str(error)
            raise InputError(f"{scheme}:// needs a library that is missing: {advice}") from error
        with self._explained():
            self._files, self._root = fsspec.url_to_fs(url)

    def names(self) -> list[str]:
        """All names, sorted."""
        with self._explained():
            self._files.invalidate_cache()
            found = self._files.find(self._root)
        start = self._files._strip_protocol(self._root).rstrip("/") + "/"
        names = sorted(path[len(start) :] for path in found if path.startswith(start))
        if any(".." in PurePosixPath(name).parts for name in names):
            raise StoreError(f"{self.url} has names with .. in them")
        return [name for name in names if name and not name.endswith("/")]

    def read(self, name: str) -> bytes | None:
        """The content of an object; None if it does not exist."""
        with self._explained():
            try:
                return self._files.cat_file(self._path(name))
            except FileNotFoundError:
                return None

    def write(self, name: str, content: bytes) -> None:
        """Writes an object, replacing any of the same name."""
        with self._explained():
            self._files.pipe_file(self._path(name), content)

    def create(self, name: str, content: bytes) -> bool:
        """Writes an object unless it exists; returns whether it did. Of several writers one
        succeeds, if the store has conditional writes.
        """
        try:
            with self._explained():
                self._files.pipe_file(self._path(name), content, mode="create")
        except StoreError:
            if self.read(name) is None:
                raise
            return False
        return True

    def upload(self, files: Mapping[str, Path]) -> None:
        """Uploads files as objects, concurrently and in any order."""
        with self._explained():
            self._files.put([str(path) for path in files.values()], self._paths(files))

    def download(self, files: Mapping[str, Path]) -> None:
        """Downloads objects to files, concurrently and in any order.

        Raises:
          FileNotFoundError: an object no longer exists.
        """
        with self._explained(FileNotFoundError):
            if files:
                self._files.get(self._paths(files), [str(path) for path in files.values()])

    def remove(self, names: Iterable[str]) -> None:
        """Removes objects, in any order; missing ones are ignored."""
        paths = self._paths(names)
        with self._explained(), contextlib.suppress(FileNotFoundError):
            # `rm`, which removes many at a time, treats each path as a pattern.
            literal = [path for path in paths if glob.escape(path) == path]
            if literal:
                self._files.rm(literal)
            for path in set(paths).difference(literal):
                self._files.rm_file(path)

    def _path(self, name: str) -> str:
        return f"{self._root}/{name}"

    def _paths(self, names: Iterable[str]) -> list[str]:
        return [self._path(name) for name in names]

    @contextlib.contextmanager
    def _explained(self, *passed: type[Exception]) -> Iterator[None]:
        """Converts any library error to `StoreError`, as each library has errors of its own."""
        try:
            yield
        except passed:
            raise
        except Exception as error:
            words = " ".join(str(error).split()) or type(error).__name__
            raise StoreError(f"{self.url}: {words}") from error
