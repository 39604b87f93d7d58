"""Claims and the command that replays them: what is refused, printed, recorded, and returned."""

from __future__ import annotations

import dataclasses
import html
import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
import pytest
from ablation_helpers import finished, write_run
from run_helpers import strict_loads

from lmjax.ablation import claims
from lmjax.ablation.account import NO_ROWS, NOT_HERE
from lmjax.ablation.claims import Claim, PaperRow, judge, load_claims, together
from lmjax.ablation.evidence import Evidence, Finding, Margin
from lmjax.ablation.grid import Ablation
from lmjax.ablation.runner import AblationError
from lmjax.ablation.statistics import smallest_detectable
from lmjax.cli import claims as reproduce
from lmjax.cli import common as cli
from lmjax.cli import verbs
from lmjax.train import Config, InputError

YES = Finding("it holds", "1", "confirmed")
NO = Finding("it fails", "2 | 3", "refuted")
OPEN = Finding("it may", "no runs", "undecided")


def ablation(name: str = "example") -> Ablation:
    """Two policies, two seeds."""
    base = Config(steps=10)
    return Ablation(
        name=name,
        question="Does it matter?",
        base=base,
        arms={"f32": base, "bf16": dataclasses.replace(base, precision="bf16")},
        varies=("precision",),
        control="f32",
        seeds=(0, 1),
    )


def claim(*findings: Finding, name: str = "example", **changes: Any) -> Claim:
    """A claim of arithmetic with those findings."""
    values = {
        "number": "A1",
        "name": name,
        "title": f"{name} works",
        "statement": "It works everywhere.",
        "source": "Somebody 2020, arXiv 2001.00001",
        "paper": (PaperRow("nets | all", "1.0"), PaperRow("one", "2.0")),
        "scope": "larger models",
        "judge": lambda evidence: iter(findings),
        "ablation": None,
        "large": ablation(name),
        "hardware": "8 GPUs",
    }
    return Claim(**values | changes)


@pytest.fixture
def known(monkeypatch: pytest.MonkeyPatch) -> Any:
    """`known(claims...)`: the command knows these claims and no others."""

    def only(*those: Claim) -> None:
        monkeypatch.setattr(reproduce, "load_claims", lambda package: {c.name: c for c in those})

    return only


def lmjax(*arguments: str) -> int:
    """The exit code of `python -m lmjax reproduce`, in this process."""
    with pytest.raises(SystemExit) as ended:
        verbs.main(("reproduce", *arguments))
    return ended.value.code or cli.DONE


# --- Claims ---


@pytest.mark.parametrize("field", ["ablation", "large"])
def test_an_ablation_of_another_name_is_refused(field: str) -> None:
    with pytest.raises(ValueError, match="claim example has an ablation named other"):
        claim(YES, **{field: ablation("other")})


@pytest.mark.parametrize(
    ("outcomes", "whole"),
    [
        (("confirmed", "confirmed"), "confirmed"),
        (("confirmed", "undecided"), "undecided"),
        (("undecided", "refuted", "confirmed"), "refuted"),
    ],
)
def test_outcomes_together(outcomes: Iterable[Any], whole: str) -> None:
    assert together(outcomes) == whole
    findings = [Finding(str(i), "", outcome) for i, outcome in enumerate(outcomes)]
    assert judge(claim(*findings), Evidence()).outcome == whole


@pytest.mark.parametrize("findings", [(), (YES, OPEN, YES._replace(outcome="refuted"))])
def test_no_findings_and_sentences_that_stand_twice_are_refused(findings: Any) -> None:
    with pytest.raises(ValueError, match="claim example has findings"):
        judge(claim(*findings), Evidence())


def test_a_margin_without_a_reason_and_a_row_about_nothing_are_refused() -> None:
    with pytest.raises(ValueError, match="say why 'it holds' has this margin"):
        judge(claim(YES._replace(asked="above 0")), Evidence())
    paper = (PaperRow("one", "2.0", ("bf16",)),)
    with pytest.raises(ValueError, match="no finding is about bf16"):
        judge(claim(YES, paper=paper), Evidence())
    assert judge(claim(YES._replace(about="bf16"), paper=paper), Evidence()).outcome == "confirmed"


