"""A21: rotary positions in bf16 go wrong at long contexts (Wang et al. 2024, arXiv 2411.13476).

Command:   python -m lmjax reproduce rope_positions
Hardware:  2 CPU cores
Time:      10 seconds; nothing is trained
Expected:  confirmed: at position 4096 scores are wrong by 0.70 with angles in bf16, by 0.0019 with
           angles in f32

bf16 has no odd integers above 256, so angles computed in it are wrong by radians at long positions
and scores no longer depend on distance alone. Angles computed in f32 and rounded as sine and cosine
do not have that error. What a pretrained model makes of it cannot be seen at this size.
"""

from collections.abc import Callable, Iterator

import jax.numpy as jnp
import numpy as np

from experiments.ablations import recipes
from lmjax.ablation.claims import Claim
from lmjax.ablation.evidence import Evidence, Finding, holds
from lmjax.ablation.grid import Ablation
from lmjax.cli.ablation import run_ablation
from lmjax.model import ModelConfig
from lmjax.model.attention import rotary_angles, rotate
from lmjax.precision import parse_policy
from lmjax.train import Config

NARROW, ROUNDED = "; **/rope: c=bf16", "; **/rope: c=f32,o=bf16"
BASE = 10000.0


def ablation(base: Config | None = None) -> Ablation:
    """bf16 with rotary angles in f32 and in bf16."""
    base = base or recipes.small(model={"positions": "rope"})
    return Ablation(
        name="rope_positions",
        question="What do rotary angles in bf16 cost at the context that they are trained with?",
        base=recipes.change(base, precision="mixed_bf16"),
        arms={
            "f32": recipes.change(base, precision="mixed_bf16"),
            "bf16": recipes.change(base, precision="mixed_bf16" + NARROW),
        },
        varies=("precision",),
        control="f32",
        seeds=(0, 1, 2),
    )


def rotary_error(rule: str, start: int, distance: int = 16, pairs: int = 256) -> float:
    """Mean error of scores q(start + distance) . k(start) of N(0, 1) vectors, 64 wide.

    Args:
      rule: appended to the policy `f32`.
      start: position of the key.
      distance: from the key to the query.
      pairs: of queries and keys.
    """
    config = ModelConfig(width=64, heads=1, positions="rope", rope_base=BASE)
    site = parse_policy(f"f32{rule}").resolve("blocks/0/attention/rope")
    q, k = np.random.default_rng(0).normal(size=(2, pairs, 1, 1, 64))

    def turned(x: np.ndarray, position: int) -> np.ndarray:
        angles = rotary_angles(config, jnp.asarray([position]), site)
        return np.asarray(rotate(jnp.asarray(x, jnp.float32), angles, site), np.float64)

    def exactly(x: np.ndarray, position: int) -> np.ndarray:
        angles = position * BASE ** (-np.arange(32) / 32)
        turn = np.exp(1j * angles) * (x[..., :32] + 1j * x[..., 32:])
        return np.concatenate([turn.real, turn.imag], -1)

    def scores(rotated: Callable[[np.ndarray, int], np.ndarray]) -> np.ndarray:
        return np.sum(rotated(q, start + distance) * rotated(k, start), axis=-1) / 8

    return float(np.mean(np.abs(scores(turned) - scores(exactly))))


def judge(evidence: Evidence) -> Iterator[Finding]:
    """Errors of scores at the first position and at 4096."""
    narrow, wide = ({s: rotary_error(rule, s) for s in (0, 4096)} for rule in (NARROW, ROUNDED))
    yield holds(
        "with angles in bf16 scores at position 4096 are 5 times as wrong as at 0, or more",
        f"{narrow[4096]:.4g} against {narrow[0]:.4g}",
        narrow[4096] >= 5 * narrow[0],
        why="a first measurement of such scores rose from 0.005 to 0.176",
    )
    yield holds(
        "with angles in f32, rounded as sine and cosine, at most twice",
        f"{wide[4096]:.4g} against {wide[0]:.4g}",
        wide[4096] <= 2 * wide[0],
    )
    yield holds(
        "at 4096 angles in bf16 are 5 times as bad as angles in f32, or more",
        f"{narrow[4096]:.4g} against {wide[4096]:.4g}",
        narrow[4096] >= 5 * wide[4096],
    )


def claim() -> Claim:
    """The claim; its small version is arithmetic, the large one trains."""
    return Claim(
        number="A21",
        name="rope_positions",
        title="bf16 breaks rotary positions at long contexts",
        statement=(
            "With rotary embeddings in bf16 attention scores no longer depend on distance alone, "
            "and the error grows with the position."
        ),
        source="Wang et al. 2024, arXiv 2411.13476, figures 1 and 3",
        paper=(),
        scope=(
            "pretrained models, which amplify the error, or about losses and retrieval at "
            "long contexts"
        ),
        judge=judge,
        ablation=None,
        large=ablation(recipes.llama_small()),
        hardware="8 GPUs of 80 GB a run",
        quick=True,
    )


if __name__ == "__main__":
    run_ablation(ablation)
