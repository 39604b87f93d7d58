"""A14: MXFP6 trains like f32, MXFP4 weights nearly so (Rouhani et al. 2023, arXiv 2310.10537).

Command:   python -m lmjax reproduce mx_formats
Hardware:  2 CPU cores
Time:      12 runs, 20 seconds each on a core, after compiling
Expected:  undecided: MXFP4 everywhere is worse than MXFP4 weights by 0.013 ± 0.009 nats; the
           rest is smaller than three seeds can tell: MXFP6 +0.005 ± 0.016, MXFP4 weights
           against MXFP6 weights -0.001 ± 0.016

32 numbers share a power of two; each then has 6 bits (e3m2 here) or 4 (e2m1), rounded to nearest.
Operands of the products inside the blocks are rounded, forwards and backwards; attention scores,
head and everything else stay in bf16. That MXFP6 is worse than f32 at all is not claimed, and so
not asked: the order begins with it. The differences are expected to be small for three seeds; what
these cannot tell stays undecided.
"""

from collections.abc import Iterator

from experiments.ablations import recipes
from lmjax.ablation.claims import Claim, PaperRow
from lmjax.ablation.evidence import WORSE, Evidence, Finding, Margin
from lmjax.ablation.grid import Ablation
from lmjax.cli.ablation import run_ablation
from lmjax.train import Config

NEAR = Margin(
    -0.005,
    0.03,
    "a small cost is expected and none is claimed: below zero it reaches as far as parity does, "
    "above to about 1% of the loss",
)


def ablation(base: Config | None = None) -> Ablation:
    """f32, MXFP6, MXFP4 weights with MXFP6 for the rest, and MXFP4 alone."""
    base = base or recipes.small()

    def arm(weights: str, rest: str) -> Config:
        return recipes.change(base, precision=f"mixed_bf16,w={weights},x={rest},g={rest}")

    return Ablation(
        name="mx_formats",
        question="What do products of block-scaled numbers of 6 and 4 bits cost?",
        base=base,
        arms={
            "f32": base,
            "mxfp6": arm("mxfp6", "mxfp6"),
            "mxfp4_weights": arm("mxfp4", "mxfp6"),
            "mxfp4": arm("mxfp4", "mxfp4"),
        },
        varies=("precision",),
        control="f32",
        seeds=(0, 1, 2),
    )


def judge(evidence: Evidence) -> Iterator[Finding]:
    """MXFP6 near f32, and the order of the three."""
    yield evidence.between("MXFP6 minus f32 is between -0.005 and 0.03 nats", "mxfp6", NEAR)
    yield evidence.gap(
        "MXFP4 weights are worse than MXFP6 weights", "mxfp4_weights", WORSE, control="mxfp6"
    )
    yield evidence.gap(
        "MXFP4 everywhere is worse than MXFP4 weights", "mxfp4", WORSE, control="mxfp4_weights"
    )


def claim() -> Claim:
    """The claim, its small version and the nearest to the paper's size."""
    return Claim(
        number="A14",
        name="mx_formats",
        title="MXFP6 matches f32, MXFP4 weights come close",
        statement=(
            "With weights, activations and gradients in MXFP6 language models train to the loss of "
            "f32 with the recipe unchanged; MXFP4 weights beside MXFP6 cost little more."
        ),
        source="Rouhani et al. 2023, arXiv 2310.10537",
        paper=(
            PaperRow(
                "generative language models trained in MXFP6, as a summary quotes it",
                "match FP32 with the recipe unchanged",
                ("mxfp6",),
            ),
            PaperRow(
                "MXFP4 weights with MXFP6 activations and gradients, as a summary quotes it",
                "close to FP32",
                ("mxfp4_weights",),
            ),
        ),
        scope=(
            "models of 20 million parameters and more, on which the paper's order of formats rests"
        ),
        judge=judge,
        ablation=ablation(),
        large=ablation(recipes.gpt2_small()),
        hardware="8 GPUs of 80 GB a run; the formats are emulated",
    )


if __name__ == "__main__":
    run_ablation(ablation)
