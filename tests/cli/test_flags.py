"""Flags: mistyped ones, help, files of settings, scripts anywhere, and resuming without any."""

from __future__ import annotations

import json
import os
import pty
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from run_helpers import ROOT, home, result, rows, tiny_flags

from experiments import quickstart
from lmjax.cli import common as cli
from lmjax.cli import flags, verbs
from lmjax.cli.flags import reopened
from lmjax.runs.config import from_json, to_json
from lmjax.train import Config, read_config

__all__ = ["home"]

KNOWN = flags.known_flags(cli.TrainFlags)


def experiment(*arguments: str) -> int:
    return cli.guarded(
        lambda: cli._run_experiment("experiments.quickstart", quickstart.config, arguments)
    )


def lmjax(*arguments: str) -> int:
    with pytest.raises(SystemExit) as error:
        verbs.main(arguments)
    return int(error.value.code or 0)


def config_of(arguments: list[str]) -> Config:
    """The config that the quickstart would train with these arguments."""
    default = cli.TrainFlags(config=quickstart.config(), workdir="run")
    arguments = flags.with_file(arguments)
    return flags.parsed(cli.TrainFlags, arguments, default=default, command="").config


# --- Unknown flags


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("optimizer.lr", "optimizer.learning-rate"),
        ("lr", "optimizer.learning-rate"),
        ("learning_rate", "optimizer.learning-rate"),
        ("optimizer.seed", "seed"),
        ("bs", "batch-size"),
        ("wd", "optimizer.weight-decay"),
        ("dropout", "model.dropout"),
        ("n_layers", "model.layers"),
        ("d-model", "model.width"),
        ("optimizer.wamrup-steps", "optimizer.warmup-steps"),
        ("optimizer.beta2", "optimizer.b2"),
        ("max-grad-norm", "optimizer.clip-norm"),
        ("presicion", "precision"),
        ("stesp", "steps"),
        ("epochs", "steps"),
        ("save-every", "checkpoint.every"),
        ("dataset", "data.dataset"),
        ("fsdp", "mesh.fsdp"),
        ("model.no-bais", "model.no-bias"),
        ("qqqqqqqq", None),
    ],
)
def test_the_flag_that_is_meant_is_named(typed: str, meant: str | None) -> None:
    assert flags.suggested(typed.replace("_", "-"), KNOWN) == meant


def test_every_known_flag_is_accepted_and_every_alias_leads_to_one() -> None:
    flags.refuse_unknown([f"--{flag}" for flag in KNOWN], KNOWN)
    assert {flags.suggested(alias, KNOWN) for alias in flags.ALIASES} <= set(KNOWN)


@pytest.mark.parametrize("columns", [40, 80, 200])
@pytest.mark.parametrize(
    ("flag", "said"),
    [
        (
            "--optimizer.lr 3",
            "unknown flag --optimizer.lr; did you mean --optimizer.learning-rate?",
        ),
        ("--steps many", "--steps: 'many' is not a whole number"),
    ],
)
def test_a_terminal_shows_one_clean_line(
    columns: int, flag: str, said: str, tmp_path: Path
) -> None:
    leader, follower = pty.openpty()
    with subprocess.Popen(
        [sys.executable, "-m", "experiments.quickstart", *flag.split()],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": str(columns), "TERM": "xterm"},
        stdout=follower,
        stderr=follower,
    ) as process:
        os.close(follower)
        shown = b""
        try:
            while part := os.read(leader, 4096):
                shown += part
        except OSError:  # the other end is closed
            pass
    os.close(leader)
    left = re.sub(r"[^\r\n]*\r\x1b\[K", "", shown.decode())  # a live line is erased in the end
    assert process.returncode == cli.BAD_INPUT
    assert left.split("\r\n") == [f"error: {said}", ""]
    assert list(tmp_path.iterdir()) == []


def test_a_flag_of_a_verb_is_suggested_too(capsys: pytest.CaptureFixture[str]) -> None:
    assert lmjax("generate", "run", "--top_kk", "3") == cli.BAD_INPUT
    assert "did you mean --top-k?" in capsys.readouterr().err


# --- Help


def test_help_keeps_tables_and_fills_paragraphs() -> None:
    text = "A title that is\nfilled.\n\nCommand:   python -m x\nTime:      1 minute\n\nMore\nprose."
    assert flags.laid_out(text, 80) == (
        "A title that is filled.\n\nCommand:   python -m x\nTime:      1 minute\n\nMore prose.\n"
    )
    narrow = flags.laid_out("Time:      one minute or perhaps two of them", 30)
    assert narrow == "Time:      one minute or\n           perhaps two of them\n"


