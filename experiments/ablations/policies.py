"""Six policies on one recipe: what each costs in held-out loss, compared with f32.

Command:   python -m experiments.ablations.policies --processes 2
Hardware:  2 CPU cores
Time:      not measured here; 18 runs of char_shakespeare, of which f32 takes about 2 minutes
Expected:  not measured here as a whole; f32 alone reaches 1.793 nats per byte with seed 0

The recipe is that of experiments.char_shakespeare. Each policy is trained with the same seeds, so
with the same initial parameters and batches, and compared with f32 seed by seed. mixed_f16 brings
its dynamic loss scale along; the arm beside it predicts the scale from how cotangents spread. A
difference of 0.01 nats counts as none.
"""

import dataclasses

from experiments import char_shakespeare
from lmjax.ablation import Ablation
from lmjax.ablation_cli import run_ablation
from lmjax.loss_scale import LossScaleConfig

POLICIES = ("f32", "mixed_bf16", "mixed_f16", "fp8", "mxfp8")
MX = "mixed_bf16,w=mxfp8,x=mxfp8,g=mxfp8"


def ablation() -> Ablation:
    """The recipe under each policy, with three seeds."""
    base = char_shakespeare.config()
    arms = {policy: dataclasses.replace(base, precision=policy) for policy in POLICIES}
    arms["mxfp8, factors as specified"] = dataclasses.replace(base, precision=MX)
    arms["mixed_f16 predictive"] = dataclasses.replace(
        arms["mixed_f16"], loss_scale=LossScaleConfig(kind="predictive")
    )
    return Ablation(
        name="policies",
        question="What does each policy cost on nanoGPT's CPU recipe, compared with f32?",
        base=base,
        arms=arms,
        varies=("precision", "loss_scale.kind"),
        control="f32",
        seeds=(0, 1, 2),
        margin=0.01,
    )


if __name__ == "__main__":
    run_ablation(__spec__.name, ablation)
