"""A29: fine-tuning an encoder in f16 with loss scaling matches f32 (Micikevicius et al. 2018).

Command:   python -m lmjax reproduce bert_f16 --processes 2
Hardware:  2 CPU cores; the packages of experiments.bert_classifier
Time:      9 runs, 9 to 14 minutes of processor time each, on an AMD EPYC with AVX512-BF16
Expected:  confirmed: f16 -0.0004 ± 0.0012 of the error rate of f32, bf16 -0.0011 ± 0.0033

The runs are three arms of experiments.ablations.bert_formats, of which those that are done are not
run again. The paper trains networks for images, speech and language from scratch; here MiniLM is
fine-tuned on reviews of films, and compared by the share of 2,522 held-out reviews that it gets
wrong.
"""

import dataclasses
from collections.abc import Iterator

from experiments import bert_classifier
from experiments.ablations import bert_formats, recipes
from lmjax.ablation.claims import Claim, PaperRow
from lmjax.ablation.evidence import Evidence, Finding, Margin, last_row
from lmjax.ablation.grid import Ablation, Cell
from lmjax.cli.ablation import run_ablation
from lmjax.train import Config

PARITY = Margin.within(
    bert_formats.MARGIN,
    "half a percentage point is less than the standard error of an accuracy on 2,522 texts, 0.0065",
)


def ablation(base: Config | None = None) -> Ablation:
    """f32, f16 with loss scaling, and bf16."""
    whole = bert_formats.ablation(base)
    arms = {name: whole.arms[name] for name in ("f32", "f16, scaled", "bf16")}
    return dataclasses.replace(whole, name="bert_f16", arms=arms, varies=("precision",))


def accuracy(cell: Cell) -> float:
    """The share of held-out texts whose class was found."""
    return 1 - cell.value


def judge(evidence: Evidence) -> Iterator[Finding]:
    """Parity of both 16-bit formats, and that the models have learned something."""
    yield evidence.between("f16 with loss scaling gets as many right as f32", "f16, scaled", PARITY)
    yield evidence.between("bf16 gets as many right as f32", "bf16", PARITY)
    yield evidence.in_every_run(
        "at least 88% of reviews are told apart",
        ("f32", "f16, scaled", "bf16"),
        accuracy,
        lambda share: share >= 0.88,
        about="accuracy",
    )
    yield evidence.in_every_run(
        "at most 5% of the steps in f16 are skipped",
        ("f16, scaled",),
        lambda cell: last_row(cell, "skipped_steps"),
        lambda skipped: skipped <= 15,
        about="skipped steps",
    )


def claim() -> Claim:
    """The claim, its small version and the nearest to the paper's size."""
    large = recipes.change(
        bert_classifier.config(),
        context=512,
        model={"width": 768, "layers": 12, "unroll": 1},
        init_from="bert-base-uncased",
    )
    return Claim(
        number="A29",
        name="bert_f16",
        title="f16 with loss scaling matches f32 in fine-tuning an encoder",
        statement=(
            "With an f32 copy of the weights, loss scaling and sums in f32, networks trained in "
            "f16 reach the accuracy of f32."
        ),
        source="Micikevicius et al. 2018, arXiv 1710.03740, abstract",
        paper=(
            PaperRow(
                "classifiers of images, detectors, speech, translation and language models",
                "the accuracy of f32",
                ("f16, scaled",),
            ),
        ),
        scope="other tasks, pretraining, or encoders of another size",
        judge=judge,
        ablation=ablation(),
        large=ablation(large),
        hardware="1 GPU of 16 GB a run, and bert-base-uncased as a folder of Hugging Face",
        needs=bert_classifier.missing(),
    )


if __name__ == "__main__":
    run_ablation(ablation)
