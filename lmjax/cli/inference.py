"""The verbs that use a trained run: generate, score, parity, evaluate."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import operator
import sys
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import Annotated, Any

from lmjax.checks import at_least
from lmjax.cli.common import (
    DONE,
    FAILED,
    OWN_FLAGS,
    REPEATED,
    Repeated,
    RunDirectory,
    UserPath,
    bad_input,
    held_out,
    print_json,
    write_text,
)
from lmjax.console import stages
from lmjax.console.tables import Column, print_table
from lmjax.console.wording import counted
from lmjax.errors import InputError
from lmjax.files.filenames import expanded
from lmjax.inference import (
    Continuations,
    Generation,
    Score,
    TrainedModel,
    load_model,
    perplexity,
    stream_batch,
)
from lmjax.inference import evaluate as evaluate_run
from lmjax.inference import parity as compare
from lmjax.inference import score as score_text
from lmjax.inference.harness import TaskResult, evaluate_tasks
from lmjax.precision.grammar import PRESETS


def generate(
    run: RunDirectory,
    /,
    prompt: Repeated = (),
    config: Annotated[Generation, OWN_FLAGS, REPEATED] = Generation(),  # noqa: B008 - frozen
    precision: str | None = None,
    json: bool = False,
) -> int:
    """Continues texts with the newest checkpoint of a run.

    Standard output gets each prompt and its continuation, as it is generated, and a newline. A line
    on standard error says so if the model ends the document or a stop string ends the text.

    Args:
      run: The run directory, or its URL in an object store such as s3://BUCKET/RUN.
      prompt: Text to continue; none, or empty: the start of a document. May be given several times:
        all are continued at once, each as it would be alone.
      precision: Policy to compute with, if not the run's own.
      json: Print JSON.
    """
    model = load_model(run, precision=precision)
    prompts = prompt or ("",)
    how = {f.name: getattr(config, f.name) for f in dataclasses.fields(config)}
    pieces = bad_input(stream_batch, model, prompts, **how)
    if not json:
        _show_stream(prompts, pieces)
        return DONE
    with stages.stage("generating text"):
        texts = _collected(pieces)
    rows = [
        {
            "prompt": prompt,
            "text": text,
            "tokens": state.tokens,
            "ended": state.ended,
            "stopped_by": state.stopped_by or None,
        }
        for prompt, text, state in zip(prompts, texts, pieces.texts, strict=True)
    ]
    found = {**rows[0], "step": model.step} if len(rows) == 1 else None
    print_json(found or {"step": model.step, "continuations": rows})
    return DONE


def _collected(pieces: Continuations) -> list[str]:
    """The whole texts."""
    texts = [""] * len(pieces.texts)
    for row, piece in pieces:
        texts[row] += piece
    return texts


def _show_stream(prompts: Sequence[str], pieces: Continuations) -> None:
    """Writes prompts and their continuations: the first as it comes, others after it."""
    with stages.stage("generating text"):
        begun = list(itertools.islice(pieces, 1))
    waiting = [""] * len(prompts)
    with stages.stage("generating text"), ExitStack() as stack:
        if sys.stdout.isatty():  # a live line would interrupt the text
            stack.enter_context(stages.hidden())
        stack.callback(write_text, "\n")
        first = "".join(piece for row, piece in begun if row == 0)
        write_text(prompts[0] + first)
        for row, piece in itertools.chain((pair for pair in begun if pair[0]), pieces):
            if row:
                waiting[row] += piece
            else:
                write_text(piece)
    for prompt, text in list(zip(prompts, waiting, strict=True))[1:]:
        write_text(f"\n{prompt}{text}\n")
    for number, state in enumerate(pieces.texts, start=1):
        which = f"prompt {number}: " if len(prompts) > 1 else ""
        why = "the model ended the document" if state.ended else ""
        why = f"stopped before {state.stopped_by!r}" if state.stopped_by else why
        if why:
            print(f"{which}{why} after {counted(state.tokens, 'token')}", file=sys.stderr)


def score(
    run: RunDirectory,
    /,
    text: str | None = None,
    file: Repeated = (),
    stride: Annotated[int, at_least(0)] = 0,
    precision: Repeated = (),
    json: bool = False,
) -> int:
    """Log-probability of a text, in total and per character or token; perplexity of files.

    Each row of a text is a token, or the tokens that together make one character. P is the
    probability of the whole text, the product of those of its tokens given all before them.

    Args:
      run: The run directory, or its URL in an object store such as s3://BUCKET/RUN.
      text: The text, read as the beginning of a document.
      file: A text file in UTF-8, read as one document; may be given several times.
      stride: What exceeds the context is read in windows, each so many tokens after the one before,
        1 to the context; 0: half a context.
      precision: Policy to compute with, if not the run's own; may be given several times.
      json: Print JSON.
    """
    if (text is None) == (not file):
        raise InputError("give either --text or --file")
    texts = {} if text is not None else {name: _text_of(name) for name in file}
    own = load_model(run)
    models = {policy: own.under(policy) for policy in precision} or {"": own}
    if text is None:
        return _score_files(models, texts, stride, json)
    scores = {
        policy: bad_input(score_text, model, text, stride=stride)
        for policy, model in models.items()
    }
    if json:
        found = [
            ({"precision": policy} if policy else {}) | _score_json(result)
            for policy, result in scores.items()
        ]
        print_json(found[0] if len(found) == 1 else {"policies": found})
        return DONE
    first = next(iter(scores.values()))
    titles = [name or "log P (nats)" for name in scores]
    columns = Column("text", "key"), *(Column(name, "number") for name in ("tokens", *titles))
    pieces = zip(*(result.pieces for result in scores.values()), strict=True)
    rows = [
        (repr(row[0].text), str(row[0].tokens), *(f"{p.log_probability:.4f}" for p in row))
        for row in pieces
    ]
    print_table(columns, rows)
    count = len(first.tokens)
    for policy, result in scores.items():
        print(
            f"{policy and policy + ': '}log P = {result.total:.4f} nats over "
            f"{counted(count, 'token')}, P = {result.probability}"
        )
        print(
            f"{-result.total / count:.4f} nats per token, {result.bits_per_byte:.4f} bits per byte"
        )
    return DONE


def _score_json(result: Score) -> dict[str, Any]:
    tokens = [
        {"token": token, "log_probability": value}
        for token, value in zip(result.tokens, result.log_probabilities, strict=True)
    ]
    return {
        "log_probability": result.total,
        "log10_probability": result.log10,
        "tokens": len(result.tokens),
        "bits_per_byte": result.bits_per_byte,
        "per_token": tokens,
        "pieces": [dataclasses.asdict(piece) for piece in result.pieces],
    }


def _text_of(name: str) -> str:
    """The text of a file."""
    try:
        text = expanded(name).read_text(encoding="utf-8")
    except OSError as error:
        raise InputError(f"cannot read {name}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{name} is not text in UTF-8: byte {error.start} is invalid") from error
    if not text:
        raise InputError(f"{name} is empty; there is no text to score")
    return text


def _score_files(
    models: Mapping[str, TrainedModel], texts: Mapping[str, str], stride: int, json: bool
) -> int:
    """Scores files under policies, each beside the first."""
    rows: list[dict[str, Any]] = []
    for name, text in texts.items():
        for policy, model in models.items():
            found = bad_input(perplexity, model, text, stride=stride)
            rows.append({"file": name, "precision": policy, "found": found})
    if len(texts) > 1:
        for policy in models:
            own = [row["found"] for row in rows if row["precision"] == policy]
            total = functools.reduce(operator.add, own)
            rows.append({"file": "all", "precision": policy, "found": total})
    reported = [
        {
            "file": row["file"],
            "precision": row["precision"] or None,
            **dataclasses.asdict(row["found"]),
            "nats_per_token": row["found"].nats_per_token,
            "perplexity": row["found"].perplexity,
            "bits_per_byte": row["found"].bits_per_byte,
        }
        for row in rows
    ]
    if json:
        print_json({"scores": reported})
        return DONE
    first = {row["file"]: row["nats_per_token"] for row in reversed(reported)}
    several = len(models) > 1
    titles = ["tokens", "nats/token", *(["difference"] if several else []), "perplexity"]
    columns = [Column("file", "key"), *([Column("policy", "setting")] if several else [])]
    columns += [Column(title, "number") for title in (*titles, "bits/byte")]
    lines = [
        (
            row["file"],
            *([row["precision"]] if several else []),
            f"{row['tokens']:,}",
            f"{row['nats_per_token']:.4f}",
            *([f"{row['nats_per_token'] - first[row['file']]:+.2e}"] if several else []),
            f"{row['perplexity']:.3f}",
            f"{row['bits_per_byte']:.4f}",
        )
        for row in reported
    ]
    print_table(columns, lines, each="file")
    return DONE


PARITY_TEXT = "To be, or not to be: that is the question."


def parity(
    run: RunDirectory,
    /,
    text: str = PARITY_TEXT,
    precision: Repeated = (),
    json: bool = False,
) -> int:
    """Whether decoding computes what training does: log-probabilities of a text, each three ways.

    Whole, as training and evaluation read it; token by token from the cache of keys and values, as
    generate does; and from its start again for each token. Exits with 1 if a difference of a token
    exceeds the bound: 8 roundings of the compute format of numbers as large as the largest
    log-probability, or one of the format that activations are quantized to.

    Args:
      run: The run directory, or its URL in an object store such as s3://BUCKET/RUN.
      text: What is read, at most a context.
      precision: Policy to compute with; may be given several times. By default, all presets.
      json: Print JSON.
    """
    own = load_model(run)
    policies = precision or ("f32", *PRESETS)
    found = {}
    for policy in policies:
        with stages.stage(f"comparing under {policy}"):
            found[policy] = bad_input(compare, own.under(policy), text)
    if json:
        rows = [
            {
                "precision": policy,
                **{name: getattr(p, name).tolist() for name in ("forward", "decoded", "rerun")},
                **{name: getattr(p, name) for name in ("difference", "rerun_difference")},
                **{name: getattr(p, name) for name in ("equal", "bound", "why", "holds")},
            }
            for policy, p in found.items()
        ]
        print_json({"policies": rows})
    else:
        numbers = ("training", "decoding", "equal", "difference", "re-run", "bound")
        titles = (Column(name, "number") for name in numbers)
        columns = Column("policy", "key"), *titles, Column("beside the order of sums", "text")
        lines = [
            (
                policy,
                f"{p.forward.sum():.6f}",
                f"{p.decoded.sum():.6f}",
                f"{p.equal}/{len(p.forward)}",
                f"{p.difference:.1e}",
                f"{p.rerun_difference:.1e}",
                f"{p.bound:.1e}" + ("" if p.holds else " exceeded"),
                p.why,
            )
            for policy, p in found.items()
        ]
        print_table(columns, lines, each="policy")
    return DONE if all(p.holds for p in found.values()) else FAILED


def evaluate(
    run: RunDirectory,
    /,
    precision: str | None = None,
    task: Repeated = (),
    task_folder: UserPath | None = None,
    fewshot: Annotated[int, at_least(0)] | None = None,
    limit: Annotated[int, at_least(1)] | None = None,
    json: bool = False,
) -> int:
    """Loss on the whole validation split that a run held out; or tasks of lm-evaluation-harness.

    Args:
      run: The run directory, or its URL in an object store such as s3://BUCKET/RUN.
      precision: Policy to compute with, if not the run's own.
      task: A task of EleutherAI's lm-evaluation-harness (extra lm-eval) instead; may be given
        several times.
      task_folder: A folder with YAML files of further tasks.
      fewshot: Questions with answers before each question, if not as many as the task says.
      limit: Evaluate this many questions of each task only.
      json: Print JSON.
    """
    if not task and (task_folder, fewshot, limit) != (None, None, None):
        raise InputError("--task-folder, --fewshot and --limit are about tasks; name one by --task")
    if task_folder is not None and not task_folder.is_dir():
        raise InputError(f"{task_folder} is not a folder")
    model = load_model(run, precision=precision)
    if task:
        results = evaluate_tasks(model, task, folder=task_folder, fewshot=fewshot, limit=limit)
        return _show_tasks(results, json)
    result = bad_input(evaluate_run, model, progress=not json)
    if json:
        print_json(dataclasses.asdict(result))
    elif result.accuracy is not None:
        print(f"step {result.step}: {held_out(dataclasses.asdict(result))}")
    else:
        bits = "" if result.bits_per_byte is None else f", {result.bits_per_byte:.4f} bits per byte"
        print(
            f"step {result.step}: {result.eval_loss:.4f} nats per token, perplexity "
            f"{result.perplexity:.3f}{bits} ({counted(result.tokens, 'token')})"
        )
    return DONE


def _show_tasks(results: Sequence[TaskResult], json: bool) -> int:
    if json:
        print_json({"tasks": [result._asdict() for result in results]})
        return DONE
    numbers = ("value", "standard error", "questions")
    columns = (
        Column("task", "key"),
        Column("metric"),
        *(Column(name, "number") for name in numbers),
    )
    rows = [
        (
            r.task,
            r.metric,
            f"{r.value:.4f}",
            "" if r.error is None else f"{r.error:.4f}",
            f"{r.samples:,}",
        )
        for r in results
    ]
    print_table(columns, rows, each="metric")
    return DONE
