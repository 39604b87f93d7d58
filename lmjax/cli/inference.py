"""The verbs that use a trained run: generate, score, evaluate."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Annotated

from lmjax.checks import at_least
from lmjax.cli.common import DONE, RunDirectory, bad_input, print_json, write_text
from lmjax.console import stages
from lmjax.console.tables import Column, print_table
from lmjax.console.wording import counted
from lmjax.inference import evaluate as evaluate_run
from lmjax.inference import load_model
from lmjax.inference import score as score_text
from lmjax.inference import stream as stream_text
from lmjax.runs.config import Seed


def generate(
    run: RunDirectory,
    /,
    prompt: str = "",
    tokens: Annotated[int, at_least(0)] = 200,
    temperature: Annotated[float, at_least(0)] = 0.8,
    top_k: Annotated[int, at_least(0)] = 0,
    seed: Seed = 0,
    precision: str | None = None,
    json: bool = False,
) -> int:
    """Continues a text with the newest checkpoint of a run.

    Standard output gets the prompt and the text, as it is generated, and a newline. If the model
    ends the document, a line on standard error says so.

    Args:
      run: The run directory, or its URL in an object store such as s3://BUCKET/RUN.
      prompt: Text to continue; empty: the start of a document.
      tokens: Maximum number of tokens to generate.
      temperature: Divides the logits; 0 takes the likeliest token.
      top_k: Sample from this many likeliest tokens only; 0: from all.
      seed: Seed of the random draws, 0 to 2^64 - 1. The same seed gives the same text.
      precision: Policy to compute with, if not the run's own.
      json: Print JSON.
    """
    model = load_model(run, precision=precision)
    pieces = bad_input(
        stream_text, model, prompt, tokens=tokens, temperature=temperature, top_k=top_k, seed=seed
    )
    if json:
        with stages.stage("generating text"):
            text = "".join(pieces)
        print_json({"prompt": prompt, "text": text, "step": model.step, "ended": pieces.ended})
        return DONE
    _show_stream(prompt, pieces)
    if pieces.ended:
        count = f"{pieces.tokens} token{'' if pieces.tokens == 1 else 's'}"
        print(f"the model ended the document after {count}", file=sys.stderr)
    return DONE


def _show_stream(prompt: str, pieces: Iterator[str]) -> None:
    """Writes a prompt and its continuation as it comes."""
    with stages.stage("generating text"):
        first = next(pieces, "")
    with stages.stage("generating text"), ExitStack() as stack:
        if sys.stdout.isatty():  # a live line would interrupt the text
            stack.enter_context(stages.hidden())
        stack.callback(write_text, "\n")
        write_text(prompt + first)
        for piece in pieces:
            write_text(piece)


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
        print(
            f"step {result.step}: {result.eval_loss:.4f} nats per token, perplexity "
            f"{result.perplexity:.3f}{bits} ({counted(result.tokens, 'token')})"
        )
    return DONE
