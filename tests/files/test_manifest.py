"""A sealed folder: whatever happens to a byte of it is noticed."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from lmjax.files import manifest
from lmjax.files.manifest import Damaged

FILES = {"arrays/d/0": b"\x00\x01", "arrays/_METADATA": b"{}", "empty": b""}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A sealed folder of a few small files."""
    for name, content in FILES.items():
        path = tmp_path / "sealed" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    manifest.seal(tmp_path / "sealed")
    return tmp_path / "sealed"


def is_damaged(folder: Path) -> bool:
    """Whether `check` refuses the folder."""
    try:
        manifest.check(folder)
    except Damaged:
        return True
    return False


def test_what_was_sealed_passes_wherever_it_is(folder: Path) -> None:
    assert not is_damaged(folder)
    assert not is_damaged(folder.rename(folder.with_name("500")))


@pytest.mark.parametrize("name", [*FILES, manifest.NAME])
def test_every_flipped_bit_and_every_lost_byte_is_damage(name: str, folder: Path) -> None:
    path = folder / name
    whole = path.read_bytes()
    for bit in range(8 * len(whole)):
        flipped = bytearray(whole)
        flipped[bit // 8] ^= 1 << bit % 8
        path.write_bytes(flipped)
        assert is_damaged(folder), f"bit {bit}"
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        assert is_damaged(folder), f"cut to {length} bytes"
    path.write_bytes(whole + b"\n")
    assert is_damaged(folder)
    path.unlink()
    assert is_damaged(folder)
    path.write_bytes(whole)
    assert not is_damaged(folder)


OTHER_CHANGES: dict[str, Callable[[Path], object]] = {
    "a file more": lambda folder: (folder / "arrays" / "d" / "1").write_bytes(b""),
    "a file under another name": lambda folder: (folder / "empty").rename(folder / "full"),
    "two files exchanged": lambda folder: [
        (folder / "arrays/_METADATA").rename(folder / "kept"),
        (folder / "arrays/d/0").rename(folder / "arrays/_METADATA"),
        (folder / "kept").rename(folder / "arrays/d/0"),
    ],
    "a folder less": lambda folder: shutil.rmtree(folder / "arrays"),
}


@pytest.mark.parametrize("change", OTHER_CHANGES)
def test_other_damage(change: str, folder: Path) -> None:
    OTHER_CHANGES[change](folder)
    assert is_damaged(folder)


def test_what_file_systems_leave_behind_is_not_damage(folder: Path) -> None:
    (folder / ".nfs0001").write_bytes(b"x")
    assert not is_damaged(folder)


def test_sha256sum_reads_it(folder: Path) -> None:
    if shutil.which("sha256sum") is None:
        pytest.skip("no sha256sum here")
    command = ["sha256sum", "--check", "--strict", manifest.NAME]
    assert subprocess.run(command, cwd=folder, capture_output=True).returncode == 0
    (folder / "empty").write_bytes(b"x")
    assert subprocess.run(command, cwd=folder, capture_output=True).returncode == 1
