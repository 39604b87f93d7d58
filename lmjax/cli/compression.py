"""The verbs that make smaller runs of trained ones: quantize and prune."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

from lmjax.cli.common import DONE, OWN_FLAGS, RunDirectory, UserPath, bad_input, print_json
from lmjax.compression import PruneConfig, QuantizeConfig
from lmjax.compression import prune as prune_model
from lmjax.compression import quantize as quantize_model
from lmjax.compression.report import Measured, as_json, measured
from lmjax.compression.report_page import write_page
from lmjax.compression.written import (
    refuse_taken,
    size_on_disk,
    write_json,
    write_result,
    write_run,
)
from lmjax.console.tables import Column, print_table
from lmjax.console.wording import counted
from lmjax.inference import TrainedModel, load_model
from lmjax.runs.run_directory import class_names
from lmjax.runs.store.remote import fetched

LAYERS = (
    Column("product", "key"),
    Column("weights", "setting"),
    Column("weights, dB", "number"),
    Column("output, dB", "number"),
    Column("alone, nats", "number"),
)
RUN = (Column("run", "key"), Column("parameters", "number"), Column("on disk", "number"))
OF_TOKENS = (Column("nats/token", "number"), Column("perplexity", "number"))
OF_TEXTS = (Column("nats/text", "number"), Column("accuracy", "number"))
SPEED = Column("ms/token", "number")


def quantize(
    run: RunDirectory,
    /,
    to: UserPath,
    config: Annotated[QuantizeConfig, OWN_FLAGS],
    json: bool = False,
) -> int:
    """Makes a smaller run of a trained one: weights as narrow elements and their factors.

    The new run generates, scores and evaluates as any other. It holds parameters alone, so it is
    not trained further. What quantization costs is measured on the text that the run held out;
    quantization.html, .json and .png in the new run show it.

    Args:
      run: The run directory, or its URL in an object store such as s3://BUCKET/RUN.
      to: The new run directory.
      config: What to quantize to, and how.
      json: Print JSON.
    """
    refuse_taken(to)
    with fetched(run) as source:
        model = load_model(source)
        made = bad_input(quantize_model, model, config)
        before = measured(model, source)
        after = measured(made.model, None)
        runs = {run: before, str(to): after}

        def finish(folder: Path) -> None:
            """Writes what the new run measures, its picture and its page into its directory."""
            from lmjax.compression.report_plot import draw_quantization

            runs[str(to)] = dataclasses.replace(after, disk=size_on_disk(folder))
            labels = class_names(source, model.config)
            write_result(folder, made.model, after.loss, after.accuracy, labels)
            picture = folder / "quantization.png"
            draw_quantization(picture, made)
            title = f"{run} in {config.policy}, {config.method}"
            write_page(folder / "quantization.html", picture, title, runs, made.layers)
            write_json(folder / "quantization.json", as_json(config, runs, made.layers))

        write_run(to, made.model, finish, source)
    if json:
        print_json(as_json(config, runs, made.layers))
        return DONE
    layers = (
        (
            layer.path,
            layer.format,
            _decibel(layer.weight_snr),
            _decibel(layer.output_snr),
            "" if layer.loss_alone is None else f"{layer.loss_alone:+.5f}",
        )
        for layer in made.layers
    )
    print_table(LAYERS, layers, each="product")
    print()
    show_runs(runs)
    return DONE


def prune(
    run: RunDirectory,
    /,
    to: UserPath,
    config: Annotated[PruneConfig, OWN_FLAGS] = PruneConfig(),  # noqa: B008 - frozen
    against: str = "",
    json: bool = False,
) -> int:
    """Makes a run of a trained one in which a share of the weights of blocks is zero.

    It works on quantized runs too, and quantizing a pruned run keeps its zeros. The new run holds
    parameters alone. To prune while training, and to train further after it, see --pruning.pattern
    of an experiment.

    Args:
      run: The run directory, or its URL in an object store such as s3://BUCKET/RUN.
      to: The new run directory.
      config: Which weights, and how they are chosen.
      against: A policy such as w=int4@block32: also show what comes of pruning and then quantizing
        to it, and of quantizing and then pruning.
      json: Print JSON.
    """
    refuse_taken(to)
    content: dict[str, Any] = {}
    with fetched(run) as source:
        model = load_model(source)
        made = bad_input(prune_model, model, config)
        runs = {run: measured(model, source), str(to): measured(made.model, None)}
        if against:
            runs |= _beside_quantized(model, made.model, config, against)

        def finish(folder: Path) -> None:
            own = runs[str(to)] = dataclasses.replace(runs[str(to)], disk=size_on_disk(folder))
            labels = class_names(source, model.config)
            write_result(folder, made.model, own.loss, own.accuracy, labels)
            content["pattern"], content["method"] = config.pattern, config.method
            content["sparsity"] = dict(made.sparsity)
            content["runs"] = {name: dataclasses.asdict(one) for name, one in runs.items()}
            write_json(folder / "pruning.json", content)

        write_run(to, made.model, finish, source)
    if json:
        print_json(content)
        return DONE
    shares = made.sparsity.values()
    lowest, highest = (f"{100 * share:.1f}%" for share in (min(shares), max(shares)))
    span = lowest if lowest == highest else f"{lowest} to {highest}"
    print(f"zeros among the weights of {counted(len(made.sparsity), 'product')}: {span}")
    print()
    show_runs(runs)
    return DONE


def _beside_quantized(
    model: TrainedModel, pruned: TrainedModel, config: PruneConfig, policy: str
) -> dict[str, Measured]:
    """What comes of both orders of pruning and quantizing."""
    request = QuantizeConfig(policy, calibrate=config.calibrate, windows=config.windows)
    then = bad_input(quantize_model, pruned, request).model
    first = bad_input(quantize_model, model, request).model
    return {
        "pruned, then quantized": measured(then, None),
        "quantized, then pruned": measured(bad_input(prune_model, first, config).model, None),
    }


def show_runs(runs: dict[str, Measured]) -> None:
    """Prints sizes, losses and speeds, one run a row."""
    classes = any(run.accuracy is not None for run in runs.values())
    scores = OF_TEXTS if classes else OF_TOKENS
    print_table((*RUN, *scores, SPEED), _rows(runs))


def _rows(runs: dict[str, Measured]) -> Iterator[tuple[str, ...]]:
    for name, run in runs.items():
        loss = "" if run.loss is None else f"{run.loss:.4f}"
        score = "" if run.perplexity is None else f"{run.perplexity:.3f}"
        score = score if run.accuracy is None else f"{run.accuracy:.4f}"
        disk = in_bytes(run.disk) if run.disk else ""
        speed = f"{1000 * run.seconds_per_token:.2f}"
        yield name, in_bytes(run.bytes), disk, loss, score, speed


def _decibel(ratio: float | None) -> str:
    """A ratio, if it was measured and there are errors."""
    return "" if ratio is None or ratio == math.inf else f"{ratio:.1f}"


def in_bytes(count: int) -> str:
    """A size for people: 11.3 MB."""
    return f"{count / 1e6:.2f} MB" if count >= 1e5 else f"{count / 1e3:.1f} kB"
