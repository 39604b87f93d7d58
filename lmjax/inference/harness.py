"""Tasks of EleutherAI's lm-evaluation-harness (Gao et al. 2024), with a model of ours.

The only file that knows the harness (`lm_eval`, extra `lm-eval`). A request is read as the
beginning of a document, after its start token, as `score` and `generate` do. The harness's own `hf`
model does so with `add_bos_token=True`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from lmjax.errors import InputError
from lmjax.inference.generate import generate_batch
from lmjax.inference.run import TrainedModel, refuse_encoder
from lmjax.inference.score import scored_windows

ROWS = 16
"""Prompts that are continued together."""

TOKENS = 256
"""The most tokens of a continuation where a task does not say."""


class TaskResult(NamedTuple):
    """A metric of a task.

    Attributes:
      task: its name; of a group too.
      metric: with its filter, such as `exact_match,strict-match`, unless that is `none`.
      value: of the metric.
      error: its standard error, as the harness estimates it; None where it does not.
      samples: number of questions.
    """

    task: str
    metric: str
    value: float
    error: float | None
    samples: int


def evaluate_tasks(
    model: TrainedModel,
    tasks: Sequence[str],
    *,
    folder: Path | None = None,
    fewshot: int | None = None,
    limit: int | None = None,
) -> list[TaskResult]:
    """Evaluates a model on tasks of the harness.

    Args:
      model: from `load_model`.
      tasks: their names.
      folder: holds YAML files of tasks beside those that the harness has.
      fewshot: questions with answers before each; None: as the task says.
      limit: of how many questions of each task; None: of all.

    Raises:
      InputError: the model is an encoder, the harness is not installed, or there is no such task.
      NonFiniteError: logits are NaN or infinite.
    """
    refuse_encoder(model)
    try:
        from lm_eval import simple_evaluate
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise InputError(
            f"tasks need the lm-evaluation-harness ({error}); pip install 'lmjax[lm-eval]'"
        ) from error
    manager = TaskManager(include_path=None if folder is None else str(folder))
    if unknown := [name for name in tasks if not manager.match_tasks([name])]:
        raise InputError(
            f"the harness has no task {unknown[0]!r}"
            + (f", nor has {folder}" if folder else "; name a folder of tasks with --task-folder")
        )
    found = simple_evaluate(
        model=_adapter(model),
        tasks=list(tasks),
        num_fewshot=fewshot,
        limit=limit,
        task_manager=manager,
        log_samples=False,
    )
    return list(_results(found))


def _results(found: Any) -> Iterable[TaskResult]:
    for task, metrics in found["results"].items():
        samples = found.get("n-samples", {}).get(task, {}).get("effective", 0)
        for name, value in metrics.items():
            metric, _, kept = name.partition(",")
            if not isinstance(value, int | float) or metric.endswith("_stderr") or not kept:
                continue
            error = metrics.get(f"{metric}_stderr,{kept}")
            error = float(error) if isinstance(error, int | float) else None
            metric = metric if kept == "none" else name
            yield TaskResult(task, metric, float(value), error, samples)


def _adapter(model: TrainedModel) -> Any:
    """The model as the harness wants it: an `lm_eval.api.model.TemplateLM`."""
    from lm_eval.api.model import TemplateLM

    class Adapter(TemplateLM):
        """Texts in and out; tokens inside."""

        backend = "causal"
        eot_token_id = model.tokenizer.end_of_document
        prefix_token_id = model.tokenizer.start_of_document

        def tok_encode(self, string: str, add_special_tokens: bool | None = None) -> list[int]:
            """The tokens of a text, without others."""
            return _tokens(model, string)

        def _loglikelihood_tokens(self, requests: Any, **_: Any) -> list[tuple[float, bool]]:
            return _continuations(model, requests)

        def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> list[float]:
            """The log-probability of each text."""
            return [_rolling(model, *request.args) for request in requests]

        def generate_until(self, requests: Any, disable_tqdm: bool = False) -> list[str]:
            """The continuation of each text, up to what its task ends it with."""
            return _said(model, [request.args for request in requests])

    return Adapter()


def _tokens(model: TrainedModel, text: str) -> list[int]:
    return [int(token) for token in model.tokenizer.encode(text)]


def _continuations(model: TrainedModel, requests: Any) -> list[tuple[float, bool]]:
    """The log-probability of each continuation, and whether greedy decoding says it.

    Args:
      model: reads.
      requests: the texts, and the tokens of context and continuation, of each.
    """
    start, context = model.tokenizer.start_of_document, model.config.context
    windows, lengths = [], []
    for (_, text), before, after in requests:
        if not 0 < len(after) <= context:
            raise InputError(
                f"a continuation of {len(after)} tokens, {text[:40]!r}, does not fit into a "
                f"context of {context}"
            )
        ids = [*([] if before[:1] == [start] else [start]), *before, *after]
        windows.append(np.asarray(ids[-context - 1 :], np.int32))
        lengths.append(len(after))
    found = zip(scored_windows(model, windows), lengths, strict=True)
    return [
        (float(own.log_probabilities[-length:].sum()), bool(own.likeliest[-length:].all()))
        for own, length in found
    ]


def _rolling(model: TrainedModel, text: str) -> float:
    """The log-probability of a text, in the windows that the harness lays over it."""
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

    start, context = model.tokenizer.start_of_document, model.config.context
    windows = get_rolling_token_windows(_tokens(model, text), start, context, 1)
    pairs = [make_disjoint_window(window) for window in windows]
    ids = [np.asarray([*before, *after], np.int32) for before, after in pairs]
    scored = zip(scored_windows(model, ids), pairs, strict=True)
    return float(sum(found.log_probabilities[-len(new) :].sum() for found, (_, new) in scored))


def _said(model: TrainedModel, asked: Sequence[tuple[str, dict[str, Any]]]) -> list[str]:
    """The continuation of each text; those with the same settings are continued together."""
    texts, kinds = [""] * len(asked), dict[str, list[int]]()
    for index, (_, how) in enumerate(asked):
        kinds.setdefault(repr(how), []).append(index)
    for indices in kinds.values():
        settings = _settings(asked[indices[0]][1])
        for first in range(0, len(indices), ROWS):
            rows = indices[first : first + ROWS]
            said = generate_batch(model, [asked[index][0] for index in rows], **settings)
            for index, text in zip(rows, said, strict=True):
                texts[index] = text
    return texts


def _settings(how: dict[str, Any]) -> dict[str, Any]:
    """The settings of `Generation` for what a task asks for."""
    until = how.get("until") or []
    stop = [until] if isinstance(until, str) else list(until)
    settings: dict[str, Any] = {"stop": tuple(filter(None, stop))}
    settings["tokens"] = int(how.get("max_gen_toks", how.get("max_tokens", TOKENS)))
    sampled = how.get("do_sample", float(how.get("temperature", 0)) > 0)
    settings["temperature"] = float(how.get("temperature", 1)) if sampled else 0.0
    taken = {"until", "max_gen_toks", "max_tokens", "do_sample", "temperature"}
    for name, value in how.items():
        if name in ("top_k", "top_p", "min_p", "repetition_penalty"):
            settings[name] = value
        elif name not in taken:
            raise InputError(f"the task sets {name} for generation, which is not supported")
    return settings
