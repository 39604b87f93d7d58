"""Two formats of a tiny model, as an ablation module; the tests run it as a command.

It trains on the texts in `texts/`, and needs `tests/` in PYTHONPATH.
"""

import dataclasses
from pathlib import Path

from run_helpers import tiny

from lmjax.ablation import Ablation
from lmjax.cli.ablation import run_ablation


def ablation() -> Ablation:
    """f32 and bf16 with two seeds."""
    base = tiny(Path())
    return Ablation(
        name="tiny",
        question="Does bf16 cost anything?",
        base=base,
        arms={"f32": base, "bf16": dataclasses.replace(base, precision="mixed_bf16")},
        varies=("precision",),
        control="f32",
        seeds=(0, 1),
    )


if __name__ == "__main__":
    run_ablation(ablation)
