"""Whole runs in an object store, and where it is: URLs."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fsspec
import pytest
from run_helpers import result, tiny, tiny_flags
from store_helpers import URL, Machine, assert_same_run, fail_at, local_steps, sealed

from experiments import quickstart
from lmjax.cli import common as cli
from lmjax.errors import StorageFailed
from lmjax.runs.store import lease as leases
from lmjax.runs.store import remote
from lmjax.runs.store.object_store import Store, as_url
from lmjax.runs.store.remote import fetched
from lmjax.train import InputError, train


@pytest.fixture(scope="module")
def undisturbed(home: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of the run on this machine without interruptions."""
    workdir = tmp_path_factory.mktemp("undisturbed") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lmjax.train.records.draw_curves", lambda *_: None)
        train(tiny(home), workdir, progress=False)
    return workdir


def forget(home: Path) -> None:
    """Makes this a fresh machine."""
    shutil.rmtree(home / "cache" / "runs")


def test_a_fresh_machine_resumes(home: Path, undisturbed: Path) -> None:
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
    """Half way through a checkpoint; the one before is there and here, and is resumed from."""
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
