"""Runs whose directories and files have any name: they work, or are refused with a line and 2."""

from __future__ import annotations

import io
import shutil
import sys
from pathlib import Path

import pytest
from run_helpers import NAMES, home, result, tiny_flags

from experiments import quickstart
from lmjax.cli import common as cli
from lmjax.cli import verbs

__all__ = ["home"]

ALL_AT_ONCE = "-b[1]{0}*? \\ '\"%s $1_$ ~\n\x1b[31m привет"


def launch(*flags: object) -> int:
    """The exit code of `python -m experiments.quickstart` with these flags, in this process."""
    arguments = [str(flag) for flag in flags]
    return cli.guarded(
        lambda: cli._run_experiment("experiments.quickstart", quickstart.config, arguments)
    )


def verb(*arguments: object) -> int:
    """The exit code of `python -m lmjax` with these arguments, in this process."""
    with pytest.raises(SystemExit) as ended:
        verbs.main([str(argument) for argument in arguments])
    code = ended.value.code
    return code if isinstance(code, int) else 0


@pytest.mark.parametrize(
    "name",
    [
        ALL_AT_ONCE,
        "caf\udce9",
        *(pytest.param(name, marks=pytest.mark.long) for name in NAMES if name != "caf\udce9"),
    ],
)
def test_everything_of_a_run_may_have_any_name(
    name: str, home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    texts = tmp_path / "t" / name
    shutil.copytree(home / "texts", texts)
    (texts / "00.txt").rename(texts / f"{name}.txt")
    place = ["--workdir", tmp_path / "r" / name, "--data.cache-dir", tmp_path / "c" / name]
    files = ["--data.files", *sorted(texts.iterdir())]
    flags = [*tiny_flags(home, tmp_path, steps=4), *place, *files]
    assert launch(*flags, "--stop-after", 2) == cli.STOPPED
    assert launch(*flags, "--sample", 3) == cli.DONE
    run = tmp_path / "r" / name
    assert (run / "curves.png").stat().st_size
    assert result(run)["steps"] == 4
    assert verb("generate", run, "--tokens", 2) == cli.DONE
    assert verb("report", run, "--out", tmp_path / "o" / name) == cli.DONE
    assert (tmp_path / "o" / name / "report.html").exists()
    assert "could not draw" not in capsys.readouterr().err


def test_home_is_meant_by_a_tilde_in_every_path(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    shutil.copytree(home / "texts", tmp_path / "texts")
    flags = [*tiny_flags(home, tmp_path, steps=2), "--data.files", "~/texts/*.txt"]
    assert launch(*flags, "--workdir", "~/run", "--data.cache-dir", "~/cache") == cli.DONE
    assert (tmp_path / "cache").is_dir()
    assert verb("generate", "~/run", "--tokens", 1) == cli.DONE
    assert verb("report", "~/run", "--out", "~/out") == cli.DONE
    assert (tmp_path / "out" / "report.html").exists()
    assert verb("formats", "e4m3", "--plot", "~/plot.png") == cli.DONE
    assert (tmp_path / "plot.png").stat().st_size
    # A directory of this name, made and used again, and no part of the home directory.
    assert launch(*flags, "--workdir", "./~", "--data.cache-dir", "~/cache") == cli.DONE
    assert (tmp_path / "~" / "result.json").exists()
    assert verb("generate", "./~", "--tokens", 1) == cli.DONE


@pytest.mark.long
def test_decoration_that_fails_leaves_a_finished_run_finished(
    home: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def fail(*arguments: object, **options: object) -> None:
        raise RuntimeError("no\nfonts")

    monkeypatch.setattr("lmjax.train.records.draw_curves", fail)
    monkeypatch.setattr("lmjax.train.records.draw_telemetry", fail)
    monkeypatch.setattr("lmjax.cli.common.generate_text", fail)
    monkeypatch.setattr("lmjax.runs.metrics._EventFile.add", fail)
    flags = [*tiny_flags(home, tmp_path / "run", steps=2), "--telemetry.every", 1, "--sample", 3]
    assert launch(*flags) == cli.DONE
    said = capsys.readouterr().err
    for what in ("curves.png", "telemetry.png", "a sample", "TensorBoard's curves"):
        # TensorBoard's is said once by each of the two that write rows: the loop and the result.
        assert said.count(f"warning: could not draw {what}: no\\nfonts") in (1, 2)
    assert result(tmp_path / "run")["steps"] == 2


def test_a_sample_that_the_terminal_cannot_encode_is_shown_in_escapes(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lmjax.cli.common.generate_text", lambda *_, **__: "Жизнь")
    terminal = io.TextIOWrapper(io.BytesIO(), encoding="cp1252")
    monkeypatch.setattr(sys, "stdout", terminal)
    flags = [*tiny_flags(home, tmp_path / "run", steps=2), "--sample", 3]
    assert launch(*flags) == cli.DONE
    assert b"\\u0416" in terminal.buffer.getvalue()  # type: ignore[attr-defined]


def test_a_picture_that_cannot_be_drawn_leaves_no_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert verb("formats", "e4m3", "--plot", tmp_path / "x.foo") == cli.BAD_INPUT
    assert "Format 'foo' is not supported" in capsys.readouterr().err
    assert not (tmp_path / "x.foo").exists()
    (tmp_path / "mine.foo").write_text("mine")
    assert verb("formats", "e4m3", "--plot", tmp_path / "mine.foo") == cli.BAD_INPUT
    assert (tmp_path / "mine.foo").read_text() == "mine"
