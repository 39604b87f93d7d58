"""A26: GPTQ quantizes weights to 4 bits better than rounding to nearest (Frantar et al. 2023).

Command:   python -m lmjax reproduce gptq
Hardware:  2 CPU cores
Time:      3 runs, shared with other claims, 20 seconds each on a core, and a minute after them
Expected:  confirmed: GPTQ costs 0.21 to 0.42 of what rounding to nearest does at 4 bits, and at
           most 0.15 of it at 3 bits

Weights of trained f32 runs are rounded to int4 and int3 with one factor for each output, as in the
paper, to nearest and by GPTQ with 64 windows of the training text. What counts is by how much the
loss on the whole held-out text rises.
"""

import functools
from collections.abc import Iterator

from experiments.ablations import recipes
from lmjax.ablation.claims import Claim, PaperRow
from lmjax.ablation.evidence import Evidence, Finding
from lmjax.ablation.grid import Ablation, Cell
from lmjax.cli.ablation import run_ablation
from lmjax.compression import QuantizeConfig, quantize
from lmjax.compression.request import Method
from lmjax.inference import evaluate, load_model
from lmjax.train import Config


def ablation(base: Config | None = None) -> Ablation:
    """Runs in f32, to be quantized afterwards."""
    base = base or recipes.small()
    return Ablation(
        name="gptq",
        question="What do 4 and 3 bits cost after training, to nearest and with GPTQ?",
        base=base,
        arms={"f32": base},
        varies=(),
        control="f32",
        seeds=(0, 1, 2),
    )


def cost(cell: Cell, policy: str, method: Method = "nearest") -> float:
    """By how much quantizing the weights of a run raises its held-out loss, in nats."""
    model = load_model(cell.directory)
    made = quantize(model, QuantizeConfig(policy, method=method)).model
    loss = evaluate(made, progress=False).eval_loss
    return loss - evaluate(model, progress=False).eval_loss


def ratio(cell: Cell, policy: str) -> float:
    """What GPTQ costs over what rounding to nearest costs."""
    return cost(cell, policy, "gptq") / cost(cell, policy)


def judge(evidence: Evidence) -> Iterator[Finding]:
    """GPTQ against nearest, at two widths."""
    for bits in (4, 3):
        yield evidence.in_every_run(
            f"with {bits} bits GPTQ costs less than rounding to nearest",
            ("f32",),
            functools.partial(ratio, policy=f"w=int{bits}@channel"),
            lambda share: share < 1,
            form="{:.2f} of its cost",
            about=f"int{bits}",
            why="both are measured on the same weights and the same text",
        )


def claim() -> Claim:
    """The claim, its small version and the nearest to the paper's size."""
    return Claim(
        number="A26",
        name="gptq",
        title="GPTQ beats rounding to nearest at 4 and 3 bits",
        statement=(
            "Rounding weights one input after the other, with the error passed on to the inputs "
            "that are still to come, keeps models usable at 3 and 4 bits."
        ),
        source="Frantar et al. 2023, arXiv 2210.17323, abstract and section 4",
        paper=(
            PaperRow("models of 175 billion parameters: 4 bits", "negligible loss", ("int4",)),
            PaperRow("the same: 3 bits", "negligible loss", ("int3",)),
            PaperRow("the same: to nearest at 3 bits", "fails"),
        ),
        scope="models of billions of parameters, where rounding to nearest fails altogether",
        judge=judge,
        ablation=ablation(),
        large=ablation(recipes.llama_small()),
        hardware="8 GPUs of 80 GB",
        quick=True,
    )


if __name__ == "__main__":
    run_ablation(ablation)
