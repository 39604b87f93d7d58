"""Tasks of lm-evaluation-harness from local files, each answer computed by other means."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lmjax.data.tokenizers import ByteTokenizer
from lmjax.errors import InputError
from lmjax.inference import TrainedModel, generate, score
from lmjax.inference.harness import _settings, evaluate_tasks
from lmjax.runs.resolved import phase_of

TEXTS = ("the quick brown fox", "a dog and a fox, a longer text", "ж")
QUESTIONS = [
    {"question": "the quick", "choices": ["brown", "zz"], "answer": 0, "text": TEXTS[0]},
    {"question": "lazy", "choices": ["q", "dog"], "answer": 1, "text": TEXTS[1]},
    {"question": "a fox", "choices": ["is", "jumps"], "answer": 1, "text": TEXTS[2]},
]

TASKS = {
    "choice": """
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: answer
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
""",
    "text": """
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list: [{metric: bits_per_byte, aggregation: bits_per_byte, higher_is_better: false}]
""",
    "says": """
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "{{said}}"
generation_kwargs: {until: ["STOP"], max_gen_toks: 7}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
""",
}


@pytest.fixture(scope="module")
def model(tiny: Callable[..., Any], draw_params: Callable[..., Any]) -> TrainedModel:
    config = tiny("f32", "llama", model={"vocab_size": 256})
    return TrainedModel(phase_of(config), draw_params(config, std=0.3), 0, ByteTokenizer())


@pytest.fixture(scope="module")
def results(model: TrainedModel, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The value of each metric; the second question of `says` has another answer."""
    pytest.importorskip("lm_eval")
    folder = tmp_path_factory.mktemp("tasks")
    said = [generate(model, q["question"], tokens=7, temperature=0.0) for q in QUESTIONS]
    rows = [q | {"said": text} for q, text in zip(QUESTIONS, said, strict=True)]
    rows[1]["said"] += "?"
    (folder / "rows.json").write_text("\n".join(map(json.dumps, rows)))
    for name, task in TASKS.items():
        data = f"task: {name}\ndataset_path: json\ntest_split: test\n"
        data += f"dataset_kwargs: {{data_files: {{test: {folder / 'rows.json'}}}}}"
        (folder / f"{name}.yaml").write_text(data + task)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HUB_OFFLINE", "1")
        patch.setattr("datasets.config.HF_DATASETS_CACHE", str(folder / "cache"))
        found = evaluate_tasks(model, list(TASKS), folder=folder)
        with pytest.raises(InputError, match="no task 'nothing', nor has"):
            evaluate_tasks(model, ["choice", "nothing"], folder=folder)
    return {f"{r.task} {r.metric}": r for r in found}


@pytest.mark.long
def test_the_likelier_choice_is_the_answer(results: dict[str, Any], model: TrainedModel) -> None:
    right = []
    for row in QUESTIONS:
        totals = []
        for choice in row["choices"]:
            scored = score(model, f"{row['question']} {choice}").log_probabilities
            totals.append(math.fsum(scored[len(row["question"]) :]))
        right.append(int(np.argmax(totals)) == row["answer"])
    assert results["choice acc"].value == pytest.approx(np.mean(right))
    assert results["choice acc"].samples == 3


@pytest.mark.long
def test_a_text_is_scored_in_the_windows_of_the_harness(
    results: dict[str, Any], model: TrainedModel
) -> None:
    """A context of 16: of the text of 30 bytes, the second window holds the last 16."""
    nats = -score(model, QUESTIONS[0]["text"][:16]).total - score(model, "ж").total
    long, context = QUESTIONS[1]["text"].encode(), 16
    nats -= score(model, long[:context].decode()).total
    short = QUESTIONS[0]["text"].encode()
    for text in (short, long):
        start = len(text) - context
        ids = np.asarray([[*text[start - 1 : -1]]], np.int32)
        logits = np.asarray(model.logits_function()(model.params, ids), np.float64)[0]
        logs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        new = len(text) - context
        nats -= sum(logs[i, text[start + i]] for i in range(context - new, context))
    size = sum(len(row["text"].encode()) for row in QUESTIONS)
    expected = nats / size / math.log(2)
    assert results["text bits_per_byte"].value == pytest.approx(expected, rel=1e-5)


@pytest.mark.long
def test_what_is_said_is_what_generate_says(results: dict[str, Any]) -> None:
    assert results["says exact_match"].value == pytest.approx(2 / 3)


def test_settings_of_tasks_are_those_of_generation() -> None:
    given = {"until": ["\n", ""], "max_gen_toks": 5, "do_sample": False, "temperature": 0.7}
    assert _settings(given) == {"stop": ("\n",), "tokens": 5, "temperature": 0.0}
    given = {"until": "Q", "do_sample": True, "temperature": 0.7, "top_p": 0.9}
    assert _settings(given) == {"stop": ("Q",), "tokens": 256, "temperature": 0.7, "top_p": 0.9}
    with pytest.raises(InputError, match="sets num_beams"):
        _settings({"num_beams": 4})


def test_without_the_harness_the_extra_is_named(
    model: TrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(InputError, match=r"lmjax\[lm-eval\]"):
        evaluate_tasks(model, ["choice"])


def test_flags_of_tasks_without_a_task_are_refused(tmp_path: Path) -> None:
    from lmjax.cli.inference import evaluate

    with pytest.raises(InputError, match="--task"):
        evaluate("run", limit=3)
    with pytest.raises(InputError, match="is not a folder"):
        evaluate("run", task=("x",), task_folder=tmp_path / "none")
