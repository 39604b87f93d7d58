"""A23: bf16 moves log-probabilities eight times as far as f16 (Qi et al. 2025, arXiv 2510.26788).

Command:   python -m lmjax reproduce logprob_mismatch
Hardware:  2 CPU cores
Time:      1 run, 20 seconds on a core, after compiling
Expected:  confirmed: bf16 moves log-probabilities 8.0 times as far as f16

Where one program samples and another trains, their roundings differ, and so do the probabilities
they give to the same tokens. The weights are those of one f32 run; held-out tokens are scored in
f32, bf16 and f16. f16 has three bits of significand more, so theory says 8. The same ratio is 3
where a compiler keeps f32 between bf16 operations, which makes this a test of the compiler too.
"""

from collections.abc import Iterator

import numpy as np
import scipy.special

from experiments.ablations import recipes
from lmjax.ablation.claims import Claim, PaperRow
from lmjax.ablation.evidence import Evidence, Finding
from lmjax.ablation.grid import Ablation, Cell
from lmjax.cli.ablation import run_ablation
from lmjax.data import tokenized_corpus
from lmjax.inference import load_model
from lmjax.train import Config


def ablation(base: Config | None = None) -> Ablation:
    """One run, whose weights are scored in several formats."""
    base = base or recipes.small()
    return Ablation(
        name="logprob_mismatch",
        question="How far do bf16 and f16 move the log-probabilities of the same weights?",
        base=base,
        arms={"f32": base},
        varies=(),
        control="f32",
        seeds=(0,),
    )


def log_probabilities(cell: Cell, precision: str, rows: int = 64) -> np.ndarray:
    """What a run's weights give to held-out tokens when computed in a policy, `f64[rows, T]`."""
    model = load_model(cell.directory, precision=precision)
    length = model.config.context
    corpus = tokenized_corpus(model.config.data, window=length + 1, progress=False)
    windows = np.asarray(corpus.validation[: rows * length + 1], np.int32)
    inputs, targets = windows[:-1].reshape(rows, length), windows[1:].reshape(rows, length)
    logits = np.asarray(model.logits_function()(model.params, inputs), np.float64)
    log_p = scipy.special.log_softmax(logits, axis=-1)
    return np.take_along_axis(log_p, targets[..., None], axis=-1)[..., 0]


def ratio_of_errors(cell: Cell) -> float:
    """Root mean square change of log-probabilities by bf16 over that by f16, both against f32."""
    exactly = log_probabilities(cell, "f32")
    error = {
        name: np.sqrt(np.mean((log_probabilities(cell, name) - exactly) ** 2))
        for name in ("mixed_bf16", "mixed_f16")
    }
    return float(error["mixed_bf16"] / error["mixed_f16"])


def judge(evidence: Evidence) -> Iterator[Finding]:
    """The ratio of both errors."""
    yield evidence.in_every_run(
        "bf16 moves log-probabilities 6 to 10 times as far as f16",
        ("f32",),
        ratio_of_errors,
        lambda ratio: 6 <= ratio <= 10,
        about="ratio",
        why="f16 has three more bits of significand, so theory says 8",
    )


def claim() -> Claim:
    """The claim, its small version and the nearest to the paper's size."""
    return Claim(
        number="A23",
        name="logprob_mismatch",
        title="f16 keeps training and inference consistent, bf16 does not",
        statement=(
            "Rounding in bf16 makes the probabilities of training and of inference differ; f16 on "
            "both sides removes most of the difference."
        ),
        source="Qi et al. 2025, arXiv 2510.26788, abstract",
        paper=(
            PaperRow(
                "reinforcement learning of models from 1.5 to 30 billion parameters",
                "f16 removes the mismatch",
                ("ratio",),
            ),
        ),
        scope=(
            "reinforcement learning, where the mismatch does its harm, or about mixtures of experts"
        ),
        judge=judge,
        ablation=ablation(),
        large=ablation(recipes.llama_small()),
        hardware="8 GPUs of 80 GB",
        quick=True,
    )


if __name__ == "__main__":
    run_ablation(ablation)
