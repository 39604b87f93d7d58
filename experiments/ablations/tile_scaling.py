"""A17: fp8 wants factors for tiles and sums in f32 (DeepSeek-V3, arXiv 2412.19437, section 3.3).

Command:   python -m lmjax reproduce tile_scaling
Hardware:  2 CPU cores
Time:      10 seconds; nothing is trained
Expected:  confirmed: tiles win 15.1 dB in e4m3 beside an outlier of 2^16, 0.4 dB beside 2^8, and
           20.3 dB in int8; sums in 14 bits are 28 times better 128 terms at a time

One channel of an activation is planted as an outlier, and the next weight divided by as much, so
that their product stays what it was. With one factor a tensor every other channel moves down by as
much; with one for each 128 channels, 31 of 32 tiles do not notice. What that is worth depends on
the exponents of the format: integers lose an outlier of 2^8, but e4m3 is as precise at 2^-6 as at
2^8 and does not see it before it pushes the rest below 2^-6, near 2^14. The catalogue asked for a
gain of 10 dB at 2^8, for a tensor of 128 channels; that is none in e4m3, and in a tensor of one
tile it could not be.

Tensor cores of Hopper are said to keep about 14 bits of a sum. Here each partial sum is rounded to
nearest at 14 bits of significand, over 4096 terms, or over 128 whose sums are added in f32. The
terms are positive: the sum outgrows them, and the error with it. Where terms cancel, the sum is no
longer than its rounding errors add up to, and the gain is about 5.
"""

import math
from collections.abc import Iterator

import jax.numpy as jnp
import numpy as np

from experiments.ablations import recipes
from lmjax.ablation.claims import Claim, PaperRow
from lmjax.ablation.evidence import Evidence, Finding, holds
from lmjax.ablation.grid import Ablation
from lmjax.cli.ablation import run_ablation
from lmjax.precision import exact, parse_policy
from lmjax.precision.matmul import einsum
from lmjax.train import Config

CHANNELS, TILE = 4096, 128
NARROW_SUM = "e8m13@block1"
SITE = "blocks/0/mlp/up"


def ablation(base: Config | None = None) -> Ablation:
    """bf16, and e4m3 everywhere with factors for tensors and for tiles."""
    base = base or recipes.small()

    def fp8(groups: str) -> Config:
        operands = ",".join(f"{operand}=e4m3@{groups}" for operand in "wxg")
        return recipes.change(base, precision=f"mixed_bf16,{operands}")

    return Ablation(
        name="tile_scaling",
        question="What does e4m3 cost for all operands, with a factor a tensor or a tile?",
        base=recipes.change(base, precision="mixed_bf16"),
        arms={
            "bf16": recipes.change(base, precision="mixed_bf16"),
            "tensor": fp8("tensor"),
            "tile": fp8(f"block{TILE}"),
        },
        varies=("precision",),
        control="bf16",
        seeds=(0, 1, 2),
    )


def signal_to_noise(quantizer: str, outlier: float, rows: int = 64) -> float:
    """Decibels of a product over the error that rounding its activations makes in it.

    Args:
      quantizer: of the activations; the weights stay in f32.
      outlier: factor of one channel, by which its weights are divided.
      rows: of activations, and columns of weights.
    """
    generator = np.random.default_rng(0)
    x = generator.normal(size=(1, rows, CHANNELS))
    w = generator.normal(size=(CHANNELS, rows))
    wanted = x @ w
    x[..., 0] *= outlier
    w[0] /= outlier
    site = parse_policy(f"f32,x={quantizer}").resolve(SITE)
    product = exact.jit(lambda x, w: einsum("btk,kn->btn", x, w, site))
    found = product(jnp.asarray(x, jnp.float32), jnp.asarray(w, jnp.float32))
    error = np.asarray(found, np.float64) - wanted
    return 10 * math.log10(np.mean(wanted**2) / np.mean(error**2))


def gain(number_format: str, outlier: float) -> float:
    """Decibels that a factor for each tile wins over one for the tensor."""
    tensor, tile = f"{number_format}@tensor", f"{number_format}@block{TILE}"
    return signal_to_noise(tile, outlier) - signal_to_noise(tensor, outlier)


def summation_error(terms: int, rows: int = 64) -> float:
    """Mean relative error of sums of `CHANNELS` numbers from U(0.5, 1.5).

    Args:
      terms: how many go into one narrow accumulator; what those hold is added in f64.
      rows: number of sums.
    """
    x = np.random.default_rng(0).uniform(0.5, 1.5, (rows, CHANNELS)).astype(np.float32)
    chunks = jnp.asarray(x.reshape(rows, -1, terms).swapaxes(0, 1))
    ones = jnp.ones((chunks.shape[0], terms, 1), jnp.float32)
    site = parse_policy(f"f32,a={NARROW_SUM}").resolve(SITE)
    parts = exact.jit(lambda x, w: einsum("ctk,ckn->ctn", x, w, site))(chunks, ones)
    found, wanted = np.asarray(parts, np.float64).sum((0, 2)), x.astype(np.float64).sum(-1)
    return float(np.mean(np.abs(found - wanted) / wanted))


def judge(evidence: Evidence) -> Iterator[Finding]:
    """The gain of tiles by format and outlier, and that of short narrow sums."""
    for number_format, exponent in (("e4m3", 16), ("int8", 8)):
        decibels = gain(number_format, 2.0**exponent)
        yield holds(
            f"beside an outlier of 2^{exponent} tiles win 10 dB in {number_format}, or more",
            f"{decibels:.4g} dB",
            decibels >= 10,
        )
    decibels = gain("e4m3", 2.0**8)
    yield holds(
        "beside an outlier of 2^8 they win less than 1 dB in e4m3",
        f"{decibels:.4g} dB",
        decibels < 1,
    )
    alone, promoted = summation_error(CHANNELS), summation_error(TILE)
    yield holds(
        f"{CHANNELS} terms summed in 14 bits are 10 times as wrong as {TILE} at a time, or more",
        f"{alone:.4g} against {promoted:.4g}, {alone / promoted:.0f} times",
        alone >= 10 * promoted,
        about="narrow_sum",
        why="positive terms make the error grow with their number, and 4096 is 32 times 128",
    )


def claim() -> Claim:
    """The claim; its small version is arithmetic, the large one trains."""
    return Claim(
        number="A17",
        name="tile_scaling",
        title="fp8 wants factors for tiles and long sums in f32",
        statement=(
            "A factor for each tile of 128 keeps outliers from spoiling e4m3 for the rest of a "
            "tensor, and adding partial sums in f32 every 128 terms repairs narrow accumulators."
        ),
        source="DeepSeek-AI 2024, arXiv 2412.19437, section 3.3 and appendix B",
        paper=(
            PaperRow(
                "relative loss error of fp8 against bf16, two models, about 1 trillion tokens",
                "below 0.25%",
            ),
            PaperRow(
                "sums of 4096 terms in the tensor cores of an H800, largest relative error",
                "nearly 2%",
                ("narrow_sum",),
            ),
        ),
        scope=(
            "training: neither about the loss of models with 16 or 230 billion parameters, "
            "nor about outliers as they really occur"
        ),
        judge=judge,
        ablation=None,
        large=ablation(recipes.llama_small()),
        hardware="8 GPUs of 80 GB a run; factors are emulated",
    )


if __name__ == "__main__":
    run_ablation(ablation)
