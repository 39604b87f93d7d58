"""int4 weights and int8 activations in training: where should their scale factors come from?

Command:   python -m experiments.ablations.qat_factors --processes 2 --threads 1
Hardware:  2 CPU cores
Time:      15 runs, half a minute each on a core
Expected:  2.417 in f32; +0.0002 ± 0.016 by the tensor itself, +0.003 ± 0.050 delayed,
           +0.004 ± 0.041 learned, +0.41 ± 0.31 observed for 100 steps

Weights and activations have one factor for the whole tensor, of the tensor itself, of the largest
magnitude of the last 16 steps (delayed), of the last 100 steps (observed), or learned as LSQ does
(Esser et al. 2020). Held-out losses are those of the quantized model. What quantizing the f32 runs
after training costs, `python -m lmjax evaluate CELL --precision POLICY` says.
"""

from experiments.ablations import recipes
from lmjax.ablation.grid import Ablation
from lmjax.cli.ablation import run_ablation
from lmjax.train import Config

POLICY = "f32,w=int4@tensor{0},x=int8@tensor{0}"
FACTORS = {"tensor": "", "delayed": ".delayed", "observed": ".observed", "learned": ".learned"}


def ablation(base: Config | None = None) -> Ablation:
    """f32, and quantized weights and activations with factors of each kind."""
    base = base or recipes.small()
    quantized = {
        name: recipes.change(base, precision=POLICY.format(option))
        for name, option in FACTORS.items()
    }
    return Ablation(
        name="qat_factors",
        question="Where should the factors of quantized weights and activations come from?",
        base=base,
        arms={"f32": base, **quantized},
        varies=("precision",),
        control="f32",
        seeds=(0, 1, 2),
    )


if __name__ == "__main__":
    run_ablation(ablation)
