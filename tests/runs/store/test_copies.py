"""What is in the store, which copy of a run is right, and what readers see."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from run_helpers import NAMES
from store_helpers import URL, Machine, checkpoint, flip, local_steps, sealed, until

from lmjax.errors import CheckpointError
from lmjax.files import manifest
from lmjax.runs.checkpoint import Checkpoints
from lmjax.runs.store import remote
from lmjax.runs.store.object_store import Store
from lmjax.runs.store.remote import fetched, staged
from lmjax.train import InputError, TrainingFailed


def test_a_manifest_comes_last_and_goes_first(
    machine: Callable[[], Machine], monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[tuple[str, str]] = []

    def watched(name: str) -> Callable[..., None]:
        original = getattr(Store, name)

        def call(self: Store, names: Any, *more: Any) -> None:
            listed = [names] if isinstance(names, str) else list(names)
            done.extend((name, n) for n in listed if "checkpoints" in n)
            original(self, names if more or name == "upload" else listed, *more)

        return call

    for name in ("upload", "write", "remove"):
        monkeypatch.setattr(Store, name, watched(name))
    with machine().training() as (workdir, mirror):
        checkpoint(workdir, 10)
        mirror([10])
        checkpoint(workdir, 20)
        mirror([20])
        shutil.rmtree(workdir / "checkpoints" / "10")
    files = ("data.json", "state/array")
    uploads = {n: [("upload", f"checkpoints/{n}/{file}") for file in files] for n in (10, 20)}
    assert done == [
        *uploads[10],
        ("write", "checkpoints/10/manifest.sha256"),
        *uploads[20],
        ("write", "checkpoints/20/manifest.sha256"),
        ("remove", "checkpoints/10/manifest.sha256"),
        *(("remove", f"checkpoints/10/{file}") for file in files),
    ]


@pytest.mark.parametrize("name", NAMES)
def test_a_run_of_any_name_is_written_removed_and_read(
    name: str, machine: Callable[[], Machine]
) -> None:
    url = f"memory://bucket/{name}"
    with machine().training(url) as (workdir, mirror):
        for step in (10, 20):
            checkpoint(workdir, step)
            mirror([step])
        shutil.rmtree(workdir / "checkpoints" / "10")
    assert sealed(url) == [20]
    assert all("/10/" not in name for name in Store(url).names())
    assert "owner.json" not in Store(url).names()
    with machine().training(url) as (workdir, _):
        assert local_steps(workdir) == [20]


def test_without_its_manifest_a_checkpoint_is_not_there(
    machine: Callable[[], Machine], objects: dict[str, Any]
) -> None:
    machine().starts(10, 20)
    del objects["/bucket/run/checkpoints/20/manifest.sha256"]
    with machine().training() as (workdir, mirror):
        assert local_steps(workdir) == [10]
        mirror([10])
        assert not any("checkpoints/20" in name for name in Store(URL).names())
    with fetched(URL) as directory:
        assert local_steps(directory) == [10]


def test_a_damaged_checkpoint_falls_back_and_is_replaced(
    machine: Callable[[], Machine], objects: dict[str, Any]
) -> None:
    """Even by one with the same manifest, which has the same bytes."""
    machine().starts(10, 20)
    flip(objects, "/bucket/run/checkpoints/20/state/array")
    fresh = machine()
    with (
        fresh.training() as (workdir, mirror),
        Checkpoints(workdir / "checkpoints", 2, fresh.said.append, mirror) as checkpoints,
    ):
        assert checkpoints.newest_intact() == 10
        assert any("checkpoint 20 is damaged: state/array" in line for line in fresh.said)
        checkpoint(workdir, 20)
        mirror([10, 20])
    with machine().training() as (workdir, _):
        assert local_steps(workdir) == [10, 20]
        manifest.check(workdir / "checkpoints" / "20")


def test_where_all_are_damaged_the_store_is_named(
    machine: Callable[[], Machine], objects: dict[str, Any]
) -> None:
    machine().starts(10)
    flip(objects, "/bucket/run/checkpoints/10/data.json")
    with (
        pytest.raises(CheckpointError, match="no checkpoint in memory://bucket/run/checkpoints"),
        machine().training() as (workdir, mirror),
        Checkpoints(workdir / "checkpoints", 2, None, mirror) as checkpoints,
    ):
        checkpoints.newest_intact()
    assert sealed() == [10]


def test_rows_come_between_checkpoints(
    machine: Callable[[], Machine], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote, "SECONDS_BETWEEN_PUSHES", 0.0)
    with machine().training() as (workdir, _):
        for text in ("one row\n", "one row\nand another\n"):
            (workdir / "metrics.jsonl").write_text(text)
            until(lambda text=text: Store(URL).read("metrics.jsonl") == text.encode())


def test_rows_of_a_run_that_failed_come_too(machine: Callable[[], Machine]) -> None:
    with contextlib.suppress(TrainingFailed), machine().training() as (workdir, _):
        (workdir / "metrics.jsonl").write_text("the last row\n")
        raise TrainingFailed
    assert Store(URL).read("metrics.jsonl") == b"the last row\n"


def test_a_copy_ahead_of_the_store_is_kept(machine: Callable[[], Machine]) -> None:
    """A process was killed before it could write its newest checkpoint to the store."""
    here = machine()
    here.starts(10)
    (workdir,) = here.cache.glob("runs/*/train/run")
    checkpoint(workdir, 20)
    with here.training() as (workdir, _):
        assert local_steps(workdir) == [10, 20]
    assert sealed() == [10, 20]


@pytest.mark.parametrize("text", ["weights", "other weights"])
def test_a_copy_that_another_machine_has_left_behind_is_replaced(
    text: str, machine: Callable[[], Machine]
) -> None:
    """Also where both have a checkpoint of the same step, after a rewind on one of them."""
    here, there = machine(), machine()
    here.starts(10)
    (copy,) = here.cache.glob("runs/*/train/run")
    checkpoint(copy, 20)
    (copy / "result.json").write_text("{}")
    with there.training() as (workdir, mirror):
        checkpoint(workdir, 20, "other weights")
        mirror([10, 20])
        if text == "weights":
            checkpoint(workdir, 30)
            mirror([20, 30])
            shutil.rmtree(workdir / "checkpoints" / "10")
    steps = sealed()
    with here.training() as (workdir, _):
        assert local_steps(workdir) == steps
        array = workdir / "checkpoints" / "20" / "state" / "array"
        assert array.read_text() == "other weights 20"
        assert not (workdir / "result.json").exists()
    assert any(line.startswith("replacing ") for line in here.said)


def test_a_damaged_copy_is_brought_again(machine: Callable[[], Machine]) -> None:
    here = machine()
    here.starts(10)
    (copy,) = here.cache.glob("runs/*/train/run")
    (copy / "checkpoints" / "10" / "data.json").write_text("damaged")
    with here.training() as (workdir, _):
        manifest.check(workdir / "checkpoints" / "10")


def test_who_empties_the_store_starts_again(
    machine: Callable[[], Machine], objects: dict[str, Any]
) -> None:
    here = machine()
    here.starts(10)
    objects.clear()
    with staged(URL, here.cache, here.said.append) as (workdir, _):
        assert not workdir.exists()
        workdir.mkdir()


def test_a_place_with_other_files_is_refused(
    machine: Callable[[], Machine], objects: dict[str, Any]
) -> None:
    Store("memory://bucket/run").write("thesis.tex", b"")
    with (
        pytest.raises(InputError, match="not empty and holds no run"),
        machine().training(),
    ):
        pass
    assert list(objects) == ["/bucket/run/thesis.tex"]


def test_a_reader_sees_what_is_there_now(machine: Callable[[], Machine], home: Path) -> None:
    shutil.rmtree(home / "cache" / "runs", ignore_errors=True)
    here = machine()
    with here.training() as (workdir, mirror):
        (workdir / "result.json").write_text("{}")
        checkpoint(workdir, 10)
        mirror([10])
        with fetched(URL) as directory:
            assert local_steps(directory) == [10]
            assert (directory / "result.json").exists()
        Store(URL).remove(["result.json"])
        (workdir / "result.json").unlink()
        checkpoint(workdir, 20)
        mirror([10, 20])
        before = Store(URL).names()
        with fetched(URL) as directory:
            assert local_steps(directory) == [20]
            assert not (directory / "result.json").exists()
        assert Store(URL).names() == before


def test_a_reader_looks_again_when_a_checkpoint_vanishes(
    machine: Callable[[], Machine], home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.rmtree(home / "cache" / "runs", ignore_errors=True)
    download = Store.download
    with machine().training() as (workdir, mirror):
        checkpoint(workdir, 10)
        mirror([10])

        def replaced(self: Store, files: Any) -> None:
            monkeypatch.setattr(Store, "download", download)
            checkpoint(workdir, 20)
            mirror([20])
            shutil.rmtree(workdir / "checkpoints" / "10")
            download(self, files)

        monkeypatch.setattr(Store, "download", replaced)
        with fetched(URL) as directory:
            assert local_steps(directory) == [20]


def test_reading_where_no_run_is_is_bad_input(home: Path) -> None:
    with (
        pytest.raises(InputError, match=r"memory://bucket/none is not a run directory"),
        fetched("memory://bucket/none"),
    ):
        pass
