"""Runs in an object store, which for most of these tests is fsspec's store in memory.

The last test has a server that speaks S3 and processes that are killed:

    pip install -e '.[test-remote]'
    python -m pytest -m long -s tests/train/test_remote.py
"""

from __future__ import annotations

import contextlib
import importlib.util
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest
from run_helpers import NAMES, finish, result, rows, start, tiny, tiny_flags, untimed

from experiments import quickstart
from lmjax.cli import common as cli
from lmjax.errors import CheckpointError, StorageFailed
from lmjax.files import manifest
from lmjax.runs.checkpoint import Checkpoints
from lmjax.runs.store import lease as leases
from lmjax.runs.store import remote
from lmjax.runs.store.object_store import Store, as_url
from lmjax.runs.store.remote import fetched, staged
from lmjax.train import InputError, TrainingFailed, train

URL = "memory://bucket/run"


@pytest.fixture(autouse=True)
def objects() -> Iterator[dict[str, Any]]:
    """What the store in memory holds, by path; empty at first."""
    from fsspec.implementations.memory import MemoryFileSystem

    MemoryFileSystem.store.clear()
    yield MemoryFileSystem.store
    MemoryFileSystem.store.clear()


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lmjax.train.records.draw_curves", lambda *_: None)
    monkeypatch.setattr(leases, "BEAT_SECONDS", 0.02)
    monkeypatch.setattr(leases, "SILENCE_SECONDS", 4.0)
    monkeypatch.setattr(leases, "LOOK_SECONDS", 0.02)


class Machine:
    """A machine with a cache of its own, and what it has said."""

    def __init__(self, cache: Path):
        self.cache = cache
        self.said: list[str] = []

    @contextlib.contextmanager
    def training(self, url: str = URL) -> Iterator[remote.Staged]:
        with staged(url, self.cache, self.said.append) as (workdir, mirror):
            workdir.mkdir(parents=True, exist_ok=True)
            (workdir / "config.json").write_text("{}")
            yield remote.Staged(workdir, mirror)

    def starts(self, *steps: int) -> None:
        """A run of this machine that has written some checkpoints, and ends well."""
        with self.training() as (workdir, mirror):
            for step in steps:
                checkpoint(workdir, step)
                mirror(local_steps(workdir))


@pytest.fixture
def machine(tmp_path: Path) -> Callable[[], Machine]:
    """Makes a new machine."""
    numbers = iter(range(10))
    return lambda: Machine(tmp_path / f"machine{next(numbers)}")


def checkpoint(workdir: Path, step: int, text: str = "weights") -> None:
    """A sealed checkpoint of two files, which replaces one of the same step."""
    folder = workdir / "checkpoints" / str(step)
    shutil.rmtree(folder, ignore_errors=True)
    (folder / "state").mkdir(parents=True)
    (folder / "state" / "array").write_text(f"{text} {step}")
    (folder / "data.json").write_text("{}")
    manifest.seal(folder)


def local_steps(workdir: Path) -> list[int]:
    folders = (workdir / "checkpoints").glob("*")
    return sorted(int(path.name) for path in folders if path.name.isdecimal())


def sealed(url: str = URL) -> list[int]:
    """The checkpoints that are in the store."""
    names = [name.split("/") for name in Store(url).names()]
    return sorted(int(parts[1]) for parts in names if parts[-1] == manifest.NAME)


def flip(objects: dict[str, Any], path: str) -> None:
    """Damages an object."""
    objects[path].seek(0)
    objects[path].write(b"X")


def fail_at(monkeypatch: pytest.MonkeyPatch, part: str) -> None:
    """Makes the store refuse files with this in their path, with what came before there."""
    from fsspec.implementations.memory import MemoryFileSystem

    put_file = MemoryFileSystem.put_file

    def refuse(self: Any, lpath: str, rpath: str, *more: Any, **options: Any) -> None:
        if part in rpath:
            raise PermissionError("Access Denied")
        put_file(self, lpath, rpath, *more, **options)

    monkeypatch.setattr(MemoryFileSystem, "put_file", refuse)


# --- Whole runs ---


