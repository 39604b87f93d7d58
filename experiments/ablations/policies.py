"""Six policies on one recipe: what each costs in held-out loss, compared with f32.

Command:   python -m experiments.ablations.policies --processes 2
Hardware:  2 CPU cores
Time:      a little over 90 minutes for the 21 runs, with other work on the two cores
Expected:  f32 1.7893 nats per byte; bf16 and f16, with dynamic and with predictive loss scale,
           equivalent within 0.01; fp8 +0.0086 and mxfp8 +0.0072, within 0.01 on average, but with
           too wide an interval to say so; mxfp8 with factors as specified +0.0113

The recipe is that of experiments.char_shakespeare. Each policy is trained with the same seeds, so
with the same initial parameters and batches, and compared with f32 seed by seed. mixed_f16 brings
its dynamic loss scale along; the arm beside it predicts the scale from how cotangents spread. A
difference of 0.01 nats counts as none.
"""

import dataclasses

from experiments import char_shakespeare
from lmjax.ablation import Ablation
from lmjax.cli.ablation import run_ablation
from lmjax.optim.loss_scale import LossScaleConfig

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
    run_ablation(ablation)
