"""MiniLM fine-tuned on reviews in seven formats: what each costs in held-out accuracy.

Command:   python -m experiments.ablations.bert_formats --processes 1 --threads 2
Hardware:  2 CPU cores
Time:      21 runs, 9 minutes of processor time each in bf16, and 14 in f32
Expected:  error rates of 0.1142 in f32, 0.1131 in bf16 and 0.1138 in f16 with loss scaling, both
           equivalent to f32 within 0.005; the other four formats were not measured

The recipe is that of experiments.bert_classifier. All formats are trained with the same seeds, so
with the same new head and the same batches, and compared with f32 seed by seed by the share of
held-out reviews that they get wrong. A difference of half a percentage point counts as none.
"""

from experiments import bert_classifier
from experiments.ablations.recipes import change
from lmjax.ablation import Ablation
from lmjax.cli.ablation import run_ablation
from lmjax.train import Config

EVERYTHING = (
    "p={0},c={0},o={0},mu={0},nu={0}; **/softmax: c={0}; **/norm: c={0}; **/activation: c={0}; "
    "loss: c={0}"
)
"""Parameters, moments and every site; only sums inside products stay in f32."""

ARMS = {
    "f32": "f32",
    "bf16": "mixed_bf16",
    "f16, scaled": "mixed_f16",
    "f16, not scaled": "mixed_f16",
    "f16 products, rest f32": "autocast_f16",
    "all bf16": EVERYTHING.format("bf16"),
    "all f16": EVERYTHING.format("f16"),
}


MARGIN = 0.005
"""A difference of error rates that counts as none."""


def ablation(base: Config | None = None) -> Ablation:
    """The recipe in each format, with three seeds."""
    base = change(base or bert_classifier.config(), precision="f32")
    arms = {name: change(base, precision=policy) for name, policy in ARMS.items()}
    none = {"kind": "none", "max_consecutive_skips": base.steps}
    arms["f16, not scaled"] = change(arms["f16, not scaled"], loss_scale=none)
    return Ablation(
        name="bert_formats",
        question="What does each format cost when MiniLM is fine-tuned on reviews of films?",
        base=base,
        arms=arms,
        varies=("precision", "loss_scale.max_consecutive_skips"),
        control="f32",
        seeds=(0, 1, 2),
        metric="error_rate",
        margin=MARGIN,
    )


if __name__ == "__main__":
    run_ablation(ablation)
