"""Run directories in an object store: a local copy, and the code that mirrors it to the store.

A run in `s3://bucket/run` trains in a folder below the cache directory, and the rest of lmjax sees
only that folder. The store's content is the run:

    config.json, metrics.jsonl, ...    the files of the run directory, config.json first
    checkpoints/500/...                a checkpoint; its manifest.sha256 is written last of all
    owner.json                         who trains there; see lease.py

A store cannot rename, so a checkpoint exists only once it has a manifest, which is written after
everything it names and removed before any of it. A checkpoint is pending until it is in the store,
as it is until it is on disk: the next checkpoint waits for it, steps do not. The store's older
checkpoints are removed afterwards.

When a run starts, the store is authoritative. The local copy is used only if it has the store's
newest checkpoint, so its content equals the store's or continues it (after a process was killed
before it could write to the store). Otherwise it is replaced.

Knows a run directory's files, manifests, stores and leases, not the files' content.
"""

from __future__ import annotations

import contextlib
import shutil
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import jax

from lmjax.data import DataConfig
from lmjax.errors import CheckpointError, InputError, StorageFailed, TrainingFailed
from lmjax.files import manifest
from lmjax.files.filenames import expanded
from lmjax.files.locks import holder, lock
from lmjax.runs.store import lease as leases
from lmjax.runs.store.copies import CONFIG, SEALED, RunCopy, folder_of, seal_of, stamp, step_of
from lmjax.runs.store.lease import Lease
from lmjax.runs.store.object_store import Store, StoreError, as_url

SECONDS_BETWEEN_PUSHES = 60.0
"""Interval of uploading the files beside the checkpoints, between checkpoints."""

LOOKS = 5
"""How often a reader retries when checkpoints vanish while it reads them."""


class Staged(NamedTuple):
    """Where a run is trained.

    Attributes:
      workdir: the local run directory.
      mirror: makes the store hold exactly these checkpoints once they are complete locally; raises
        `StorageFailed`.
    """

    workdir: Path
    mirror: Callable[[Sequence[int]], None]


@contextlib.contextmanager
def staged(workdir: str | Path, cache: Path, note: Callable[[str], None]) -> Iterator[Staged]:
    """A run directory to train in, which may be in an object store: `s3://BUCKET/RUN`.

    Args:
      workdir: a local directory, used as it is, or a URL.
      cache: the folder of local copies.
      note: shows a line to the user.

    Raises:
      InputError: the store cannot be used or holds something other than a run, or another process
        is training there. Nothing was written.
      StorageFailed: at the end, not everything could be written to the store.
    """
    url = as_url(workdir)
    if url is None:
        yield Staged(local_path(workdir), lambda steps: None)
        return
    if jax.process_count() > 1:
        raise InputError(
            f"{url} cannot be the run directory of {jax.process_count()} processes, which share "
            "files; mount the bucket (gcsfuse, mountpoint-s3) or choose a shared file system, and "
            "give its path as --workdir"
        )
    folder = _made(url, cache, "train")
    workdir = folder / url.rpartition("/")[2]
    with _locked(folder, url), _speaking_of(url, workdir):
        with _unusable_is_bad_input(url):
            store = Store(url)
            _refuse_foreign(store)
            mine = Lease(store, folder / "claim", note)
        mirror = Mirror(RunCopy(store, workdir), mine, note)
        with mirror.kept_alive():
            with _unusable_is_bad_input(url):
                mirror.pull()
            note(f"{url} is copied to {workdir}")
            yield Staged(workdir, mirror.hold)


def local_path(workdir: str | Path) -> Path:
    """The local directory that was named; in a string, as typed, `~` is a home directory."""
    return workdir if isinstance(workdir, Path) else expanded(workdir)


