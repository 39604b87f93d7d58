"""A28: 2:4 sparsity with fine-tuning recovers what pruning lost (Mishra et al. 2021).

Command:   python -m lmjax reproduce two_of_four
Hardware:  2 CPU cores
Time:      9 runs, 3 of them shared with other claims, 20 seconds each on a core, after compiling
Expected:  confirmed: +0.034 ± 0.005 nats without fine-tuning, +0.014 with it

Two of four inputs in a row keep their weight in every product of the blocks, by magnitude: at once
after half of the steps, so that the other half is fine-tuning, or just before the last step. The
paper trains for as long again after pruning and recovers everything; here the run has the length of
the dense one, and half is asked for.
"""

from collections.abc import Iterator

import numpy as np

from experiments.ablations import recipes
from lmjax.ablation.claims import Claim, PaperRow
from lmjax.ablation.evidence import WORSE, Evidence, Finding
from lmjax.ablation.grid import Ablation, Cell
from lmjax.cli.ablation import run_ablation
from lmjax.inference import load_model
from lmjax.model import weights
from lmjax.precision import paths
from lmjax.train import Config


def ablation(base: Config | None = None) -> Ablation:
    """Dense, pruned halfway, and pruned at the end."""
    base = base or recipes.small()

    def pruned(start: int) -> Config:
        return recipes.change(base, pruning={"pattern": "2:4", "start": start})

    return Ablation(
        name="two_of_four",
        question="What does 2:4 sparsity cost, with and without fine-tuning?",
        base=base,
        arms={
            "dense": base,
            "at_the_end": pruned(base.steps - 1),
            "fine_tuned": pruned(base.steps // 2),
        },
        varies=("pruning.pattern", "pruning.start"),
        control="dense",
        seeds=(0, 1, 2),
    )


def sparsity(cell: Cell) -> float:
    """The largest share of weights in four inputs in a row that are not zero."""
    model = load_model(cell.directory)
    flat = paths.flatten(model.params)
    stack = model.phase.layout.stack
    shares = []
    for path in weights(model.config.model, model.sites):
        if stack.holds(path):
            kernel = np.asarray(flat[path])
            groups = kernel.reshape(*kernel.shape[:-2], -1, 4, kernel.shape[-1])
            shares.append(float(np.mean(groups != 0, axis=-2).max()))
    return max(shares)


def judge(evidence: Evidence) -> Iterator[Finding]:
    """What is lost, and what comes back."""
    yield evidence.gap("2:4 without fine-tuning is worse than dense", "at_the_end", WORSE)
    yield evidence.exceeds(
        "fine-tuning recovers half of what is lost", "at_the_end", "fine_tuned", factor=2
    )
    yield evidence.in_every_run(
        "at most two of four weights are not zero at the end",
        ("at_the_end", "fine_tuned"),
        sparsity,
        lambda share: share == 0.5,
        about="zeros",
    )


def claim() -> Claim:
    """The claim, its small version and the nearest to the paper's size."""
    return Claim(
        number="A28",
        name="two_of_four",
        title="2:4 sparsity with fine-tuning recovers",
        statement=(
            "Pruned to two of four weights by magnitude and trained further, networks keep the "
            "accuracy of the dense ones."
        ),
        source="Mishra et al. 2021, arXiv 2104.08378, abstract",
        paper=(
            PaperRow(
                "many tasks and networks, BERT among them: 2:4 after retraining",
                "the accuracy of dense networks",
                ("at_the_end",),
            ),
        ),
        scope="retraining as long as training, downstream tasks, or speed",
        judge=judge,
        ablation=ablation(),
        large=ablation(recipes.gpt2_small()),
        hardware="8 GPUs of 80 GB a run",
        quick=True,
    )


if __name__ == "__main__":
    run_ablation(ablation)
