"""The verbs that use a trained run: generate, score, evaluate."""

from __future__ import annotations

import dataclasses
import itertools
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Annotated

from lmjax.cli.common import (
    DONE,
    OWN_FLAGS,
    REPEATED,
    Repeated,
    RunDirectory,
    bad_input,
    print_json,
    write_text,
)
from lmjax.console import stages
from lmjax.console.tables import Column, print_table
from lmjax.console.wording import counted
from lmjax.inference import Continuations, Generation, load_model, stream_batch
from lmjax.inference import evaluate as evaluate_run
from lmjax.inference import score as score_text


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


def score(run: RunDirectory, /, text: str, precision: str | None = None, json: bool = False) -> int:
    """Log-probability of a text, in total and per character or token.

    Each row is a token, or the tokens that together make one character. P is the probability of the
    whole text.

    Args:
      run: The run directory, or its URL in an object store such as s3://BUCKET/RUN.
      text: The text, read as the beginning of a document.
      precision: Policy to compute with, if not the run's own.
      json: Print JSON.
    """
    result = bad_input(score_text, load_model(run, precision=precision), text)
    summary = {
        "log_probability": result.total,
        "log10_probability": result.log10,
        "tokens": len(result.tokens),
        "bits_per_byte": result.bits_per_byte,
    }
    if json:
        tokens = [
            {"token": token, "log_probability": value}
            for token, value in zip(result.tokens, result.log_probabilities, strict=True)
        ]
        pieces = [dataclasses.asdict(piece) for piece in result.pieces]
        print_json({**summary, "per_token": tokens, "pieces": pieces})
        return DONE
    columns = Column("text", "key"), Column("tokens", "number"), Column("log P (nats)", "number")
    rows = ((repr(p.text), str(p.tokens), f"{p.log_probability:.4f}") for p in result.pieces)
    print_table(columns, rows)
    count = len(result.tokens)
    print(
        f"log P = {result.total:.4f} nats over {counted(count, 'token')}, P = {result.probability}"
    )
    print(f"{-result.total / count:.4f} nats per token, {result.bits_per_byte:.4f} bits per byte")
    return DONE


def evaluate(run: RunDirectory, /, precision: str | None = None, json: bool = False) -> int:
    """Loss on the whole validation split that a run held out.

    Args:
      run: The run directory, or its URL in an object store such as s3://BUCKET/RUN.
      precision: Policy to compute with, if not the run's own.
      json: Print JSON.
    """
    model = load_model(run, precision=precision)
    result = bad_input(evaluate_run, model, progress=not json)
    if json:
        print_json(dataclasses.asdict(result))
    else:
        bits = "" if result.bits_per_byte is None else f", {result.bits_per_byte:.4f} bits per byte"
        if result.accuracy is not None:
            print(f"accuracy {result.accuracy:.4f}, F1 {result.f1:.4f}")
        print(
            f"step {result.step}: {result.eval_loss:.4f} nats per token, perplexity "
            f"{result.perplexity:.3f}{bits} ({counted(result.tokens, 'token')})"
        )
    return DONE