class Mirror:
    """Mirrors the run directory in which this process trains to a store."""

    def __init__(self, copy: RunCopy, lease: Lease, note: Callable[[str], None]):
        self._copy, self._store, self._lease, self._note = copy, copy.store, lease, note
        self._held: dict[int, bytes] = {}
        self._pushed: dict[str, tuple[int, int]] = {}
        self._pushed_at = time.monotonic()
        self._pushing = threading.Lock()
        self._ended = threading.Event()

    def pull(self) -> None:
        """Makes the run directory equal to the store, unless it continues the store's run."""
        names = self._store.names()
        sealed = self._copy.seals(names)
        if self._copy.has_newest(sealed):
            self._held = {
                step: seal for step, seal in sealed.items() if seal == self._copy.seal(step)
            }
            return
        if self._copy.workdir.exists():
            self._note(f"replacing {self._copy.workdir} with the content of {self._store.url}")
            shutil.rmtree(self._copy.workdir)
        if CONFIG not in names:
            return
        # Download the newest checkpoint last: a copy that has it has everything.
        self._copy.pull_files(names)
        for step in sorted(sealed):
            self._copy.pull_checkpoint(names, step)
            if self._copy.is_intact(step):
                self._held[step] = sealed[step]
        self._pushed = {name: stamp(path) for name, path in self._copy.files().items()}

    def hold(self, steps: Sequence[int]) -> None:
        """Makes the store hold exactly these checkpoints, which are complete locally.

        Raises:
          StorageFailed: the store fails, or another process has taken over. The store keeps what it
            held before.
        """
        try:
            self._lease.confirm()
            self._push_files()
            for step in steps:
                if self._held.get(step) != self._copy.seal(step):
                    self._push(step)
            if steps:
                names = self._store.names()
                self._remove(name for name in names if step_of(name) not in (None, *steps))
        except (StoreError, OSError) as error:
            raise StorageFailed(self._what_is_left(error, steps)) from error

    def _what_is_left(self, error: Exception, steps: Sequence[int]) -> str:
        newest = max(self._held, default=None)
        there = "no checkpoint" if newest is None else f"the checkpoint of step {newest}"
        here = f"that of step {max(steps)}" if steps else "none"
        return (
            f"{error}; complete is {there} there, and {here} on this machine. Once that is mended, "
            "the same command resumes from there"
        )

    def _push(self, step: int) -> None:
        self._held.pop(step, None)
        self._remove(name for name in self._store.names() if step_of(name) == step)
        seal = self._copy.seal(step)
        assert seal is not None
        files = manifest.files(self._copy.checkpoint(step))
        self._store.upload({f"checkpoints/{step}/{name}": path for name, path in files.items()})
        self._lease.confirm()
        self._store.write(seal_of(step), seal)
        self._held[step] = seal

    def _remove(self, parts: Iterable[str]) -> None:
        """Removes parts of checkpoints, manifests first."""
        names = list(parts)
        self._store.remove(name for name in names if SEALED.fullmatch(name))
        self._store.remove(name for name in names if not SEALED.fullmatch(name))

    def _push_files(self) -> None:
        """Uploads changed files other than checkpoints."""
        with self._pushing:
            self._pushed_at = time.monotonic()
            for name, path in self._copy.files().items():
                with contextlib.suppress(FileNotFoundError):  # being replaced right now
                    now = stamp(path)
                    if self._pushed.get(name) != now:
                        self._store.write(name, path.read_bytes())
                        self._pushed[name] = now

    @contextlib.contextmanager
    def kept_alive(self) -> Iterator[None]:
        """A block that keeps the lease renewed; at its end the store has everything."""
        beats = threading.Thread(target=self._beat, daemon=True)
        beats.start()
        try:
            try:
                yield
            except TrainingFailed:
                with contextlib.suppress(StoreError, OSError):
                    self._push_files()
                raise
            self.hold(self._copy.steps())
        except Exception:
            with contextlib.suppress(StoreError):
                self._release(beats)
            raise
        else:
            self._release(beats)
        finally:
            # Nothing else after KeyboardInterrupt: a user who does not wait for a checkpoint does
            # not wait for a store.
            self._ended.set()

    def _release(self, beats: threading.Thread) -> None:
        self._ended.set()
        beats.join()
        self._lease.release()

    def _beat(self) -> None:
        """Renews the lease and uploads rows of metrics.

        Failures are retried, because the store may recover before a checkpoint needs it.
        """
        warned = False
        while not self._ended.wait(leases.BEAT_SECONDS):
            try:
                self._lease.beat()
                if time.monotonic() - self._pushed_at > SECONDS_BETWEEN_PUSHES:
                    self._push_files()
                warned = False
            except (StoreError, StorageFailed, OSError) as error:
                if not warned:
                    self._note(f"warning: {error}")
                warned = True