def test_claims_are_in_the_order_of_their_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ten comes after two; modules without a claim are left out."""
    modules = {
        "package.ten": SimpleNamespace(claim=lambda: claim(YES, name="ten", number="A10")),
        "package.helper": SimpleNamespace(),
        "package.two": SimpleNamespace(claim=lambda: claim(YES, name="two", number="A2")),
    }
    package = SimpleNamespace(__path__=[])
    monkeypatch.setattr(claims.importlib, "import_module", lambda name: modules.get(name, package))
    infos = [SimpleNamespace(name=name.rpartition(".")[2]) for name in modules]
    monkeypatch.setattr(claims.pkgutil, "iter_modules", lambda path: infos)
    assert list(load_claims("package")) == ["two", "ten"]


# --- Choosing ---


def test_choosing_by_name_by_number_and_in_bulk(known: Any) -> None:
    first = claim(YES, name="first", number="A1", quick=True)
    second = claim(YES, name="second", number="A12")
    known(first, second)
    assert reproduce.choose(["second", "a1"]) == [second, first]
    assert reproduce.choose(["A12", "second"]) == [second]
    assert reproduce.choose([], everything=True) == [first, second]
    assert reproduce.choose([], quick=True) == [first]
    with pytest.raises(InputError, match="no claim is called 'third'; there are first, second"):
        reproduce.choose(["first", "third"])
    for asked, everything, quick in ((["A1"], True, False), (["A1"], False, True), ([], 1, 1)):
        with pytest.raises(InputError, match="either names of claims, or --all, or --quick"):
            reproduce.choose(asked, everything=everything, quick=quick)


def test_what_is_not_installed_is_left_out_of_all_and_refused_by_name(
    known: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    here = claim(YES, name="here", number="A1")
    known(here, claim(YES, name="away", number="A2", needs="pip install words"))
    assert reproduce.choose([], everything=True) == [here]
    assert capsys.readouterr().err == "left out: away, which needs: pip install words\n"
    assert reproduce.choose(["here"]) == [here]
    with pytest.raises(InputError, match="away needs what is not installed: pip install words"):
        reproduce.choose(["A2"])


# --- The command ---


def test_without_arguments_it_lists_what_there_is(
    known: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    known(claim(YES, quick=True), claim(YES, name="other", number="A2", ablation=ablation("other")))
    assert lmjax() == cli.DONE
    out = capsys.readouterr().out
    lines = out.splitlines()
    first, other = lines[1].split(), lines[2].split()
    assert (first[:2], other[:2]) == (["example", "A1"], ["other", "A2"]), "names come first"
    assert {"none", "yes"} <= set(first)
    assert "2 arms x 2 seeds" in lines[2]
    assert "example works" in out
    assert "Somebody 2020, arXiv 2001.00001" in out
    assert lmjax("--json") == cli.DONE
    listed = strict_loads(capsys.readouterr().out)
    assert [one["name"] for one in listed] == ["example", "other"]
    assert listed[0]["paper"][0] == {"setting": "nets | all", "result": "1.0", "here": []}
    assert listed[0]["hardware_for_large"] == "8 GPUs"


def test_the_real_claims_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert lmjax("--json") == cli.DONE
    names = [one["name"] for one in strict_loads(capsys.readouterr().out)]
    assert names == list(load_claims(reproduce.CLAIMS))
    assert {"loss_scaling", "bf16_weights", "accumulation"} <= set(names)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("third",), "no claim is called 'third'"),
        (("example", "--all"), "either names"),
        (("example", "--seeds", "0-2"), "'0-2'"),
        (("example", "other", "--seeds", "1,1"), "seeds are (1, 1)"),
        (("other", "--processes", "0"), "processes is 0"),
    ],
)
def test_bad_input_exits_2_and_writes_nothing(
    arguments: tuple[str, ...],
    words: str,
    known: Any,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    known(claim(YES), claim(YES, name="other", number="A2", ablation=ablation("other")))
    workdir = tmp_path / "claims"
    assert lmjax(*arguments, "--workdir", str(workdir)) == cli.BAD_INPUT
    err = capsys.readouterr().err.splitlines()
    assert len(err) == 1
    assert err[0].startswith("error: ")
    assert words in err[0]
    assert not workdir.exists()


def test_a_claim_of_arithmetic_from_end_to_end(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert lmjax("accumulation", "--workdir", str(tmp_path)) == cli.DONE
    out = capsys.readouterr().out
    assert "A8 accumulation: confirmed" in out
    assert "(Wang et al. 2018, arXiv 1812.08011, section 2.3)" in out
    record = strict_loads((tmp_path / "accumulation" / "claim.json").read_text("utf-8"))
    assert record["outcome"] == "confirmed"
    assert len(record["findings"]) == 4
    for finding in record["findings"]:
        assert finding["outcome"] == "confirmed"
        assert finding["statement"] in out
        assert finding["found"] in out
    assert not (tmp_path / "runs").exists()
    # Nothing is quoted that could not be checked; the processor and jax are those of this process.
    page = (tmp_path / "accumulation" / "report.html").read_text("utf-8")
    for text in (out, page, (tmp_path / "claims.md").read_text("utf-8")):
        assert NO_ROWS in text
        assert "Arithmetic on random numbers says nothing about training" in text
        assert f"jax {jax.__version__}" in text
        assert "none; arithmetic alone" in text


@pytest.mark.parametrize(
    ("findings", "code"), [((YES,), cli.DONE), ((YES, NO), cli.FAILED), ((YES, OPEN), cli.FAILED)]
)
def test_the_exit_code_says_whether_all_were_confirmed(
    findings: tuple[Finding, ...], code: int, known: Any, tmp_path: Path
) -> None:
    known(claim(YES), claim(*findings, name="other", number="A2"))
    assert lmjax("--all", "--workdir", str(tmp_path)) == code


def test_json_is_what_is_recorded(
    known: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    known(claim(YES), claim(NO, OPEN, name="other", number="A2"))
    assert lmjax("other", "example", "--json", "--workdir", str(tmp_path)) == cli.FAILED
    printed = strict_loads(capsys.readouterr().out)
    assert [one["outcome"] for one in printed] == ["refuted", "confirmed"]
    assert printed[0]["findings"] == [NO._asdict(), OPEN._asdict()]
    for one in printed:
        recorded = (tmp_path / one["name"] / "claim.json").read_text("utf-8")
        assert strict_loads(recorded) == one


def test_a_summary_follows_several_claims(
    known: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    known(claim(YES), claim(NO, OPEN, YES, name="other", number="A2"))
    assert lmjax("--all", "--workdir", str(tmp_path)) == cli.FAILED
    last = capsys.readouterr().out.splitlines()[-2:]
    assert last[0].split() == ["example", "confirmed", "1", "0", "0", "example", "works"]
    assert last[1].split() == ["other", "refuted", "1", "1", "1", "other", "works"]


def test_the_table_has_every_judgement_in_the_directory(known: Any, tmp_path: Path) -> None:
    """Also those of earlier commands, in the order of numbers, and each as it was judged last."""
    tenth = claim(OPEN, name="tenth", number="A10")
    second = claim(YES, NO, name="second", number="A2")
    known(tenth, second)
    lmjax("tenth", "--workdir", str(tmp_path))
    (tmp_path / "second").mkdir()
    (tmp_path / "second" / "report.html").write_text("")
    lmjax("second", "--workdir", str(tmp_path))
    lines = (tmp_path / "claims.md").read_text("utf-8").splitlines()
    assert lines[2:6] == [
        "|  | claim | outcome |",
        "| --- | --- | --- |",
        "| A2 | [second works](second/report.html) | refuted |",
        "| A10 | [tenth works](tenth/report.html) | undecided |",
    ]
    assert "| refuted | it fails | 2 \\| 3 | exact |" in lines
    assert lines.count(f"| nets \\| all | 1.0 | {NOT_HERE} |") == 2
    known(claim(YES, name="tenth", number="A10"))
    lmjax("tenth", "--workdir", str(tmp_path))
    text = (tmp_path / "claims.md").read_text("utf-8")
    assert "| A10 | [tenth works](tenth/report.html) | confirmed |" in text


def test_the_table_has_records_of_earlier_versions(known: Any, tmp_path: Path) -> None:
    old = {
        **{"number": "A3", "name": "old", "title": "old works", "statement": "It did."},
        **{"source": "Somebody", "outcome": "confirmed", "quick": False},
        "paper": [{"setting": "one", "result": "2.0"}],
        "findings": [{"statement": "it holds", "found": "1", "outcome": "confirmed"}],
    }
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "claim.json").write_text(json.dumps(old))
    known(claim(YES))
    assert lmjax("example", "--workdir", str(tmp_path)) == cli.DONE
    text = (tmp_path / "claims.md").read_text("utf-8")
    assert "| A3 | old works | confirmed |" in text
    assert "| confirmed | it holds | 1 | exact |" in text


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Ablation, Path]]:
    """What was run and where; every run ends at once with a loss of its seed, worse in bf16."""
    calls: list[tuple[Ablation, Path]] = []

    def run_each(ablations: Sequence[Ablation], directory: Path, **_: Any) -> Any:
        for ablation in ablations:
            calls.append((ablation, directory))
            losses = {arm: 1.0 + number for number, arm in enumerate(ablation.arms)}
            cells = tuple(
                finished(arm, seed, directory / f"{arm}{seed}", losses[arm] + seed)
                for arm in ablation.arms
                for seed in ablation.seeds
            )
            yield SimpleNamespace(ablation=ablation, cells=cells, stopped_by=None)

    monkeypatch.setattr(reproduce, "run_each", run_each)
    return calls


def test_a_claim_is_judged_by_the_runs_of_its_ablation(
    known: Any, ran: list[tuple[Ablation, Path]], tmp_path: Path
) -> None:
    def by_gap(evidence: Evidence) -> Iterable[Finding]:
        yield evidence.gap("bf16 is worse by 0.9", "bf16", Margin.at_least(0.9, "it was 1.8"))

    large = dataclasses.replace(ablation(), seeds=(7,))
    known(claim(judge=by_gap, ablation=ablation(), large=large))
    assert lmjax("A1", "--workdir", str(tmp_path)) == cli.DONE
    found = json.loads((tmp_path / "example" / "claim.json").read_text("utf-8"))["findings"]
    assert found[0]["found"] == "+1 ± 0 (90% interval, only 2 seeds, provisional)"
    # One seed decides nothing; the large version has other seeds, and --seeds overrules both.
    assert lmjax("A1", "--workdir", str(tmp_path), "--large") == cli.FAILED
    assert lmjax("A1", "--workdir", str(tmp_path), "--large", "--seeds", "3,4") == cli.DONE
    assert [chosen.seeds for chosen, _ in ran] == [(0, 1), (7,), (3, 4)]
    assert {directory for _, directory in ran} == {tmp_path / "runs"}


@pytest.fixture
def reproduced(
    known: Any,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> tuple[str, str, str]:
    """What the terminal, the table and the page say of a claim about three arms, three seeds."""
    losses = {"f32": (2.0, 2.1, 2.2), "bf16": (2.0012, 2.1006, 2.2009), "raw": (2.5, 2.7, 2.6)}
    environment = {
        **{"python": "3.11", "backend": "cpu", "processor": "A <fast> CPU", "cpu_count": 2},
        "packages": {"jax": "0.10.2"},
    }

    def run_each(ablations: Sequence[Ablation], directory: Path, **_: Any) -> Any:
        for chosen in ablations:
            cells = [
                finished(arm, seed, directory / f"{arm}{seed}", loss)
                for arm, found in losses.items()
                for seed, loss in enumerate(found)
            ]
            for cell in cells:
                write_run(cell.directory, [3.0, 2.5, 2.4], environment=environment)
            yield SimpleNamespace(ablation=chosen, cells=cells, stopped_by=None)

    def findings(evidence: Evidence) -> Iterable[Finding]:
        same = Margin.within(0.005, "it is a quarter of the sd over seeds")
        yield evidence.between("bf16 is as good", "bf16", same)
        yield evidence.gap("raw is worse", "raw", Margin.at_least(0.1, "half of 0.2 was seen"))

    base = Config(steps=10)
    chosen = dataclasses.replace(
        ablation(),
        base=base,
        arms={
            "f32": base,
            "bf16": dataclasses.replace(base, precision="mixed_bf16"),
            "raw": dataclasses.replace(base, precision="bf16"),
        },
        varies=("precision",),
        seeds=(0, 1, 2),
    )
    paper = (PaperRow("BERT <large>", "76.9", ("raw",)), PaperRow("ResNet", "75.0"))
    known(claim(judge=findings, ablation=chosen, paper=paper))
    monkeypatch.setattr(reproduce, "run_each", run_each)
    assert lmjax("A1", "--workdir", str(tmp_path)) == cli.DONE
    page = html.unescape((tmp_path / "example" / "report.html").read_text("utf-8"))
    out = capsys.readouterr().out
    assert str(tmp_path / "example" / "report.html") in out
    table = (tmp_path / "claims.md").read_text("utf-8").replace("\\<", "<")
    return out, table, page


@pytest.mark.parametrize("which", range(3), ids=("terminal", "table", "page"))
def test_a_claim_says_all_that_a_reviewer_asks(reproduced: tuple[str, str, str], which: int):
    """What was run, the paper beside ours, interval, margin and why, power, scope: the same."""
    text = reproduced[which]
    base = Config(steps=10)
    effect = smallest_detectable(float(np.std([0.0012, 0.0006, 0.0009], ddof=1)), 3, 0.1)
    assert "3 arms; 3 seeds: 0, 1, 2" in text
    assert "million parameters" in text
    assert f"({base.steps} steps of {base.batch_size} x {base.context})" in text
    assert "0.001 (adamw, cosine, warm-up 100 steps)" in text
    assert "shakespeare, tokenizer bytes" in text
    assert "A <fast> CPU, 2 cores" in text
    assert "jax 0.10.2, Python 3.11" in text
    assert "BERT <large>" in text
    assert NOT_HERE in text
    assert "+0.00090 ± 0.00051 (90% interval, 3 seeds)" in text
    assert text.count("+0.500 ± 0.169 (90% interval, 3 seeds)") == 2, "also beside the paper"
    assert "within ±0.005, because it is a quarter of the sd over seeds" in text
    assert f"smallest detectable effect {effect:.2g}" in text
    assert "says nothing about larger models." in text


def test_a_report_of_a_claim_judges_no_arm_by_rules_of_its_own(reproduced: tuple[str, str, str]):
    """One interval for one number, and no verdicts."""
    page = reproduced[2]
    assert set(re.findall(r"\+0\.5\d* ± [\d.]+", page)) == {"+0.500 ± 0.169"}
    assert set(re.findall(r"\+0\.0009\d* ± [\d.]+", page)) == {"+0.00090 ± 0.00051"}
    assert "undecided" not in re.sub("<style.*?</style>", "", page, flags=re.S)
    assert "Verdicts" not in page


@pytest.mark.parametrize("found", load_claims(reproduce.CLAIMS).values(), ids=lambda c: c.name)
def test_every_claim_says_what_it_says_nothing_about(found: Claim) -> None:
    assert found.scope
    assert not found.scope.endswith(".")


def test_a_signal_and_a_worker_that_fails_stop_it(
    known: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    known(claim(YES), claim(YES, name="other", number="A2", ablation=ablation("other")))
    stopped = SimpleNamespace(cells=(), stopped_by="SIGTERM")
    ended = lambda *arguments, **options: (each for each in (stopped,))
    monkeypatch.setattr(reproduce, "run_each", ended)
    assert lmjax("--all", "--workdir", str(tmp_path)) == cli.STOPPED
    assert [path.parent.name for path in tmp_path.glob("*/claim.json")] == ["example"]

    def fail(*arguments: Any, **options: Any) -> Any:
        raise AblationError("a worker was ended by SIGKILL")
        yield

    monkeypatch.setattr(reproduce, "run_each", fail)
    assert lmjax("--all", "--workdir", str(tmp_path)) == cli.FAILED
    assert capsys.readouterr().err.splitlines()[-1] == (
        "error: a worker was ended by SIGKILL; run the same command again to resume"
    )