@pytest.fixture(scope="module")
def undisturbed(home: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of the run on this machine that nobody interrupts."""
    workdir = tmp_path_factory.mktemp("undisturbed") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lmjax.train.records.draw_curves", lambda *_: None)
        train(tiny(home), workdir, progress=False)
    return workdir


def forget(home: Path) -> None:
    """Makes this a fresh machine."""
    shutil.rmtree(home / "cache" / "runs")


def assert_same_run(workdir: Path, reference: Path) -> None:
    assert result(workdir)["parameters_sha256"] == result(reference)["parameters_sha256"]
    assert result(workdir)["eval_loss"] == result(reference)["eval_loss"]
    assert untimed(workdir) == untimed(reference)


def test_a_fresh_machine_goes_on(home: Path, undisturbed: Path) -> None:
    from lmjax.inference import load_model
    from lmjax.runs.run_directory import parameters_sha256

    first = train(tiny(home), URL, stop_after=23, progress=False)
    assert (first.step, first.workdir.name) == (23, "run")
    assert sealed() == [20, 23]
    forget(home)
    before = Store(URL).names()
    with pytest.raises(InputError, match=r"memory://bucket/run holds another run \(seed is 0"):
        train(tiny(home, seed=1), URL, progress=False)
    assert Store(URL).names() == before
    assert train(tiny(home), URL, stop_after=2, progress=False).step == 25
    last = train(tiny(home), URL, progress=False)
    assert_same_run(last.workdir, undisturbed)
    forget(home)
    with fetched(URL, checkpoint=False) as directory:
        assert_same_run(directory, undisturbed)
        assert {path.name for path in directory.iterdir()} == {
            "config.json",
            "environment.json",
            "metrics.jsonl",
            "result.json",
            "tensorboard",
            "tokenizer.json",
        }
    model = load_model(URL)
    assert parameters_sha256(model.params) == result(undisturbed)["parameters_sha256"]
    assert leases.NAME not in Store(URL).names()


def test_a_store_that_refuses_stops_the_run(
    home: Path, undisturbed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Half way through a checkpoint; the one before is there and here, and serves to go on."""
    config = tiny(home, checkpoint={"every": 10, "keep": 1})
    with monkeypatch.context() as patch:
        fail_at(patch, "checkpoints/20/progress.json")
        with pytest.raises(StorageFailed, match=r"Access Denied; .* step 10 there, and .* step 20"):
            train(config, URL, progress=False)
    (copy,) = home.glob("cache/runs/*/train/run")
    assert local_steps(copy) == [10, 20]
    assert any("checkpoints/20/" in name for name in Store(URL).names())
    assert sealed() == [10]
    forget(home)
    last = train(config, URL, progress=False)
    assert_same_run(last.workdir, undisturbed)
    assert sealed() == [40]


def test_a_missing_library_is_bad_input(
    home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def missing(scheme: str) -> None:
        raise ImportError(f"no {scheme}")

    monkeypatch.setattr(fsspec, "get_filesystem_class", missing)
    flags = tiny_flags(home, "s3://bucket/run")  # type: ignore[arg-type]
    code = cli.guarded(
        lambda: cli._run_experiment("experiments.quickstart", quickstart.config, flags)
    )
    assert code == cli.BAD_INPUT
    assert "pip install 'lmjax[s3]'" in capsys.readouterr().err


# --- What is in the store ---


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


def until(condition: Callable[[], bool], seconds: float = 30, every: float = 0.01) -> None:
    """Returns when a condition holds."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(every)


# --- Which is right, the store or the copy ---


def test_a_copy_that_went_on_from_the_store_is_kept(machine: Callable[[], Machine]) -> None:
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


def test_what_is_no_run_is_refused(machine: Callable[[], Machine], objects: dict[str, Any]) -> None:
    Store("memory://bucket/run").write("thesis.tex", b"")
    with (
        pytest.raises(InputError, match="not empty and holds no run"),
        machine().training(),
    ):
        pass
    assert list(objects) == ["/bucket/run/thesis.tex"]


# --- Who trains there ---


def test_a_second_machine_is_refused_while_the_first_trains(
    machine: Callable[[], Machine],
) -> None:
    here, there = machine(), machine()
    with here.training() as (workdir, mirror):
        with pytest.raises(InputError, match="is training in memory://bucket/run"):
            there.starts(10)
        checkpoint(workdir, 10)
        mirror([10])
    assert leases.NAME not in Store(URL).names()
    there.starts(20)
    assert sealed() == [10, 20]


@pytest.fixture
def killed(machine: Callable[[], Machine], monkeypatch: pytest.MonkeyPatch) -> Machine:
    """A machine whose process ended without another word, after a checkpoint."""
    here = machine()
    with contextlib.suppress(KeyboardInterrupt), here.training() as (workdir, mirror):
        checkpoint(workdir, 10)
        mirror([10])
        raise KeyboardInterrupt
    assert leases.NAME in Store(URL).names()
    return here


def test_the_lease_of_a_dead_process_lasts_for_a_while(
    killed: Machine, machine: Callable[[], Machine]
) -> None:
    there = machine()
    there.starts(20)
    assert "waiting for up to" in there.said[0]
    assert sealed() == [10, 20]


def test_the_same_machine_need_not_wait(killed: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(leases, "SILENCE_SECONDS", 20.0)
    killed.starts(20)
    assert not any("waiting" in line for line in killed.said)


def taken_over(machine: Machine) -> bool:
    """Whether it has said that another one trains in its place."""
    return any("has taken over" in line for line in machine.said)


def test_who_was_taken_for_dead_writes_no_more(
    machine: Callable[[], Machine], monkeypatch: pytest.MonkeyPatch
) -> None:
    here, there = machine(), machine()
    beat = leases.Lease.beat
    with contextlib.suppress(StorageFailed), here.training() as (copy, mirror):
        monkeypatch.setattr(leases.Lease, "beat", lambda self: None)
        time.sleep(0.1)  # a beat may be on its way
        with there.training() as (workdir, other):
            monkeypatch.setattr(leases.Lease, "beat", beat)
            checkpoint(copy, 15)
            with pytest.raises(StorageFailed, match="has taken over"):
                mirror([15])
            checkpoint(workdir, 20)
            other([20])
            end = time.monotonic() + 20  # the heart of a busy machine may be slow
            while not taken_over(here) and time.monotonic() < end:
                time.sleep(0.05)
    assert taken_over(here)
    assert sealed() == [20]


def test_of_two_at_the_same_moment_one_is_refused(
    machine: Callable[[], Machine], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before it writes its own lease, the second sees none of the first."""
    read = leases._read
    with machine().training():
        seen = iter([lambda store: None])
        monkeypatch.setattr(leases, "_read", lambda store: next(seen, read)(store))
        with pytest.raises(InputError, match="is training in memory://bucket/run; stop"):
            machine().starts(10)
    assert sealed() == []


def test_a_failing_heartbeat_is_reported_once(
    machine: Callable[[], Machine], monkeypatch: pytest.MonkeyPatch
) -> None:
    here = machine()
    beats: list[None] = []

    def fail(self: leases.Lease) -> None:
        beats.append(None)
        raise remote.StoreError("no route to host")

    monkeypatch.setattr(leases.Lease, "beat", fail)
    with here.training():
        until(lambda: len(beats) > 3)
    assert here.said.count("warning: no route to host") == 1


# --- Readers ---


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


def test_reading_what_is_no_run_is_bad_input(home: Path) -> None:
    with (
        pytest.raises(InputError, match=r"memory://bucket/none is not a run directory"),
        fetched("memory://bucket/none"),
    ):
        pass


# --- URLs ---


def test_urls_and_paths() -> None:
    assert as_url("s3://bucket/run/") == "s3://bucket/run"
    assert as_url("runs/mine") is None
    assert as_url(Path("/tmp/run")) is None
    assert as_url("C:/runs") is None


@pytest.mark.parametrize(
    ("place", "message"),
    [
        (Path("s3://bucket/run"), "looks like a URL"),
        ("file:///tmp/run", "write it without file://"),
        ("s3://", "names no place"),
        ("s3://bucket/a::b", "chain of stores"),
    ],
)
def test_what_only_looks_like_a_url_is_refused(place: str | Path, message: str) -> None:
    with pytest.raises(InputError, match=message):
        as_url(place)


def test_an_ablation_in_a_store_is_refused(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And does not become a directory named s3: here."""
    from lmjax.ablation.grid import Ablation
    from lmjax.ablation.runner import run

    monkeypatch.chdir(tmp_path)
    ablation = Ablation("runs", "?", tiny(home), {"a": tiny(home)}, (), "a", (0,))
    with pytest.raises(InputError, match="only a run can be in an object store"):
        run(ablation, "s3://bucket/runs", progress=False)
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_scheme_is_refused() -> None:
    with pytest.raises(InputError, match=r"nothing is known about s4://"):
        Store("s4://bucket/run")


def test_names_that_lead_elsewhere_are_refused(objects: dict[str, Any]) -> None:
    fsspec.filesystem("memory").pipe_file("/bucket/run/../../etc/passwd", b"")
    objects["/bucket/run/../escape"] = next(iter(objects.values()))
    with pytest.raises(remote.StoreError, match=r"\.\."):
        Store(URL).names()


def test_several_processes_are_refused(
    machine: Callable[[], Machine], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lmjax.runs.store.remote.jax.process_count", lambda: 2)
    with pytest.raises(InputError, match="mount the bucket"), machine().training():
        pass


# --- A server and processes ---

STEPS = 2400


class S3:
    """moto's server, which speaks S3 and keeps what it is given in memory."""

    def __init__(self) -> None:
        if not importlib.util.find_spec("moto") or not importlib.util.find_spec("s3fs"):
            pytest.fail("this test needs an S3 server and client: pip install -e '.[test-remote]'")
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.url = f"http://127.0.0.1:{free.getsockname()[1]}"
        self.process = subprocess.Popen(
            [sys.executable, "-m", "moto.server", "-p", self.url.rpartition(":")[2]],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        self.environment = {
            "AWS_ENDPOINT_URL": self.url,
            "AWS_ACCESS_KEY_ID": "nobody",
            "AWS_SECRET_ACCESS_KEY": "nothing",
            "AWS_DEFAULT_REGION": "us-east-1",
        }
        until(self._answers, 120, every=0.3)
        self._files = fsspec.filesystem(
            "s3", endpoint_url=self.url, key="nobody", secret="nothing", use_listings_cache=False
        )
        self._files.mkdir("bucket")

    def has(self, name: str) -> bool:
        """Whether there is such an object in the bucket."""
        return self._files.exists(f"bucket/{name}")

    def read(self, name: str) -> bytes:
        """An object of the bucket."""
        return self._files.cat_file(f"bucket/{name}")

    def wait_for(self, name: str, process: subprocess.Popen[str]) -> None:
        """Returns when a process has written an object."""
        until(lambda: process.poll() is not None or self.has(name), 300, every=0.3)
        assert process.poll() is None, process.communicate()[1]

    def _answers(self) -> bool:
        try:
            urllib.request.urlopen(self.url).close()
        except OSError:
            return False
        return True


@pytest.fixture
def s3() -> Iterator[S3]:
    """A server with an empty bucket."""
    server = S3()
    yield server
    server.process.kill()
    server.process.wait()


@pytest.fixture
def launch(home: Path, tmp_path: Path) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """`launch(place, environment)`: the same run at a place; killed after the test."""
    launched = []

    def launch(place: str, environment: dict[str, str]) -> subprocess.Popen[str]:
        flags = tiny_flags(home, place, steps=STEPS)  # type: ignore[arg-type]
        launched.append(start("experiments.quickstart", *flags, cwd=tmp_path, **environment))
        return launched[-1]

    yield launch
    for process in launched:
        process.kill()


@pytest.mark.long
def test_processes_and_a_server(
    tmp_path: Path, s3: S3, launch: Callable[..., subprocess.Popen[str]]
) -> None:
    """Killed, pre-empted and moved from machine to machine: the run that was left alone."""
    machines = iter(range(10))

    def fresh() -> dict[str, str]:
        """The environment of a machine that has nothing."""
        return {**s3.environment, "LMJAX_CACHE": str(tmp_path / f"machine{next(machines)}")}

    def say(what: str) -> None:
        print(f"{time.monotonic() - began:6.1f} s  {what}")

    began = time.monotonic()
    assert finish(launch(str(tmp_path / "undisturbed"), fresh()))[0] == 0
    say("the undisturbed run is done, on local files")

    first = fresh()
    process = launch("s3://bucket/run", first)
    s3.wait_for("run/owner.json", process)
    code, _, err = finish(launch("s3://bucket/run", fresh()))
    assert code == 2, err
    assert f"process {process.pid} on" in err
    assert "is training in s3://bucket/run; stop that one" in err
    say(f"a second machine, exit code 2: {err.splitlines()[-1]}")
    s3.wait_for("run/metrics.jsonl", process)
    process.kill()
    assert finish(process)[0] == -signal.SIGKILL
    assert not s3.has("run/result.json")
    say("SIGKILL")

    process = launch("s3://bucket/run", first)
    assert process.stderr is not None
    lines = iter(process.stderr.readline, "")
    resumed = next(line for line in lines if line.startswith("resuming"))
    process.kill()
    assert finish(process)[0] == -signal.SIGKILL
    say(f"the same machine did not wait; SIGKILL: {resumed.strip()}")

    shutil.rmtree(first["LMJAX_CACHE"])
    second = fresh()
    process = launch("s3://bucket/run", second)
    lines = iter(process.stderr.readline, "")  # type: ignore[union-attr]
    said = []
    for line in lines:
        said.append(line.strip())
        if line.startswith("resuming"):
            break
    assert any("waiting for up to 60 s" in line for line in said)
    process.send_signal(signal.SIGTERM)
    code, _, err = finish(process)
    assert code == 75, err
    step = err.partition("stopped by SIGTERM at step ")[2].partition(";")[0]
    assert s3.has(f"run/checkpoints/{step}/manifest.sha256")
    assert not s3.has("run/owner.json")
    say(f"a fresh machine: {said[-1]}; SIGTERM, exit code 75 at step {step}")

    shutil.rmtree(second["LMJAX_CACHE"])
    code, out, err = finish(launch("s3://bucket/run", fresh()))
    assert code == 0, err
    assert out.strip().endswith("everything is in s3://bucket/run")
    assert "waiting" not in err
    say(out.strip())

    outcome = tmp_path / "outcome"
    outcome.mkdir()
    for name in ("result.json", "metrics.jsonl"):
        (outcome / name).write_bytes(s3.read(f"run/{name}"))
    assert_same_run(outcome, tmp_path / "undisturbed")
    assert len(rows(outcome)) == STEPS // 5 + STEPS // 50
    say(f"parameters_sha256 {result(outcome)['parameters_sha256'][:16]}... in both")

    reader = fresh()
    for verb in (
        ("evaluate", "s3://bucket/run"),
        ("generate", "s3://bucket/run", "--tokens", "5"),
        ("score", "s3://bucket/run", "--text", "the quick"),
        ("report", "s3://bucket/run", "--out", "report"),
    ):
        code, out, err = finish(start("lmjax", *verb, cwd=tmp_path, **reader))
        assert code == 0, err
        say(f"{verb[0]}: {out.strip().splitlines()[-1]}")

    code, _, err = finish(launch("s3://no-such-bucket/run", reader))
    assert code == 2, err
    say(err.splitlines()[-1])

    machine = fresh()
    process = launch("s3://bucket/other", machine)
    s3.wait_for("other/checkpoints/50/manifest.sha256", process)
    s3.process.kill()
    code, _, err = finish(process)
    assert code == 1, err
    assert "Traceback" not in err
    assert "the same command resumes from there" in err
    (copy,) = Path(machine["LMJAX_CACHE"]).glob("runs/*/train/other")
    for saved in local_steps(copy):
        manifest.check(copy / "checkpoints" / str(saved))
    say(f"the server died, exit code 1: {err.splitlines()[-1]}")