@pytest.mark.parametrize("columns", ["80", "120"])
def test_the_docstring_of_an_experiment_is_printed_as_it_is_laid_out(
    columns: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", columns)
    monkeypatch.setattr(sys.modules["__main__"], "__doc__", quickstart.__doc__)
    with pytest.raises(SystemExit):
        experiment("--help")
    out = capsys.readouterr().out
    assert "\nCommand:   python -m experiments.quickstart\nHardware:  2 CPU cores\nTime: " in out
    assert out.index("First contact") < out.index("usage:")


def test_a_reader_that_leaves_gets_no_traceback(tmp_path: Path) -> None:
    command = f"{sys.executable} -m experiments.quickstart --help | head -1"
    done = subprocess.run(
        command,
        shell=True,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout.startswith("First contact")
    assert "Traceback" not in done.stderr
    assert "Broken" not in done.stderr


# --- Scripts


def test_a_copy_of_an_experiment_runs_from_anywhere(home: Path, tmp_path: Path) -> None:
    script = tmp_path / "my folder" / "my_exp.py"
    script.parent.mkdir()
    shutil.copy(quickstart.__file__, script)
    arguments = [sys.executable, script, *tiny_flags(home, Path("unused"))[2:], "--stop-after", "2"]
    done = subprocess.run(
        arguments,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == cli.STOPPED, done.stderr
    assert (tmp_path / "runs" / "my_exp" / "config.json").exists()


# --- Files of settings


def written(path: Path, values: Any) -> str:
    path.write_text(json.dumps(values))
    return str(path)


def test_flags_override_a_file_which_overrides_the_experiment(tmp_path: Path) -> None:
    file = written(tmp_path / "f.json", {"steps": 7, "optimizer": {"b2": 0.5, "no_decay": []}})
    config = config_of(["--steps", "9", "--config", file])
    assert (config.steps, config.optimizer.b2, config.optimizer.no_decay) == (9, 0.5, ())
    assert config.optimizer.learning_rate == quickstart.config().optimizer.learning_rate
    assert config_of([f"--config={file}"]).steps == 7


def test_what_is_valid_only_together_with_flags_is_accepted(tmp_path: Path) -> None:
    file = written(tmp_path / "f.json", {"context": 512, "model": {"bias": False}})
    assert config_of(["--config", file, "--model.max-positions", "512"]).context == 512


def test_the_record_of_a_run_is_that_run_and_follows_its_flags(tmp_path: Path, tiny: Any) -> None:
    config = tiny("mixed_f16", "llama", optimizer={"no_decay": ("**/a b", "c")}).resolved()
    file = written(tmp_path / "config.json", {"version": 1, **to_json(config)})
    assert config_of(["--config", file]).resolved() == config
    assert config_of(["--config", str(tmp_path)]).resolved() == config
    wide = config_of(["--config", file, "--precision", "f32"]).resolved()
    assert (wide.loss_scale.kind, config.loss_scale.kind) == ("none", "dynamic")


def test_reopening_undoes_resolving(tiny: Any) -> None:
    for config in (tiny("mixed_f16"), tiny("f32", "llama"), quickstart.config()):
        assert reopened(config.resolved()).resolved() == config.resolved()
        assert reopened(config.resolved()).model.head_width == 0
        assert reopened(from_json(to_json(config.resolved()))).loss_scale.kind == "auto"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "Expecting"),
        ("[]", "does not hold an object"),
        ('{"stesp": 3}', "unknown config field stesp; did you mean 'steps'?"),
        ('{"model": {"widht": 3}}', "unknown config field model.widht"),
        ('{"model": 3}', "unknown config field model"),
        ('{"steps": null}', "steps is None"),
        ('{"steps": NaN}', "NaN is not JSON"),
        ('{"steps": 0}', "steps is 0"),
        ('{"model": {"bias": "no"}}', "model.bias is 'no'; it must be true or false"),
        ('{"version": 99}', "version is 99"),
    ],
)
def test_a_file_that_does_not_fit_is_one_line(
    text: str, words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "f.json").write_text(text)
    run = tmp_path / "run"
    code = experiment("--workdir", str(run), "--config", str(tmp_path / "f.json"))
    err = capsys.readouterr().err
    assert code == cli.BAD_INPUT
    assert words in err
    assert len(err.splitlines()) == 1
    assert not run.exists()


def test_a_file_that_is_not_there(capsys: pytest.CaptureFixture[str]) -> None:
    assert experiment("--config", "none.json") == cli.BAD_INPUT
    assert "--config none.json: cannot be read" in capsys.readouterr().err


# --- Resuming


def test_a_run_resumes_without_its_flags(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole, run = tmp_path / "whole", tmp_path / "run"
    arguments = tiny_flags(home, run, steps=8)
    assert experiment(*tiny_flags(home, whole, steps=8)) == cli.DONE
    assert experiment(*arguments, "--stop-after", "3") == cli.STOPPED
    assert lmjax("resume", str(run), "--stop-after", "2", "--log-every", "1") == cli.STOPPED
    assert read_config(run).log_every == 1
    assert [row["step"] for row in rows(run)][-1] == 5
    capsys.readouterr()
    assert lmjax("resume", str(run), "--sample", "0") == cli.DONE
    assert result(run)["parameters_sha256"] == result(whole)["parameters_sha256"]
    capsys.readouterr()
    assert lmjax("resume", str(run)) == cli.DONE
    assert f"{run} is finished: held-out loss" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("", "name the run directory first"),
        ("none", "none"),
        ("{run} --seed 3", "seed is 0 there, 3 now"),
        ("{run} --stop_aftr 3", "did you mean --stop-after?"),
        ("{run} --workdir other", "leave out --workdir"),
    ],
)
def test_what_cannot_be_resumed_is_one_line(
    arguments: str, words: str, home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    assert experiment(*tiny_flags(home, run), "--stop-after", "1") == cli.STOPPED
    capsys.readouterr()
    assert lmjax("resume", *arguments.format(run=run).split()) == cli.BAD_INPUT
    err = capsys.readouterr().err
    assert words in err
    assert len(err.splitlines()) == 1
