"""A16: NVFP4 trains with a recipe, and better than MXFP4 (NVIDIA 2025, arXiv 2509.25149).

Command:   python -m lmjax reproduce nvfp4
Hardware:  2 CPU cores
Time:      18 runs, 20 seconds each on a core, after compiling
Expected:  undecided: MXFP4 in the same recipe is worse by 0.008 ± 0.006 nats, as claimed;
           stochastic rounding forwards costs +0.006 ± 0.010, which three seeds cannot tell, and
           the head in FP4 +0.003 ± 0.003

The recipe: all operands of linear layers in NVFP4, gradients rounded stochastically, weights and
activations to nearest, a random Hadamard transform in blocks of 16 of the weight gradient's
operands alone, and embeddings, head, norms, attention scores and the last blocks in high precision.

What is left out: one factor for 16 x 16 weights, so that a weight is the same number forwards and
backwards; blocks here run along the axis that a product sums over. The small model has two blocks,
of which none is spared; of the large one's 16, the last two are. The paper's signs are drawn once,
here for every step.

MXFP4 takes NVFP4's place in the same recipe. The paper sees no difference by the size or the
randomness of the rotation in small models: the arm without it (`no_rht`) is run and reported, but
nothing is claimed of it. That everything in FP4 diverges, as in the paper, is not asked of a small
model either, only that it is not better.
"""

from collections.abc import Iterator

from experiments.ablations import recipes
from lmjax.ablation.claims import Claim, PaperRow
from lmjax.ablation.evidence import WORSE, Evidence, Finding
from lmjax.ablation.grid import Ablation
from lmjax.cli.ablation import run_ablation
from lmjax.precision.policy import OPERANDS
from lmjax.train import Config


def operands(number_format: str, **changes: str) -> str:
    """The recipe in a 4-bit format, as settings of a policy; `changes` replaces some of them."""
    recipe = dict.fromkeys(OPERANDS, number_format)
    recipe |= {"g": f"{number_format}.sr", "xb": f"{number_format}.rht"} | changes
    return ",".join(f"{key}={value}" for key, value in recipe.items())


def ablation(base: Config | None = None, spared: int = 0) -> Ablation:
    """The recipe in NVFP4 and MXFP4, without its rotation, and with what it advises against.

    Args:
      base: the run to change.
      spared: how many of the last blocks stay in bf16, but where everything is in FP4.
    """
    base = recipes.change(base or recipes.small(), precision="mixed_bf16")
    wide = ",".join(f"{key}=bf16" for key in OPERANDS)
    rules = "".join(f"; blocks/-{index}: {wide}" for index in range(1, spared + 1))

    def arm(settings: str, rules: str = rules) -> Config:
        return recipes.change(base, precision=f"mixed_bf16,{settings}{rules}")

    nvfp4 = operands("nvfp4")
    return Ablation(
        name="nvfp4",
        question="What do 4-bit products cost with NVFP4's recipe, and with parts of it changed?",
        base=base,
        arms={
            "bf16": base,
            "nvfp4": arm(nvfp4),
            "mxfp4": arm(operands("mxfp4")),
            "sr_forward": arm(operands("nvfp4", w="nvfp4.sr", x="nvfp4.sr")),
            "head_too": arm(nvfp4, f"; head: {nvfp4}"),
            "no_rht": arm(operands("nvfp4", xb="nvfp4")),
        },
        varies=("precision",),
        control="bf16",
        seeds=(0, 1, 2),
    )


def judge(evidence: Evidence) -> Iterator[Finding]:
    """NVFP4 against MXFP4, and two departures from the recipe."""
    yield evidence.gap(
        "MXFP4 in the same recipe is worse than NVFP4", "mxfp4", WORSE, control="nvfp4"
    )
    yield evidence.gap(
        "stochastic rounding forwards is worse than to nearest",
        "sr_forward",
        WORSE,
        control="nvfp4",
    )
    yield evidence.between(
        "with the head in FP4 too, the recipe is not better by 0.005 nats",
        "head_too",
        recipes.NOT_BETTER,
        control="nvfp4",
    )


def claim() -> Claim:
    """The claim, its small version and the nearest to the paper's size."""
    return Claim(
        number="A16",
        name="nvfp4",
        title="NVFP4 trains with a recipe, and better than MXFP4",
        statement=(
            "With stochastic rounding of gradients alone, rotated weight gradients and a few "
            "layers in bf16, NVFP4 comes near fp8 and nearer to bf16 than MXFP4 does."
        ),
        source="NVIDIA 2025, arXiv 2509.25149, Table 2, Figures 4 and 6",
        paper=(
            PaperRow("MMLU-Pro, 12 billion parameters, 10 trillion tokens: fp8", "62.62"),
            PaperRow("the same: NVFP4", "62.58"),
            PaperRow("relative loss error, 8 billion parameters, 1 trillion tokens: NVFP4", "1.5%"),
            PaperRow(
                "the same relative loss error: MXFP4",
                "2.5%; needs 36% more tokens to match",
                ("mxfp4",),
            ),
            PaperRow("every linear layer in FP4", "diverges", ("head_too",)),
        ),
        scope=(
            "models of 8 or 12 billion parameters, trillions of tokens, or downstream scores;"
            " the paper itself sees no effect of its rotation on small models"
        ),
        judge=judge,
        ablation=ablation(),
        large=ablation(recipes.llama_small(), spared=2),
        hardware="8 GPUs of 80 GB a run; the formats are emulated",
    )


if __name__ == "__main__":
    run_ablation(ablation)
