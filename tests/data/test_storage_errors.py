"""Disks that are full or refuse: one line that names the cache, and nothing half-written."""

from __future__ import annotations

import errno
import os
import subprocess
from pathlib import Path

import pytest

from lmjax.data import CacheFailed, DataError, tokenized_corpus
from lmjax.data.store import storage_explained
from lmjax.errors import StorageFailed
from lmjax.train import Config, InputError, train

TEXTS = ["All the world's a stage, and all the men and women merely players. " * 40] * 12


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 200 kB, which is full when the corpus is half written."""
    place = tmp_path / "disk"
    place.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=200k", "tmpfs", str(place)]
    if os.name != "posix" or os.geteuid() != 0 or subprocess.run(command).returncode:
        pytest.skip("only root can mount a small file system")
    yield place
    subprocess.run(["umount", "--lazy", str(place)], check=True)


def one_line(error):
    assert "\n" not in str(error.value)
    assert "--data.cache-dir" in str(error.value)


@pytest.mark.parametrize("free", [4, 24, 60])
def test_a_full_disk_is_named_and_nothing_stays(text_files, small_disk, free):
    """While the dataset is written, its index, or the tokens."""
    (small_disk / "ballast").write_bytes(bytes((200 - free) * 1000))
    with pytest.raises(CacheFailed, match=r"cannot write the cache .*disk: No space left") as error:
        tokenized_corpus(text_files(TEXTS, cache_dir=str(small_disk)), window=9, progress=False)
    one_line(error)
    assert [path.name for path in small_disk.rglob("*")] == ["ballast"]


def test_a_read_only_disk_is_named(text_files, small_disk):
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    with pytest.raises(DataError, match=r"cannot use the cache .*: Read-only file system") as error:
        tokenized_corpus(text_files(TEXTS, cache_dir=str(small_disk)), window=9, progress=False)
    one_line(error)


def test_a_file_where_the_cache_should_be_is_named(text_files, tmp_path):
    (tmp_path / "file").write_text("")
    for cache in ("file", "file/below"):
        config = text_files(TEXTS, cache_dir=str(tmp_path / cache))
        with pytest.raises(DataError, match=r"cannot use the cache .*: Not a directory") as error:
            tokenized_corpus(config, window=9, progress=False)
        one_line(error)


@pytest.mark.parametrize(
    ("raised", "expected"),
    [
        (OSError(errno.EACCES, "Permission denied"), DataError),
        (OSError(errno.EIO, "Input/output error"), CacheFailed),
        (OSError("train.bin does not hold what was written: check the disk"), CacheFailed),
        (RuntimeError("write() failed: No space left on device; writing x"), CacheFailed),
        (RuntimeError("open() failed: Permission denied"), DataError),
        (RuntimeError("a bug"), RuntimeError),
    ],
)
def test_whoever_says_it_it_becomes_one_of_two_errors(raised, expected):
    with pytest.raises(Exception) as error, storage_explained(Path("cache")):  # noqa: PT011
        raise raised
    assert type(error.value) is expected


def test_a_run_fails_as_storage_does(text_files, monkeypatch, tmp_path):
    def full(*_: object, **__: object) -> None:
        raise CacheFailed("cannot write the cache")

    monkeypatch.setattr("lmjax.train.start.tokenized_corpus", full)
    with pytest.raises(StorageFailed, match="cannot write the cache"):
        train(Config(data=text_files(TEXTS)), tmp_path / "run", progress=False)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("kind", ["file", "below a file", "foreign", "too long"])
def test_the_run_directory_is_looked_at_before_text_is_tokenized(
    kind, text_files, monkeypatch, tmp_path
):
    def never(*_: object, **__: object) -> None:
        pytest.fail("tokenized for a directory that cannot be used")

    monkeypatch.setattr("lmjax.train.start.tokenized_corpus", never)
    (tmp_path / "file").write_text("")
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "letter.txt").write_text("")
    names = {
        "file": "file",
        "below a file": "file/run",
        "foreign": "foreign",
        "too long": "x" * 300,
    }
    config = Config(data=text_files(TEXTS))
    with pytest.raises(InputError, match=r"cannot write the run|holds no run|not a run"):
        train(config, tmp_path / names[kind], progress=False)


def test_an_unwritable_parent_is_found_by_asking(text_files, monkeypatch, tmp_path):
    monkeypatch.setattr("lmjax.runs.run_directory.os.access", lambda *_: False)
    monkeypatch.setattr("lmjax.train.start.tokenized_corpus", None)
    with pytest.raises(InputError, match="Permission denied; choose another --workdir"):
        train(Config(data=text_files(TEXTS)), tmp_path / "a" / "b", progress=False)
