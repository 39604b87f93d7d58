"""A1: f16 needs loss scaling (Micikevicius et al. 2018, arXiv 1710.03740).

Command:   python -m lmjax reproduce loss_scaling
Hardware:  2 CPU cores
Time:      18 runs, a quarter of a minute each on a core, after compiling
Expected:  confirmed: f16 without scaling +1.068 ± 0.026 nats at 2^-10; with dynamic scaling
           -0.00002 ± 0.00010; bf16 +0.0001 ± 0.0004

The cotangent of the logits is (p - y) / N for N tokens. In f16 it rounds to 0 below 2^-25, and as p
is about 1 / V for V classes at the start, what pushes wrong classes down dies at N V = 2^25 while
what pulls the right one up survives: the gradient is wrong and not just small. N V is 2^17 here;
the gradients are multiplied by 2^-10, as if batch and vocabulary were larger.

Gradients are clipped to a norm of 2^-10, so that clipping does what it would do without. The
control is f32 at the same multiplier, because Adam's eps weighs more against small gradients.
"""

from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np

from experiments.ablations import loss_scale_invariants, recipes
from lmjax.ablation.claims import Claim, PaperRow
from lmjax.ablation.evidence import WORSE, Evidence, Finding, Margin, holds, last_row, watched
from lmjax.ablation.grid import Ablation, Cell
from lmjax.cli.ablation import run_ablation
from lmjax.model import token_losses
from lmjax.precision import exact, parse_policy
from lmjax.train import Config

TOKENS, VOCABULARY = 512, 128
COLLAPSE = Margin.at_least(
    0.5, "it is about half of the 1.05 and 1.08 nats that two seeds of a similar model had shown"
)


def ablation(base: Config | None = None) -> Ablation:
    """f32, bf16, and f16 with and without loss scaling, on gradients times 2^-10 and 2^-6."""
    base = base or recipes.small()

    def at(exponent: int, **changes: object) -> Config:
        factor = 2.0**exponent
        return recipes.change(
            base, loss_multiplier=factor, optimizer={"clip_norm": factor}, **changes
        )

    none = {"kind": "none", "max_consecutive_skips": base.steps}
    return Ablation(
        name="loss_scaling",
        question="What does f16 cost without loss scaling, and with it?",
        base=at(-10),
        arms={
            "f32": at(-10),
            "bf16": at(-10, precision="mixed_bf16"),
            "f16_dynamic": at(-10, precision="mixed_f16", loss_scale={"growth_interval": 100}),
            "f16_none": at(-10, precision="mixed_f16", loss_scale=none),
            "f32_at_2-6": at(-6),
            "f16_none_at_2-6": at(-6, precision="mixed_f16", loss_scale=none),
        },
        varies=(
            "precision",
            "loss_scale.growth_interval",
            "loss_scale.max_consecutive_skips",
            "loss_multiplier",
            "optimizer.clip_norm",
        ),
        control="f32",
        controls={"f16_none_at_2-6": "f32_at_2-6"},
        seeds=(0, 1, 2),
    )


def logit_cotangent(exponent: int) -> tuple[float, float]:
    """Of the f16 logit cotangent of a new model, whose loss is multiplied by `2**exponent`.

    Returns:
      The share of zeros, and the mean sum of a row in units of what the true class gets. That sum
      is 0 without rounding.
    """
    generator = np.random.default_rng(0)
    logits = jnp.asarray(generator.normal(0, 0.02, (1, TOKENS, VOCABULARY)), jnp.float16)
    targets = jnp.asarray(generator.integers(0, VOCABULARY, (1, TOKENS)), jnp.int32)
    site = parse_policy("mixed_f16").resolve("loss")

    def loss(logits: jax.Array) -> jax.Array:
        return jnp.mean(token_losses(logits, targets, site).cross_entropy) * 2.0**exponent

    cotangent = np.asarray(exact.jit(jax.grad(loss))(logits)[0], np.float64)
    true_class = 2.0**exponent / TOKENS * (1 - 1 / VOCABULARY)
    return float(np.mean(cotangent == 0)), float(cotangent.sum(-1).mean() / true_class)


def zero_gradients(cell: Cell) -> float:
    """Share of the weight gradients of all blocks that are 0 in the last watched step."""
    tensors = watched(cell)[-1]["tensors"]
    blocks = [
        row for path, row in tensors.items() if path.startswith("blocks") and path.endswith("dw")
    ]
    size = sum(row["size"] for row in blocks)
    return sum((row["zero"] + row["underflow"]) * row["size"] for row in blocks) / size


def judge(evidence: Evidence) -> Iterator[Finding]:
    """The law of the cotangent, what scaling must not change, the gaps, parity, the mechanism."""
    for exponent, zeros in ((-6, 0.0), (-9, 0.50), (-10, 0.992)):
        share, row_sum = logit_cotangent(exponent)
        yield holds(
            f"of the f16 logit cotangent of a new model {zeros:.0%} is 0 at 2^{exponent}",
            f"{share:.1%}; a row, whose exact sum is 0, sums to {row_sum:+.4g} times the entry of "
            "its true class",
            abs(share - zeros) < 0.03,
            why="3 points are allowed around what two seeds of a similar model had shown",
        )
    yield from loss_scale_invariants.findings()
    yield evidence.gap(
        "f16 without loss scaling is worse by 0.5 nats at 2^-10", "f16_none", COLLAPSE
    )
    yield evidence.between(
        "f16 with dynamic scaling is within 0.005 of f32", "f16_dynamic", recipes.PARITY
    )
    yield evidence.between("bf16 without scaling is within 0.005 of f32", "bf16", recipes.PARITY)
    yield evidence.gap(
        "without scaling it is worse at 2^-10 than at 2^-6",
        "f16_none",
        WORSE,
        control="f16_none_at_2-6",
    )
    yield evidence.in_every_run(
        "without scaling more than half of the weight gradients are 0 at the end",
        ("f16_none",),
        zero_gradients,
        lambda share: share > 0.5,
    )
    yield evidence.in_every_run(
        "f32 has less than 5% zeros there", ("f32",), zero_gradients, lambda share: share < 0.05
    )
    yield evidence.in_every_run(
        "the dynamic scale ends above 2^10",
        ("f16_dynamic",),
        lambda cell: last_row(cell, "loss_scale"),
        lambda scale: scale > 2**10,
    )


def claim() -> Claim:
    """The claim, its small version and the nearest to the paper's size."""
    return Claim(
        number="A1",
        name="loss_scaling",
        title="f16 needs loss scaling",
        statement=(
            "With f16 activations and gradients some networks diverge unless the loss is scaled; "
            "scaling restores the accuracy of f32 with no other change."
        ),
        source="Micikevicius et al. 2018, arXiv 1710.03740, section 3.2, table 2",
        paper=(
            PaperRow(
                "SSD, VOC07 mAP: f32, f16, f16 with loss scale 8, as a summary quotes it",
                "76.9, diverges, 77.1",
                ("f16_none", "f16_dynamic"),
            ),
            PaperRow(
                "Faster R-CNN, the same, as a summary quotes it",
                "69.1, 68.6, 69.7",
                ("f16_none", "f16_dynamic"),
            ),
        ),
        scope=(
            "the convolutional detectors and the LSTMs of the paper, about batches of 0.5 "
            "million tokens, or about how long a large run lasts before it diverges"
        ),
        judge=judge,
        ablation=ablation(),
        large=ablation(recipes.gpt2_small()),
        hardware="8 GPUs of 80 GB a run",
        quick=True,
    )


if __name__ == "__main__":
    run_ablation(ablation)
