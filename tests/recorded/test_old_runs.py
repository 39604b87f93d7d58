"""Run directories that an earlier version wrote still resume, generate, score and report.

`old/` holds two runs of six steps, stopped after the fourth by the version whose revision stands in
their `environment.json`: every kind of state that a checkpoint can have is in one of them (loss
scale, phases, Kahan residuals, narrow moments, histories of delayed scaling). `old/expected.json`
holds what that version computed from them.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from lmjax.ablation import write_report
from lmjax.ablation.runs import ablation_of
from lmjax.inference import evaluate, generate, load_model, score
from lmjax.train import read_config, train
from tests.recorded.runs import machine

OLD = Path(__file__).with_name("old")
EXPECTED = json.loads((OLD / "expected.json").read_text("utf-8"))
SAME_MACHINE = machine() == EXPECTED["machine"]


SLOW = {
    "gpt2-mixed_f16": pytest.mark.long,  # a phase change and watched steps: minutes to compile
    "llama-delayed-fp8": pytest.mark.long,  # half a minute
}
PARAMS = [pytest.param(name, marks=SLOW.get(name, ())) for name in EXPECTED["runs"]]


@pytest.fixture(params=PARAMS, scope="module")
def old(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A copy of an old run directory, and what its version made of it."""
    workdir = tmp_path_factory.mktemp("old") / "run"
    shutil.copytree(OLD / request.param, workdir)
    return workdir, EXPECTED["runs"][request.param]


def equal(found: float, recorded: str) -> bool:
    """To f32's rounding of a sum on the processor of the record, else to the rounding of bf16.

    XLA sums in an order that depends on the program around a sum.
    """
    return found == pytest.approx(float(recorded), rel=1e-7 if SAME_MACHINE else 2**-7)


def test_an_old_run_generates_scores_and_evaluates(old: tuple[Path, dict[str, Any]]):
    workdir, expected = old
    model = load_model(str(workdir))
    scores = score(model, "To be, or not").log_probabilities
    assert all(map(equal, map(float, scores), expected["score"]))
    assert equal(evaluate(model, progress=False).eval_loss, expected["eval_loss"])
    if SAME_MACHINE:
        assert generate(model, "ROMEO:", tokens=20, temperature=0.0) == expected["greedy"]
        drawn = generate(model, "ROMEO:", tokens=20, temperature=0.8, top_k=5, seed=3)
        assert drawn == expected["generated"]


def test_an_old_run_resumes_as_if_it_had_never_stopped(old: tuple[Path, dict[str, Any]]):
    workdir, expected = old
    result = train(read_config(workdir), workdir, progress=False).result
    assert result is not None
    assert equal(result["eval_loss"], expected["final_loss"])
    if SAME_MACHINE:
        assert result["parameters_sha256"] == expected["parameters_sha256"]


def test_an_old_run_is_reported(old: tuple[Path, dict[str, Any]], tmp_path: Path):
    workdir, _ = old
    ablation, cells = ablation_of([workdir])
    page = write_report(ablation, cells, tmp_path).read_text("utf-8")
    assert read_config(workdir).model.norm in page
