"""A8: narrow accumulators swamp long sums; chunks repair them (Wang et al. 2018, arXiv 1812.08011).

Command:   python -m lmjax reproduce accumulation
Hardware:  2 CPU cores
Time:      2 seconds; nothing is trained
Expected:  confirmed: 1024 terms in bf16 lose 50%, in chunks of 64 0.3%; 16384 terms in f16 lose
           75%, in chunks 0.1%

A running sum of positive terms stops growing where a term is less than half a unit in its last
place. Sums of 64 terms, themselves summed, stay shorter by a factor of 64. No training is needed.
"""

from collections.abc import Iterator

import jax.numpy as jnp
import numpy as np

from experiments.ablations import recipes
from lmjax.ablation.claims import Claim
from lmjax.ablation.evidence import Evidence, Finding, holds
from lmjax.ablation.grid import Ablation
from lmjax.cli.ablation import run_ablation
from lmjax.precision import exact, parse_policy
from lmjax.precision.matmul import einsum
from lmjax.train import Config


def ablation(base: Config | None = None) -> Ablation:
    """f16 products whose sums are kept in f32, in f16, and in f16 by chunks of 64."""
    base = base or recipes.small()
    accumulators = {"f32": "f32", "f16": "f16@block1", "f16_chunked": "f16@block64"}
    return Ablation(
        name="accumulation",
        question="What does it cost to accumulate products in f16, and do chunks repair it?",
        base=recipes.change(base, precision="mixed_f16"),
        arms={
            arm: recipes.change(base, precision=f"mixed_f16,a={accumulator}")
            for arm, accumulator in accumulators.items()
        },
        varies=("precision",),
        control="f32",
        seeds=(0, 1, 2),
    )


def accumulation_error(accumulator: str, terms: int) -> float:
    """Mean relative error of sums of so many numbers from U(0.5, 1.5), by the product of a run."""
    x = np.random.default_rng(0).uniform(0.5, 1.5, (1, 16, terms)).astype(np.float32)
    site = parse_policy(f"f32,a={accumulator}").resolve("head")
    ones = jnp.ones((terms, 1), jnp.float32)
    total = exact.jit(lambda x: einsum("btk,kn->btn", x, ones, site))(x)
    wanted = x.astype(np.float64).sum(-1, keepdims=True)
    return float(np.mean(np.abs(np.asarray(total, np.float64) - wanted) / wanted))


def judge(evidence: Evidence) -> Iterator[Finding]:
    """How much is lost one by one, and how much less by chunks."""
    for name, terms in (("bf16", 1024), ("f16", 16384)):
        alone = accumulation_error(f"{name}@block1", terms)
        chunked = accumulation_error(f"{name}@block64", terms)
        yield holds(
            f"{terms} terms summed in {name} lose a quarter or more",
            f"{alone:.4g}",
            alone >= 0.25,
            why="it is half or less of the 0.50 and 0.75 that a first measurement lost",
        )
        yield holds(
            f"chunks of 64 lose a twentieth of that at most in {name}",
            f"{chunked:.4g}, {alone / chunked:.0f} times less",
            chunked <= alone / 20,
            why="chunks shorten every sum by a factor of 64",
        )


def claim() -> Claim:
    """The claim; its small version is arithmetic, the large one trains."""
    return Claim(
        number="A8",
        name="accumulation",
        title="chunks repair narrow accumulators",
        statement=(
            "Long sums in a 16-bit accumulator lose their terms; adding up chunks of 64 terms "
            "makes 16-bit accumulation as good as that of f32 for training."
        ),
        source="Wang et al. 2018, arXiv 1812.08011, section 2.3",
        paper=(),
        scope=("training with 16-bit accumulators, which the large version is for"),
        judge=judge,
        ablation=None,
        large=ablation(recipes.gpt2_small()),
        hardware="8 GPUs of 80 GB a run; the accumulator is emulated by a scan, which is slow",
        quick=True,
    )


if __name__ == "__main__":
    run_ablation(ablation)
