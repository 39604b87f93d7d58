"""The command line: flags, exit codes, one clear line about bad input, JSON that is JSON."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from run_helpers import finish, home, result, start, strict_loads, tiny_flags

from experiments import quickstart
from lmjax.cli import common as cli
from lmjax.cli import verbs

__all__ = ["home"]

MODULE = "experiments.quickstart"


def experiment(*flags: str) -> int:
    """The exit code of `python -m experiments.quickstart flags`, in this process."""
    return cli.guarded(lambda: cli._run_experiment(MODULE, quickstart.config, flags))


def lmjax(*arguments: str) -> int:
    """The exit code of `python -m lmjax arguments`, in this process."""
    with pytest.raises(SystemExit) as error:
        verbs.main(arguments)
    return int(error.value.code or 0)


def with_flag(flags: Sequence[str], name: str, value: str) -> list[str]:
    """Flags with the value of one replaced."""
    at = list(flags).index(name) + 1
    return [*flags[:at], value, *flags[at + 1 :]]


def complaint(capsys: pytest.CaptureFixture[str]) -> str:
    """The one line of complaint on stderr; a note that a text is being tokenised may precede it."""
    out, err = capsys.readouterr()
    lines = [line for line in err.splitlines() if not line.startswith("lmjax: tokenising")]
    assert len(lines) == 1, err
    assert lines[0].startswith("error: ")
    assert out == ""
    return lines[0]


@pytest.fixture(scope="module")
def run(home: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run, trained from the command line."""
    workdir = tmp_path_factory.mktemp("cli") / "run"
    assert experiment(*tiny_flags(home, workdir)) == cli.DONE
    return workdir


# --- Bad input ---

BAD_FLAGS = {
    "unknown flag": ("--presicion f32", ["presicion"]),
    "unknown format": ("--precision c=f33", ["f33"]),
    "step of a phase": ("--precision '0: f32 | 1e3: bf16'", ["1e3", "character 9"]),
    "phase after the end": ("--precision '0: f32 | 40: bf16'", ["step 40", "40 steps", "--steps"]),
    "no number": ("--steps many", ["steps", "many"]),
    "negative seed": ("--seed -1", ["seed is -1", "2**64 - 1"]),
    "seed beyond 64 bits": (f"--seed {2**64}", [f"seed is {2**64}", "2**64 - 1"]),
    "no steps": ("--steps 0", ["steps is 0"]),
    "heads": ("--model.heads 3", ["model.heads is 3", "model.width 16"]),
    "positions": ("--context 32", ["context is 32", "16 positions", "--model.max-positions"]),
    "loss scale": ("--loss-scale.initial 1000", ["loss_scale.initial is 1000", "power of two"]),
    "micro-batches": ("--micro-batches 3", ["batch_size 4", "3 micro-batches"]),
    "stop after nothing": ("--stop-after 0", ["stop_after is 0"]),
    "negative sample": ("--sample -1", ["sample is -1"]),
    "infinity": ("--optimizer.clip-norm inf", ["optimizer.clip_norm is inf", "0 switches"]),
    "NaN": ("--optimizer.clip-norm nan", ["optimizer.clip_norm is nan", "finite"]),
    "NaN of a float above 0": ("--model.rope-base nan", ["model.rope_base is nan"]),
    "0 in f32": ("--optimizer.eps 1e-50", ["optimizer.eps is 1e-50", "0 in f32"]),
    "huge": ("--steps 99999999999999999999", ["steps is 99999999999999999999", "at most"]),
    "mesh": ("--mesh.tensor 3", ["mesh", "--mesh.tensor"]),
    "unknown dataset": ("--data.dataset nonsense --data.files", ["nonsense"]),
}


