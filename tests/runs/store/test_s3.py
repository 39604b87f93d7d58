"""A server that speaks S3, and processes that are killed.

pip install -e '.[test-remote]'
python -m pytest -m long -s tests/runs/store/test_s3.py
"""

from __future__ import annotations

import importlib.util
import shutil
import signal
import socket
import subprocess
import sys
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import fsspec
import pytest
from run_helpers import finish, rows, start, tiny_flags
from store_helpers import assert_same_run, local_steps, until

from lmjax.files import manifest

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
            "AWS_ACCESS_KEY_ID": "anyone",
            "AWS_SECRET_ACCESS_KEY": "anything",
            "AWS_DEFAULT_REGION": "us-east-1",
        }
        until(self._answers, 120, every=0.3)
        self._files = fsspec.filesystem(
            "s3", endpoint_url=self.url, key="anyone", secret="anything", use_listings_cache=False
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
def fresh(tmp_path: Path, s3: S3) -> Callable[[], dict[str, str]]:
    """The environment of a machine that has nothing."""
    numbers = iter(range(10))
    return lambda: {**s3.environment, "LMJAX_CACHE": str(tmp_path / f"machine{next(numbers)}")}


@pytest.fixture
def launch(home: Path, tmp_path: Path) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """`launch(place, environment, steps)`: the same run at a place; killed after the test."""
    launched = []

    def launch(
        place: str, environment: dict[str, str], steps: int = STEPS
    ) -> subprocess.Popen[str]:
        flags = tiny_flags(home, place, steps=steps)  # type: ignore[arg-type]
        launched.append(start("experiments.quickstart", *flags, cwd=tmp_path, **environment))
        return launched[-1]

    yield launch
    for process in launched:
        process.kill()


def read_until_resumed(process: subprocess.Popen[str]) -> list[str]:
    """What a process says up to the line that it resumes."""
    said = []
    assert process.stderr is not None
    for line in iter(process.stderr.readline, ""):
        said.append(line.strip())
        if line.startswith("resuming"):
            return said
    raise AssertionError("\n".join(said))


def kill(process: subprocess.Popen[str]) -> None:
    process.kill()
    assert finish(process)[0] == -signal.SIGKILL


def assert_refused(process: subprocess.Popen[str], trains: subprocess.Popen[str]) -> None:
    """That a process ended because another one trains at its place."""
    code, _, err = finish(process)
    assert code == 2, err
    assert f"process {trains.pid} on" in err
    assert "is training in s3://bucket/run; stop that one" in err


def step_of_stop(process: subprocess.Popen[str]) -> str:
    """Stops a process with SIGTERM; the step of its last checkpoint."""
    process.send_signal(signal.SIGTERM)
    code, _, err = finish(process)
    assert code == 75, err
    return err.partition("stopped by SIGTERM at step ")[2].partition(";")[0]


@pytest.mark.long
def test_a_killed_and_moved_run_ends_as_an_undisturbed_one(
    tmp_path: Path,
    s3: S3,
    fresh: Callable[[], dict[str, str]],
    launch: Callable[..., subprocess.Popen[str]],
) -> None:
    """Killed, pre-empted and moved from machine to machine."""
    assert finish(launch(str(tmp_path / "undisturbed"), fresh()))[0] == 0

    first = fresh()
    process = launch("s3://bucket/run", first)
    s3.wait_for("run/owner.json", process)
    assert_refused(launch("s3://bucket/run", fresh()), process)
    s3.wait_for("run/metrics.jsonl", process)
    kill(process)
    assert not s3.has("run/result.json")

    process = launch("s3://bucket/run", first)
    assert not any("waiting" in line for line in read_until_resumed(process))
    kill(process)
    shutil.rmtree(first["LMJAX_CACHE"])

    second = fresh()
    process = launch("s3://bucket/run", second)
    assert any("waiting for up to 60 s" in line for line in read_until_resumed(process))
    step = step_of_stop(process)
    assert s3.has(f"run/checkpoints/{step}/manifest.sha256")
    assert not s3.has("run/owner.json")
    shutil.rmtree(second["LMJAX_CACHE"])

    code, out, err = finish(launch("s3://bucket/run", fresh()))
    assert code == 0, err
    assert out.strip().endswith("everything is in s3://bucket/run")
    assert "waiting" not in err
    outcome = tmp_path / "outcome"
    outcome.mkdir()
    for name in ("result.json", "metrics.jsonl"):
        (outcome / name).write_bytes(s3.read(f"run/{name}"))
    assert_same_run(outcome, tmp_path / "undisturbed")
    assert len(rows(outcome)) == STEPS // 5 + STEPS // 50


@pytest.mark.long
def test_verbs_read_a_run_on_a_server(
    tmp_path: Path,
    fresh: Callable[[], dict[str, str]],
    launch: Callable[..., subprocess.Popen[str]],
) -> None:
    assert finish(launch("s3://bucket/run", fresh(), 50))[0] == 0
    reader = fresh()
    for verb in (
        ("evaluate", "s3://bucket/run"),
        ("generate", "s3://bucket/run", "--tokens", "5"),
        ("score", "s3://bucket/run", "--text", "the quick"),
        ("report", "s3://bucket/run", "--out", "report"),
    ):
        code, _, err = finish(start("lmjax", *verb, cwd=tmp_path, **reader))
        assert code == 0, err
    code, _, err = finish(launch("s3://no-such-bucket/run", reader))
    assert code == 2, err


@pytest.mark.long
def test_a_server_that_dies_leaves_sealed_checkpoints_here(
    s3: S3,
    fresh: Callable[[], dict[str, str]],
    launch: Callable[..., subprocess.Popen[str]],
) -> None:
    machine = fresh()
    process = launch("s3://bucket/run", machine)
    s3.wait_for("run/checkpoints/50/manifest.sha256", process)
    s3.process.kill()
    code, _, err = finish(process)
    assert code == 1, err
    assert "Traceback" not in err
    assert "the same command resumes from there" in err
    (copy,) = Path(machine["LMJAX_CACHE"]).glob("runs/*/train/run")
    saved = local_steps(copy)
    assert saved
    for step in saved:
        manifest.check(copy / "checkpoints" / str(step))
