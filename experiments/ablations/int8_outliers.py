"""A27: with outliers, int8 needs factors of channels, or smoothing (Xiao et al. 2023).

Command:   python -m lmjax reproduce int8_outliers
Hardware:  2 CPU cores
Time:      3 runs, shared with other claims, 20 seconds each on a core, and two minutes after them
Expected:  confirmed: one factor for activations costs 0.05 to 0.09 nats, smoothed 0.0001; one for
           weights 0.004 to 0.006 more than one for each channel

A small model has no outliers, so they are put in without changing what it computes: the scale of
the norm before each product is multiplied by 64 in one of 32 channels, and the rows of the weights
that read them are divided by it. Both are powers of two, so in f32 no number of the model's output
changes. The same is done to columns of the values, and to the rows of the product that reads them:
there the outliers are in the weights.
"""

import dataclasses
import functools
from collections.abc import Iterator

import jax
import numpy as np

from experiments.ablations import recipes
from lmjax.ablation.claims import Claim, PaperRow
from lmjax.ablation.evidence import Evidence, Finding
from lmjax.ablation.grid import Ablation, Cell
from lmjax.cli.ablation import run_ablation
from lmjax.compression import QuantizeConfig, quantize
from lmjax.compression.request import Method
from lmjax.inference import TrainedModel, evaluate, load_model
from lmjax.train import Config

OUTLIER, EVERY = 64.0, 32


def ablation(base: Config | None = None) -> Ablation:
    """Runs in f32, to be quantized afterwards."""
    base = base or recipes.small()
    return Ablation(
        name="int8_outliers",
        question="What does int8 cost where a few channels are large?",
        base=base,
        arms={"f32": base},
        varies=(),
        control="f32",
        seeds=(0, 1, 2),
    )


def with_outliers(model: TrainedModel) -> TrainedModel:
    """The same function with some channels of activations, and of weights, 64 times as large."""
    params = jax.tree.map(np.array, model.params)
    width = model.config.model.width
    large = np.where(np.arange(width) % EVERY == 5, OUTLIER, 1.0).astype(np.float32)
    blocks = params["blocks"]
    for part, readers in (("attention", ("query", "key", "value")), ("mlp", ("up", "gate"))):
        blocks[part]["norm"]["scale"] *= large
        if "bias" in blocks[part]["norm"]:
            blocks[part]["norm"]["bias"] *= large
        for name in set(readers) & set(blocks[part]):
            blocks[part][name]["kernel"] /= large[:, None]
    blocks["attention"]["value"]["kernel"] *= large
    blocks["attention"]["out"]["kernel"] /= large[:, None]
    return dataclasses.replace(model, params=params)


@functools.cache
def _loss(directory: str, policy: str, method: Method) -> float:
    model = with_outliers(load_model(directory))
    if policy:
        model = quantize(model, QuantizeConfig(policy, method=method)).model
    return evaluate(model, progress=False).eval_loss


def cost(cell: Cell, policy: str, method: Method = "nearest") -> float:
    """By how much the loss of the model with outliers rises, in nats."""
    directory = str(cell.directory)
    return _loss(directory, policy, method) - _loss(directory, "", "nearest")


def judge(evidence: Evidence) -> Iterator[Finding]:
    """Factors of tensors, smoothing, and factors of channels."""
    tensor = "w=int8@channel,x=int8@tensor.static"

    def finding(statement: str, about: str, limit: float, above: bool, *how: str) -> Finding:
        return evidence.in_every_run(
            statement,
            ("f32",),
            lambda cell: cost(cell, *how),  # type: ignore[arg-type]
            (lambda nats: nats > limit) if above else (lambda nats: nats < limit),
            form="{:+.4f} nats",
            about=about,
            why="0.02 nats is 2% of perplexity",
        )

    yield finding(
        "one factor for activations with outliers costs 0.02 nats", "tensor", 0.02, True, tensor
    )
    yield finding("with smoothing it costs less", "smoothing", 0.02, False, tensor, "smoothquant")
    yield evidence.in_every_run(
        "one factor for weights with outliers costs more than one for each channel",
        ("f32",),
        lambda cell: cost(cell, "w=int8@tensor") - cost(cell, "w=int8@channel"),
        lambda nats: nats > 0,
        form="{:+.4f} nats",
        about="weights",
        why="the direction is claimed, not the size",
    )


def claim() -> Claim:
    """The claim, its small version and the nearest to the paper's size."""
    return Claim(
        number="A27",
        name="int8_outliers",
        title="int8 with outliers needs channels or smoothing",
        statement=(
            "Where some channels of activations are far larger than others, int8 with one factor "
            "for all fails; moving the outliers into the weights makes it work again."
        ),
        source="Xiao et al. 2023, arXiv 2211.10438, abstract and section 3",
        paper=(
            PaperRow("OPT-175B: one factor for a tensor", "fails", ("tensor", "weights")),
            PaperRow("the same: SmoothQuant", "negligible loss in accuracy", ("smoothing",)),
        ),
        scope="outliers that training makes, in models of billions of parameters",
        judge=judge,
        ablation=ablation(),
        large=ablation(recipes.llama_small()),
        hardware="8 GPUs of 80 GB",
        quick=True,
    )


if __name__ == "__main__":
    run_ablation(ablation)