@pytest.mark.parametrize("name", BAD_FLAGS)
def test_bad_flags(
    name: str, home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags, words = BAD_FLAGS[name]
    workdir = tmp_path / "run"
    assert experiment(*tiny_flags(home, workdir), *shlex.split(flags)) == cli.BAD_INPUT
    line = complaint(capsys)
    assert [word for word in words if word not in line] == []
    assert not workdir.exists()


def _no_file(folder: Path) -> None:
    """A glob that matches nothing."""


def _latin_1(folder: Path) -> None:
    (folder / "a.txt").write_bytes("Façade".encode("latin-1") * 100)


def _empty(folder: Path) -> None:
    (folder / "a.txt").write_text("")


def _short(folder: Path) -> None:
    (folder / "a.txt").write_text("twelve bytes")


BAD_TEXTS: dict[str, tuple[Callable[[Path], None], list[str]]] = {
    "no file": (_no_file, ["matches no file"]),
    "not UTF-8": (_latin_1, ["a.txt is not UTF-8", "offset 2"]),
    "empty": (_empty, ["a.txt is empty"]),
    "shorter than a window": (_short, ["too short for a window of 17 tokens"]),
}


@pytest.mark.parametrize("name", BAD_TEXTS)
def test_bad_texts(
    name: str,
    home: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    write, words = BAD_TEXTS[name]
    (tmp_path / "texts").mkdir()
    write(tmp_path / "texts")
    flags = with_flag(
        tiny_flags(home, tmp_path / "run"), "--data.files", str(tmp_path / "texts" / "*.txt")
    )
    cached = sorted((home / "cache" / "tokens").glob("*"))
    assert experiment(*flags) == cli.BAD_INPUT
    line = complaint(capsys)
    assert [word for word in words if word not in line] == []
    assert not (tmp_path / "run").exists()
    assert sorted((home / "cache" / "tokens").glob("*")) == cached


@pytest.mark.parametrize("place", ["file/run", "/proc/run"])
def test_an_unwritable_directory(
    place: str, home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    assert experiment(*tiny_flags(home, tmp_path / place)) == cli.BAD_INPUT
    assert "cannot write the run directory" in complaint(capsys)
    assert (tmp_path / "file").read_text() == ""


def test_a_directory_that_holds_another_run(
    run: Path, home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    capsys.readouterr()
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    flags = [*with_flag(tiny_flags(home, run), "--steps", "50"), "--optimizer.b2", "0.5"]
    assert experiment(*flags) == cli.BAD_INPUT
    line = complaint(capsys)
    for words in ("steps is 40 there, 50 now", "optimizer.b2 is 0.99 there, 0.5 now", "--workdir"):
        assert words in line
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*")} == before


@pytest.mark.parametrize(
    ("module", "flags", "words"),
    [
        (MODULE, "--workdir run --precision c=f33", "f33"),
        (MODULE, "--workdir run --stesp 3", "stesp"),
        (MODULE, "--workdir run --data.dataset text_files --data.files none/*.txt", "no file"),
        ("lmjax", "evaluate run", "run is not a run directory"),
        ("lmjax", "frobnicate run", "frobnicate"),
    ],
)
def test_bad_input_from_another_directory(
    module: str, flags: str, words: str, home: Path, tmp_path: Path
) -> None:
    code, out, err = finish(start(module, *shlex.split(flags), cwd=tmp_path))
    assert (code, out) == (cli.BAD_INPUT, "")
    # Where importing takes long, a line has said so.
    (line,) = (line for line in err.splitlines() if not line.endswith("importing"))
    assert line.startswith("error: ")
    assert words in line
    assert list(tmp_path.iterdir()) == []


# --- Running ---


def test_help_lists_fields_defaults_and_their_meaning(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit) as error:
        experiment("--help")
    assert not error.value.code
    text = capsys.readouterr().out
    for flag in ("--workdir", "--precision", "--steps", "--stop-after", "--seed", "--mesh.fsdp"):
        assert flag in text
    assert "--optimizer.learning-rate" in text
    assert str(quickstart.config().optimizer.learning_rate) in text
    assert "Query heads." in text


@pytest.mark.long
def test_a_run_from_another_directory_stops_resumes_and_is_done(
    home: Path, tmp_path: Path, run: Path
) -> None:
    flags = tiny_flags(home, Path("run"))
    code, _, err = finish(start(MODULE, *flags, "--stop-after", "23", cwd=tmp_path))
    assert code == cli.STOPPED, err
    assert "at step 23; run the same command again to resume" in err
    code, out, err = finish(start(MODULE, *flags, "--sample", "5", cwd=tmp_path))
    assert code == cli.DONE, err
    assert "resuming run at step 23" in err
    assert "A sample:" in out
    assert out.rstrip().endswith("everything is in run")
    assert list(tmp_path.iterdir()) == [tmp_path / "run"]
    assert result(tmp_path / "run")["parameters_sha256"] == result(run)["parameters_sha256"]


def test_a_finished_run_is_done_again(
    run: Path, home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = (run / "result.json").read_bytes()
    assert experiment(*tiny_flags(home, run)) == cli.DONE
    assert f"{result(run)['eval_loss']:.4f} nats per token" in capsys.readouterr().out
    assert (run / "result.json").read_bytes() == before


def test_failed_training_and_foreign_checkpoints_exit_1(
    capsys: pytest.CaptureFixture[str],
) -> None:
    from lmjax.errors import CheckpointError, StorageFailed, TrainingFailed

    for kind in (TrainingFailed, CheckpointError, StorageFailed):

        def fail(kind: type[Exception] = kind) -> int:
            raise kind("says why")

        assert cli.guarded(fail) == cli.FAILED
        assert complaint(capsys) == "error: says why"


# --- Verbs ---


def printed_json(capsys: pytest.CaptureFixture[str]) -> Any:
    """The JSON on stdout, read as strictly as JSON is defined."""
    return strict_loads(capsys.readouterr().out)


def test_verbs_print_strict_json(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    assert lmjax("evaluate", str(run), "--json") == cli.DONE
    evaluated = printed_json(capsys)
    assert evaluated["eval_loss"] == result(run)["eval_loss"]
    assert evaluated["step"] == 40

    assert lmjax("score", str(run), "--text", "the dog", "--json") == cli.DONE
    scored = printed_json(capsys)
    assert [token["token"] for token in scored["per_token"]] == list("the dog")
    total = sum(token["log_probability"] for token in scored["per_token"])
    assert scored["log_probability"] == pytest.approx(total, abs=1e-9)

    arguments = ("generate", str(run), "--prompt", "the", "--tokens", "4", "--json")
    assert lmjax(*arguments) == cli.DONE
    generated = printed_json(capsys)
    assert (generated["prompt"], generated["step"]) == ("the", 40)

    assert lmjax("sites", MODULE, "--precision", "mixed_bf16", "--json") == cli.DONE
    head = printed_json(capsys)["head"]
    assert (head["p"], head["c"], head["o"], head["w"]) == ("f32", "bf16", "f32", "bf16")


def test_sites_say_which_products_are_native(capsys: pytest.CaptureFixture[str]) -> None:
    policy = "f32; blocks/0/mlp/up: g=mxfp8"
    assert lmjax("sites", MODULE, "--precision", policy, "--json") == cli.DONE
    sites = printed_json(capsys)
    assert sites["head"]["products"] == {"y": "native", "dx": "native", "dw": "native"}
    emulated = {"y": "native", "dx": "emulated in f32", "dw": "emulated in f32"}
    assert sites["blocks/0/mlp/up"]["products"] == emulated
    assert "products" not in sites["embed"]
    assert lmjax("sites", MODULE, "--precision", policy) == cli.DONE
    header, *lines = capsys.readouterr().out.splitlines()
    assert header.rstrip().endswith("products on cpu")
    (up,) = (line for line in lines if line.startswith("blocks/0/mlp/up "))
    assert up.rstrip().endswith("y native, dx emulated in f32, dw emulated in f32")


def test_sites_of_a_policy_with_phases_are_shown_phase_by_phase(
    capsys: pytest.CaptureFixture[str],
) -> None:
    policy = "0: mixed_bf16 | 100: f32"
    assert lmjax("sites", MODULE, "--precision", policy, "--json") == cli.DONE
    phases = printed_json(capsys)
    assert {start: phase["head"]["c"] for start, phase in phases.items()} == {
        "0": "bf16",
        "100": "f32",
    }
    assert lmjax("sites", MODULE, "--precision", policy) == cli.DONE
    lines = capsys.readouterr().out.splitlines()
    headings = [index for index, line in enumerate(lines) if line.startswith("from step ")]
    assert [lines[index] for index in headings] == [
        "from step 0 on: p=f32,c=bf16,o=f32",
        "from step 100 on: p=f32,c=f32,o=f32",
    ]
    heads = [index for index, line in enumerate(lines) if line.startswith("head ")]
    assert headings[0] < heads[0] < headings[1] < heads[1]
    assert [lines[index].split()[1] for index in heads] == ["bf16", "native"]
    assert lines[-1].startswith("in every site: p f32, c f32, o f32")
    assert lmjax("sites", MODULE) == cli.DONE
    assert "from step" not in capsys.readouterr().out


def test_non_finite_results_are_strict_json(
    run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    capsys.readouterr()
    module = sys.modules["lmjax.inference.evaluate"]  # the name is taken by the function in it
    monkeypatch.setattr(module, "held_out_loss", lambda *_, **__: 1e4)
    assert lmjax("evaluate", str(run), "--json") == cli.DONE
    assert printed_json(capsys)["perplexity"] == "inf"


def test_the_table_of_a_score(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    assert lmjax("score", str(run), "--text", "dog") == cli.DONE
    out = capsys.readouterr().out
    assert [line.split()[0] for line in out.splitlines()[1:4]] == ["'d'", "'o'", "'g'"]
    assert "over 3 tokens" in out


def test_every_verb_has_help(capsys: pytest.CaptureFixture[str]) -> None:
    for verb in ("generate", "score", "evaluate", "prepare", "sites", "plan"):
        assert lmjax(verb, "--help") == 0
        assert f"lmjax {verb}" in capsys.readouterr().out


BAD_CALLS = {
    "no run": ("evaluate {tmp}/none", "is not a run directory"),
    "empty directory": ("evaluate {tmp}", "is not a run directory"),
    "empty text": ("score {run} --text ''", "no text to score"),
    "unknown format": ("evaluate {run} --precision c=f33", "f33"),
    "negative": ("generate {run} --temperature -1", "temperature is -1.0"),
    "no experiment": ("sites experiments.nonsense", "no experiment 'experiments.nonsense'"),
    "batch": (
        "plan experiments.quickstart --batch-size 12",
        "12 rows cannot be divided among 8",
    ),
    "no config": ("sites json", "json is not an experiment"),
    "unknown flag": ("evaluate {run} --josn", "josn"),
}


@pytest.mark.parametrize("name", BAD_CALLS)
def test_bad_calls(
    name: str, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    capsys.readouterr()
    arguments, words = BAD_CALLS[name]
    assert lmjax(*shlex.split(arguments.format(run=run, tmp=tmp_path))) == cli.BAD_INPUT
    assert words in complaint(capsys)
    assert list(tmp_path.iterdir()) == []


def test_a_damaged_run(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    (tmp_path / "config.json").write_text("[1]")
    assert lmjax("evaluate", str(tmp_path)) == cli.BAD_INPUT
    assert "is damaged" in complaint(capsys)
    (tmp_path / "config.json").write_bytes((run / "config.json").read_bytes())
    assert lmjax("generate", str(tmp_path)) == cli.BAD_INPUT
    assert "has no checkpoint yet" in complaint(capsys)


def test_formats_prints_a_table_and_draws_the_number_lines(tmp_path, capsys):
    picture = tmp_path / "formats.png"
    assert verbs.formats(("e4m3", "bf16"), plot=picture, json=True) == cli.DONE
    e4m3, bf16 = strict_loads(capsys.readouterr().out)
    assert (e4m3["largest"], e4m3["infinity"], bf16["bits"]) == (448.0, False, 16)
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert verbs.formats(("e4m3",)) == cli.DONE
    assert "448" in capsys.readouterr().out


def test_formats_refuses_what_is_none(tmp_path):
    with pytest.raises(verbs.InputError, match="e9m9"):
        verbs.formats(("e9m9",))
    with pytest.raises(verbs.InputError, match="cannot write"):
        verbs.formats(("e4m3",), plot=tmp_path / "missing" / "x.png")


def test_plan_shows_arrays_collectives_and_memory(capsys: pytest.CaptureFixture[str]) -> None:
    flags = "--devices 4 --mesh.data 1 --mesh.fsdp 4 --precision p=f32,c=f16,r=bf16 --json"
    assert lmjax("plan", MODULE, *flags.split()) == cli.DONE
    plan = printed_json(capsys)
    assert plan["mesh"] == {"data": 1, "fsdp": 4, "tensor": 1, "sequence": 1}
    sent = {(row["purpose"], row["kind"]): row for row in plan["collectives"]}
    weights, gradients = sent["parameters", "all-gather"], sent["gradients", "reduce-scatter"]
    assert weights["dtype"] == "f16"
    assert weights["ratio"] == pytest.approx(1, rel=0.05)
    assert (gradients["dtype"], gradients["ratio"]) == ("bf16", 1)
    (up,) = (a for a in plan["arrays"] if a["path"] == "blocks/mlp/up/kernel")
    assert up["bytes"] == 4 * 128 * 512 * 4 // 4
    assert plan["memory"]["compiled"]["arguments"] > sum(a["bytes"] for a in plan["arrays"])


def test_the_old_name_of_plan_still_works_and_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    assert lmjax("sharding", "experiments.nothing") == cli.BAD_INPUT
    note, error = capsys.readouterr().err.splitlines()
    assert note == "note: the verb sharding is now called plan"
    assert "experiments.nothing" in error


def test_the_audit_refuses_programs_and_modules_that_do_not_exist(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    page = tmp_path / "audit.html"
    with pytest.raises(verbs.InputError, match="there are train, evaluate, decode"):
        verbs.audit("experiments.quickstart", program=("teach",), html=page)
    with pytest.raises(verbs.InputError, match="no experiment"):
        verbs.audit("experiments.nothing")
    assert not page.exists()
    rule = "f32; **/softmax: c=bf16"
    found = verbs.audit("experiments.quickstart", precision=rule, program=("decode",), html=page)
    assert found == cli.DONE
    assert "decode: pass" in capsys.readouterr().out
    assert "blocks/0-3/attention" in page.read_text("utf-8")
