"""Compiled programs are kept for later processes, wherever nothing else is said."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import jax
import pytest

from lmjax.train.compilation import keep_programs

PROGRAM = """
import jax
from lmjax.train.compilation import keep_programs
keep_programs()
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
found = []
jax.monitoring.register_event_listener(lambda name, **_: found.append(name))
jax.jit(lambda x: x * 3 + 1)(1.0).block_until_ready()
print(sum(name.endswith("compilation_cache/cache_hits") for name in found))
"""


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    names = (
        "jax_compilation_cache_dir",
        "jax_compilation_cache_max_size",
        "jax_persistent_cache_min_compile_time_secs",
        "jax_compilation_cache_include_metadata_in_key",
    )
    before = {name: jax.config.values[name] for name in names}
    jax.config.update("jax_compilation_cache_dir", None)
    monkeypatch.setenv("LMJAX_COMPILED", str(tmp_path / "compiled"))
    yield tmp_path / "compiled"
    for name, value in before.items():
        jax.config.update(name, value)


def test_they_are_kept_where_the_variable_says(cache: Path):
    keep_programs()
    assert jax.config.values["jax_compilation_cache_dir"] == str(cache)


def test_programs_that_differ_in_their_scopes_are_kept_apart(cache: Path):
    keep_programs()
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)

    def compiled(scope: str) -> str:
        def program(x: jax.Array) -> jax.Array:
            with jax.named_scope(scope):
                return x * 3 + 1

        return jax.jit(program).lower(jax.numpy.float32(1)).compile().as_text()

    assert "first" in compiled("first")
    assert "second" in compiled("second")


def test_off_keeps_none(cache: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("LMJAX_COMPILED", "off")
    keep_programs()
    assert jax.config.values["jax_compilation_cache_dir"] is None


def test_a_directory_that_jax_was_told_stays(cache: Path, tmp_path: Path):
    jax.config.update("jax_compilation_cache_dir", str(tmp_path / "own"))
    keep_programs()
    assert jax.config.values["jax_compilation_cache_dir"] == str(tmp_path / "own")
    assert not cache.exists()


def test_a_directory_that_cannot_be_written_is_not_an_error(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    (tmp_path / "file").touch()
    monkeypatch.setenv("LMJAX_COMPILED", str(tmp_path / "file" / "below"))
    keep_programs()
    assert jax.config.values["jax_compilation_cache_dir"] is None


def test_a_program_whose_writer_was_killed_is_removed(cache: Path):
    cache.mkdir()
    for name in ("whole-cache", "whole-atime", "torn-cache"):
        (cache / name).write_bytes(b"12345678")
    keep_programs()
    assert {path.name for path in cache.iterdir()} >= {"whole-cache", "whole-atime"}
    assert not (cache / "torn-cache").exists()


@pytest.mark.long
def test_processes_share_them(cache: Path):
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    run = lambda: subprocess.Popen(
        [sys.executable, "-c", PROGRAM], env=environment, stdout=subprocess.PIPE, text=True
    )
    together = [process.communicate()[0] for process in [run() for _ in range(3)]]
    assert all(int(hits) >= 0 for hits in together)
    assert int(run().communicate()[0]) > 0