@contextlib.contextmanager
def fetched(workdir: str | Path, *, checkpoint: bool = True) -> Iterator[Path]:
    """A run directory to read, which may be in an object store; writes nothing there.

    Args:
      workdir: a local directory, used as it is, or a URL.
      checkpoint: whether the newest intact checkpoint is needed too.

    Yields:
      A local directory that nothing else changes during the block.

    Raises:
      InputError: the store cannot be read, or holds no run.
    """
    url = as_url(workdir)
    if url is None:
        yield local_path(workdir)
        return
    folder = _made(url, DataConfig().cache_path, "read")
    directory = folder / url.rpartition("/")[2]
    with lock(folder / "lock"), _speaking_of(url, directory):
        with _unusable_is_bad_input(url):
            _fetch(RunCopy(Store(url), directory), checkpoint=checkpoint)
        yield directory


def _fetch(copy: RunCopy, *, checkpoint: bool) -> None:
    for _ in range(LOOKS):
        with contextlib.suppress(FileNotFoundError):  # the process that trains has removed it
            names = copy.store.names()
            if CONFIG not in names:
                raise InputError(f"{copy.store.url} is not a run directory: there is no {CONFIG}")
            if checkpoint:
                _fetch_checkpoint(copy, names)
            copy.pull_files(names)
            for name, path in copy.files().items():
                if name not in names:
                    path.unlink()
            return
    raise InputError(
        f"what is in {copy.store.url} is replaced faster than it can be read; raise "
        "--checkpoint.keep or --checkpoint.every there"
    )


def _fetch_checkpoint(copy: RunCopy, names: Sequence[str]) -> None:
    """Downloads the newest intact checkpoint, and damaged newer ones for readers to report."""
    sealed = copy.seals(names)
    if copy.has_newest(sealed):
        return
    shutil.rmtree(copy.workdir / "checkpoints", ignore_errors=True)
    for step in sorted(sealed, reverse=True):
        copy.pull_checkpoint(names, step)
        if copy.is_intact(step):
            return


def _refuse_foreign(store: Store) -> None:
    names = store.names()
    if CONFIG not in names and set(names) - {leases.NAME}:
        raise InputError(
            f"{store.url} is not empty and holds no run; choose another --workdir or empty it"
        )


def _made(url: str, cache: Path, purpose: str) -> Path:
    """`folder_of`, created if missing."""
    folder = folder_of(url, cache, purpose)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(
            f"cannot write {folder}, where {url} is copied to: {error.strerror}; choose another "
            "--data.cache-dir or LMJAX_CACHE"
        ) from error
    return folder


@contextlib.contextmanager
def _locked(folder: Path, url: str) -> Iterator[None]:
    """Locks a folder against other processes of this machine."""
    with lock(folder / "lock", wait=False) as mine:
        if not mine:
            raise InputError(
                f"{holder(folder / 'lock')} is training in {url}; stop that one or wait for it, "
                "or choose another --workdir"
            )
        yield


@contextlib.contextmanager
def _unusable_is_bad_input(url: str) -> Iterator[None]:
    try:
        yield
    except StoreError as error:
        raise InputError(f"cannot use {url} ({error})") from error


@contextlib.contextmanager
def _speaking_of(url: str, copy: Path) -> Iterator[None]:
    """Reports errors of the local copy under the store's URL, which is what users know."""
    try:
        yield
    except (InputError, CheckpointError) as error:
        if str(copy) not in str(error):
            raise
        raise type(error)(
            f"{str(error).replace(str(copy), url)} (it is copied to {copy})"
        ) from error
