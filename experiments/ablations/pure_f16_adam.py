"""A3: Adam in f16 is NaN at once with eps = 1e-8 (known from practice; optax issue 1754).

Command:   python -m lmjax reproduce pure_f16_adam
Hardware:  2 CPU cores
Time:      3 runs, a quarter of a minute each on a core, after compiling
Expected:  confirmed: NaN after two updates at eps = 1e-8, finite at 1e-4 with half of the second
           moments lost; in f32 arithmetic parameters in f16 train, moments in f16 do not

1e-8 is 0 in f16, and so is g^2 for |g| below 2.4e-4: a gradient of exactly zero, which every token
that does not occur has, makes 0 / 0. Loss scaling cannot help, because the optimizer makes the NaN.
lmjax therefore computes optimizers in f32 whatever parameters and moments are stored in; optax's
Adam on f16 arrays is what is tested here, on the gradients of a real model. At eps = 1e-4 it is
finite, but second moments that underflow make its steps larger: no sign of the loss is claimed.

Arithmetic in f32 is not enough where second moments are stored in f16: those that underflow there
divide by eps alone in the next step. That it fails was expected only after it had been seen.
"""

from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments.ablations import recipes
from lmjax.ablation.claims import Claim
from lmjax.ablation.evidence import Evidence, Finding, holds
from lmjax.ablation.grid import Ablation
from lmjax.cli.ablation import run_ablation
from lmjax.parallel import sharding
from lmjax.precision import exact
from lmjax.runs.resolved import phase_of
from lmjax.train import Config, create_state
from lmjax.train.step import make_gradient

UPDATES = 2


def ablation(base: Config | None = None) -> Ablation:
    """f32, and parameters or everything stored in f16, at eps 1e-8; optimizer arithmetic in f32."""
    base = base or recipes.small()
    return Ablation(
        name="pure_f16_adam",
        question="Does Adam train on what is stored in f16 if it computes in f32?",
        base=base,
        arms={
            "f32": base,
            "f16_params": recipes.change(base, precision="p=f16,c=f16,o=f32"),
            "f16_moments": recipes.change(base, precision="p=f16,c=f16,o=f32,mu=f16,nu=f16"),
        },
        varies=("precision",),
        control="f32",
        seeds=(0,),
    )


def adam_in_f16(eps: float) -> tuple[bool, float]:
    """Two updates of optax's Adam on f16 parameters, with gradients of the small model in f16.

    Returns:
      Whether all parameters are finite, and the share of second moments that are 0 although their
      gradient was not.
    """
    config = recipes.small(precision="f16", loss_scale={"kind": "none"}).resolved()
    mesh = sharding.make_mesh(sharding.MeshConfig(), jax.devices()[:1])
    gradient = exact.jit(make_gradient(phase_of(config), mesh))
    params = create_state(config, mesh).params
    tokens = np.random.default_rng(0).integers(
        0, 128, (config.batch_size, config.context + 1), np.int32
    )
    batch = {"inputs": tokens[:, :-1], "targets": tokens[:, 1:]}
    optimizer = optax.scale_by_adam(b2=config.optimizer.b2, eps=eps)
    moments = optimizer.init(params)
    rate = jnp.float16(config.optimizer.learning_rate)
    for _ in range(UPDATES):
        (gradients, _), _ = gradient(params, batch, jax.random.key(0), jnp.float32(1), {}, {})
        gradients = jax.tree.map(lambda g: g.astype(jnp.float16), gradients)
        updates, moments = optimizer.update(gradients, moments)
        params = jax.tree.map(lambda p, u: p - rate * u, params, updates)
    finite = all(bool(jnp.all(jnp.isfinite(leaf))) for leaf in jax.tree.leaves(params))
    lost, nonzero = 0, 0
    for g, v in zip(jax.tree.leaves(gradients), jax.tree.leaves(moments.nu), strict=True):
        nonzero += int(jnp.sum(g != 0))
        lost += int(jnp.sum((g != 0) & (v == 0)))
    return finite, lost / nonzero


def judge(evidence: Evidence) -> Iterator[Finding]:
    """NaN at eps 1e-8, finite at 1e-4 with lost second moments; what f32 arithmetic mends."""
    yield holds("1e-8 is 0 in f16", f"{np.float16(1e-8)}", np.float16(1e-8) == 0)
    finite, _ = adam_in_f16(1e-8)
    yield holds(
        f"parameters are not finite after {UPDATES} updates of Adam in f16 with eps = 1e-8",
        "finite" if finite else "not finite",
        not finite,
    )
    finite, lost = adam_in_f16(1e-4)
    yield holds("with eps = 1e-4 they are", "finite" if finite else "not finite", finite)
    yield holds(
        "there second moments are 0 although their gradients are not", f"{lost:.1%}", lost > 0
    )
    yield evidence.in_every_run(
        "on parameters in f16, with moments and arithmetic in f32, it trains with eps = 1e-8",
        ("f32", "f16_params"),
        lambda cell: cell.value,
        lambda value: value < 3,
        why="a model that learns nothing stays near 5.5, and one that learns ends near 2.3",
    )
    yield evidence.failed("with moments stored in f16 it does not", "f16_moments")


def claim() -> Claim:
    """The claim, its small version and the nearest to a larger size."""
    return Claim(
        number="A3",
        name="pure_f16_adam",
        title="Adam in f16 needs another eps",
        statement=(
            "With parameters and Adam's state in f16, eps = 1e-8 rounds to 0 and the first zero "
            "gradient makes NaN; no loss scale can help."
        ),
        source="optax issue 1754; pytorch issue 26218",
        paper=(),
        scope=(
            "larger models, or whether f16 with another eps trains as well as f32: no sign is"
            " claimed"
        ),
        judge=judge,
        ablation=ablation(),
        large=ablation(recipes.gpt2_small()),
        hardware="8 GPUs of 80 GB a run",
        quick=True,
    )


if __name__ == "__main__":
    run_ablation(ablation)
