"""A13: a unit-scaled model needs no loss scale in f16 (Blake et al. 2023, arXiv 2303.11257).

Command:   python -m lmjax reproduce unit_scaling
Hardware:  2 CPU cores
Time:      12 runs, of which six are shared with A1, 20 seconds each on a core, after compiling
Expected:  confirmed: f16 without a loss scale +0.0005 ± 0.0018 nats unit scaled, +1.068 ±
           0.026 in the standard model; tensors start between 0.65 and 1.86

Where every operation keeps the variance, forwards and backwards, operands and cotangents of a new
model are of size 1, in the middle of what f16 holds. The standard model's cotangents shrink with
batch and vocabulary. In all runs gradients are multiplied by 2^-10, as if both were larger, which
unit scaling's constants cancel; the standard arms are those of A1.

What is measured at the start is every product's operands, cotangent and gradients, and what every
other operation hands on and back, on random tokens.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments.ablations import loss_scaling, recipes
from lmjax.ablation.claims import Claim, PaperRow
from lmjax.ablation.evidence import Evidence, Finding, holds
from lmjax.ablation.grid import Ablation
from lmjax.cli.ablation import run_ablation
from lmjax.model import initial_params, layout, site_tree
from lmjax.model.unit_scaling import UnitScaling
from lmjax.parallel import sharding
from lmjax.precision import exact, paths
from lmjax.precision.probes import Rounded
from lmjax.precision.sites import Place
from lmjax.runs.resolved import phase_of
from lmjax.train import Config
from lmjax.train.step import make_scaled_loss

COTANGENTS = frozenset({"g", "dx", "dw"})
EVERYTHING = COTANGENTS | {"w", "x", "y"}


def ablation(base: Config | None = None) -> Ablation:
    """f32, and f16 without a loss scale, of the unit-scaled and of the standard model."""
    base = base or recipes.small()
    standard = loss_scaling.ablation(base)

    def unit(precision: str) -> Config:
        return recipes.change(
            standard.base,
            precision=precision,
            model={"parametrisation": "unit"},
            optimizer={"learning_rate": UnitScaling.usual_rate, "clip_norm": 1.0},
        )

    return Ablation(
        name="unit_scaling",
        question="Does f16 need a loss scale in a unit-scaled model, and in the standard one?",
        base=unit("f32"),
        arms={
            "standard_f32": standard.arms["f32"],
            "standard_f16": standard.arms["f16_none"],
            "unit_f32": unit("f32"),
            "unit_f16": unit("mixed_f16"),
        },
        varies=(
            "precision",
            "model.parametrisation",
            "optimizer.learning_rate",
            "optimizer.clip_norm",
            "loss_scale.max_consecutive_skips",
        ),
        control="unit_f32",
        controls={"standard_f16": "standard_f32"},
        seeds=(0, 1, 2),
    )


class Moments(NamedTuple):
    """What is measured of a tensor (a `Slot`): its size, sum and sum of squares, f32[]."""

    size: jax.Array
    total: jax.Array
    squares: jax.Array

    @classmethod
    def empty(cls) -> Moments:
        """Nothing seen."""
        return cls(*(jnp.zeros((), jnp.float32) for _ in cls._fields))

    @classmethod
    def of(cls, tensor: Rounded) -> Moments:
        """Two sums over the tensor before it is rounded."""
        x = tensor.raw.astype(jnp.float32)
        return cls(jnp.asarray(x.size, jnp.float32), jnp.sum(x), jnp.sum(jnp.square(x)))


def slots(config: Config, slot: Any, roles: frozenset[str]) -> dict[str, Any]:
    """An empty slot for each of these roles at every site that has it."""

    def one(place: Place) -> dict[str, Any]:
        return {role: {"measured": slot.empty()} for role in place.site.roles if role in roles}

    return site_tree(layout(config.model), one)


def gradients(
    config: Config, params: Any, batch: Any, slot: Any = None, roles: frozenset[str] = COTANGENTS
) -> tuple[Any, Any]:
    """The gradients of one batch without a loss scale, and what a slot measured of every tensor.

    Args:
      config: of the run.
      params: of its model.
      batch: `inputs` and `targets`, int32[batch, context].
      slot: class of the slots; None measures nothing.
      roles: what is measured; see `lmjax/precision/probes.py`.
    """
    config = config.resolved()
    mesh = sharding.make_mesh(config.mesh, jax.devices()[:1])
    loss = make_scaled_loss(phase_of(config), mesh)
    keyed = jax.random.key(0), jnp.float32(1.0)
    measured = slots(config, slot, roles) if slot else {}
    return jax.grad(loss, argnums=(0, 4), has_aux=True)(params, batch, *keyed, measured)[0]


def deviations(measured: Any) -> dict[str, np.ndarray]:
    """The standard deviation of every measured tensor, of every block, by path."""
    flat = paths.flatten(measured, lambda node: isinstance(node, Moments))
    return {
        path.removesuffix("/measured"): np.sqrt(m.squares / m.size - np.square(m.total / m.size))
        for path, m in flat.items()
    }


def extremes_at_the_start(config: Config, roles: frozenset[str]) -> tuple[float, float]:
    """The smallest and the largest standard deviation of the tensors of a new model."""
    shape = (config.batch_size, config.context + 1)
    tokens = np.random.default_rng(0).integers(0, config.model.vocab_size, shape, np.int32)
    batch = {"inputs": tokens[:, :-1], "targets": tokens[:, 1:]}

    def measure(key: jax.Array, batch: Any) -> Any:
        params = initial_params(key, config.model, phase_of(config).sites)
        return gradients(config, params, batch, Moments, roles)[1]

    found = deviations(exact.jit(measure)(jax.random.key(0), batch)).values()
    return min(float(np.min(d)) for d in found), max(float(np.max(d)) for d in found)


def judge(evidence: Evidence) -> Iterator[Finding]:
    """The size of numbers at the start, parity with unit scaling, a gap without."""
    arms = ablation().arms
    low, high = extremes_at_the_start(arms["unit_f32"], EVERYTHING)
    yield holds(
        "unit-scaled tensors start with standard deviations between 0.5 and 2",
        f"{low:.4g} to {high:.4g}",
        0.5 <= low <= high <= 2.0,
        why="a factor of 2 around 1 is one binade of f16 to either side",
    )
    low, high = extremes_at_the_start(arms["standard_f32"], COTANGENTS)
    yield holds(
        "cotangents of the standard model stay below 2^-14, where f16 becomes subnormal",
        f"2^{np.log2(low):.0f} to 2^{np.log2(high):.0f}",
        high < 2.0**-14,
    )
    yield evidence.between(
        "unit scaled, f16 without a loss scale is within 0.005 of f32", "unit_f16", recipes.PARITY
    )
    yield evidence.gap(
        "in the standard model it is worse by 0.5 nats", "standard_f16", loss_scaling.COLLAPSE
    )


def claim() -> Claim:
    """The claim, its small version and the nearest to the paper's size."""
    return Claim(
        number="A13",
        name="unit_scaling",
        title="unit scaling trains in f16 without a loss scale",
        statement=(
            "With unit variance of weights, activations and gradients at the start, models train "
            "in f16 and fp8 without loss scaling."
        ),
        source="Blake et al. 2023, arXiv 2303.11257, abstract",
        paper=(PaperRow("BERT-Large in f16, then fp8", "no degradation", ("unit_f16",)),),
        scope=("BERT-Large, fp8, or whether variances stay near 1 over a long training"),
        judge=judge,
        ablation=ablation(),
        large=ablation(recipes.gpt2_small()),
        hardware="8 GPUs of 80 GB a run",
    )


if __name__ == "__main__":
    run_ablation(ablation)
