"""A18: fewer bits cost more, and more after longer training (Kumar et al. 2024, arXiv 2411.04330).

Command:   python -m lmjax reproduce bits_and_tokens
Hardware:  2 CPU cores
Time:      15 runs, three of them of 4 times as many steps; the others take 20 seconds on a core
Expected:  refuted at this size: trained with 6 bits the loss is 0.0012 ± 0.0015 nats below that of
           f32. 4 bits cost +0.005 ± 0.012 and 3 bits +0.004 ± 0.009, which three seeds cannot
           put in order. Quantized afterwards, as claimed, 4 times the tokens make 3 bits cost 0.04
           to 0.07 nats more, and 4 bits 0.006 to 0.012

Weights are integers with one factor for each output channel, and nothing else is quantized. Trained
with them, a model has an effective number of parameters that falls with the bits. Quantized when an
f32 run is over, its weights lose more the more tokens they have seen: 0.2 million tokens here
against 0.8 million, each run with a schedule of its own length. Sizes of the model are not varied.
"""

import functools
from collections.abc import Iterator

from experiments.ablations import recipes
from lmjax.ablation.claims import Claim, PaperRow
from lmjax.ablation.evidence import WORSE, Evidence, Finding
from lmjax.ablation.grid import Ablation, Cell
from lmjax.cli.ablation import run_ablation
from lmjax.inference import evaluate, load_model
from lmjax.train import Config

TRAINED = (3, 4, 6)
AFTERWARDS = (3, 4)
LONGER = 4


def weights_of(bits: int) -> str:
    """f32 with weights of so many bits as operands."""
    return f"f32,w=int{bits}@channel"


def ablation(base: Config | None = None) -> Ablation:
    """f32, integer weights, and f32 on four times the tokens."""
    base = base or recipes.small()
    return Ablation(
        name="bits_and_tokens",
        question="What do weights of few bits cost, trained with or quantized afterwards?",
        base=base,
        arms={
            "f32": base,
            **{f"int{bits}": recipes.change(base, precision=weights_of(bits)) for bits in TRAINED},
            "f32_longer": recipes.change(base, steps=LONGER * base.steps),
        },
        varies=("precision", "steps"),
        control="f32",
        seeds=(0, 1, 2),
    )


def damage(cell: Cell, bits: int) -> float:
    """By how many nats rounding the weights of a finished run to so many bits raises its loss."""
    model = load_model(cell.directory, precision=weights_of(bits))
    return evaluate(model, progress=False).eval_loss - cell.value


def judge(evidence: Evidence) -> Iterator[Finding]:
    """The order of bits in training, and of tokens afterwards."""
    yield evidence.gap("trained with 6-bit weights a model is worse than in f32", "int6", WORSE)
    yield evidence.exceeds("4 bits cost more than 6", "int4", "int6", factor=1.0)
    yield evidence.exceeds("3 bits cost more than 4", "int3", "int4", factor=1.0)
    short = evidence.cells("f32")
    growth = lambda bits, cell: damage(cell, bits) - damage(short[cell.seed], bits)
    for bits in AFTERWARDS:
        yield evidence.in_every_run(
            f"quantizing to {bits} bits afterwards costs more after {LONGER} times the tokens",
            ("f32_longer",),
            functools.partial(growth, bits),
            lambda growth: growth > 0,
            form="{:+.4g}",
            about=f"afterwards{bits}",
        )


def claim() -> Claim:
    """The claim, its small version and the nearest to the paper's size."""
    return Claim(
        number="A18",
        name="bits_and_tokens",
        title="fewer bits cost more, the more so after longer training",
        statement=(
            "Training in fewer bits lowers the effective number of parameters; the loss that "
            "quantization after training adds grows with the tokens trained on."
        ),
        source="Kumar et al. 2024, arXiv 2411.04330, abstract",
        paper=(
            PaperRow(
                "over 465 runs of models up to 1.7 billion parameters on up to 26 billion tokens",
                "more training data can be harmful if the model is quantized afterwards",
                tuple(f"afterwards{bits}" for bits in AFTERWARDS),
            ),
        ),
        scope=(
            "the scaling law itself: one size of model and two lengths of training cannot fit"
            " one, and the paper's sizes begin at 30 million parameters"
        ),
        judge=judge,
        ablation=ablation(),
        large=ablation(recipes.gpt2_small()),
        hardware="8 GPUs of 80 GB a run, four times as long for f32_longer",
    )


if __name__ == "__main__":
    run_ablation(ablation)
