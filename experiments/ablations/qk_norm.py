"""A20: normalised queries and keys keep attention stable (Wortsman et al. 2023, arXiv 2309.14322).

Command:   python -m lmjax reproduce qk_norm
Hardware:  2 CPU cores
Time:      18 runs, 20 seconds each on a core, after compiling
Expected:  undecided: without norms +0.25 ± 0.12 nats at 1e-2 and +0.35 ± 0.21 at 3e-2, with logits
           61 to 118 times as large; at 3e-3 -0.041 ± 0.041, where norms cost something here and
           three seeds cannot tell whether it is more than 0.02

At high learning rates the products of queries and keys grow until the softmax picks one position
and passes no gradient on. Divided by their root mean square, queries and keys of 32 elements cannot
make a logit above sqrt(32) = 5.7 but for the gains of the norms. That bound may also cost something
where nothing is unstable and sharper attention would help, which is why parity at a low rate is
asked for and not assumed. Everything is in f32: formats matter where a logit leaves f16's range.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments.ablations import recipes
from lmjax.ablation.claims import Claim, PaperRow
from lmjax.ablation.evidence import Evidence, Finding, Margin
from lmjax.ablation.grid import Ablation, Cell
from lmjax.cli.ablation import run_ablation
from lmjax.data import tokenized_corpus
from lmjax.inference import load_model
from lmjax.model import Context, apply, layout, site_tree
from lmjax.precision import exact
from lmjax.precision.probes import Rounded
from lmjax.train import Config

SAME = Margin.within(
    0.02, "it is about the 0.022 nats by which a similar model varies from seed to seed"
)
HALF_AT_1E2 = Margin.at_least(
    0.05, "it is less than half of the 0.110 nats that one seed of a similar model had shown"
)
HALF_AT_3E2 = Margin.at_least(
    0.1, "it is less than half of the 0.254 nats that one seed of a similar model had shown"
)
RATES = {"3e-3": 3e-3, "1e-2": 1e-2, "3e-2": 3e-2}


def ablation(base: Config | None = None) -> Ablation:
    """Without and with norms of queries and keys, at three learning rates."""
    base = base or recipes.small()

    def arm(normalised: bool, rate: float) -> Config:
        return recipes.change(
            base, model={"qk_norm": normalised}, optimizer={"learning_rate": rate}
        )

    return Ablation(
        name="qk_norm",
        question="From which learning rate on do queries and keys need norms?",
        base=arm(True, RATES["3e-3"]),
        arms={
            f"{name}_{rate}": arm(normalised, RATES[rate])
            for rate in RATES
            for name, normalised in (("with", True), ("without", False))
        },
        varies=("model.qk_norm", "optimizer.learning_rate"),
        control="with_3e-3",
        controls={f"without_{rate}": f"with_{rate}" for rate in RATES},
        seeds=(0, 1, 2),
    )


class Kept(NamedTuple):
    """A slot for a probe: all of a tensor that enters a product, f32 of its own shape."""

    values: jax.Array

    @classmethod
    def of(cls, tensor: Rounded) -> Kept:
        """The tensor before it is rounded."""
        return cls(tensor.raw.astype(jnp.float32))


def largest_logit(cell: Cell, rows: int = 16) -> float:
    """The largest magnitude of an attention logit, in all blocks over some held-out windows."""
    model = load_model(cell.directory)
    config, length = model.config.model, model.config.context
    corpus = tokenized_corpus(model.config.data, window=length + 1, progress=False)
    tokens = jnp.asarray(corpus.validation[: rows * length], jnp.int32).reshape(rows, length)
    keys_shape = (rows, length, config.kv_head_count, config.head_size)
    queries_shape = (*keys_shape[:3], config.heads // config.kv_head_count, config.head_size)
    empty = {
        role: {"": Kept(jnp.zeros(shape, jnp.float32))}
        for role, shape in (("x", queries_shape), ("w", keys_shape))
    }
    slots = site_tree(layout(config), lambda place: empty if place.site.name == "scores" else None)

    def total(slots: Any, params: Any) -> jax.Array:
        context = Context(slots=slots)
        logits = apply(params, tokens, config=config, sites=model.sites, context=context)
        return jnp.sum(logits)

    kept = exact.jit(jax.grad(total))(slots, model.params)
    operands = kept["blocks"]["attention"]["scores"]
    queries, keys = (np.asarray(operands[role][""].values, np.float64) for role in "xw")
    # Queries enter the product with the power of two in 1 / sqrt(head size); the rest follows it.
    rest = 2.0 ** math.floor(math.log2(config.head_size) / 2) / math.sqrt(config.head_size)
    scores = np.einsum("lbtkgh,lbskh->lbkgts", queries, keys) * rest
    return float(np.max(np.abs(np.tril(scores))))


def judge(evidence: Evidence) -> Iterator[Finding]:
    """Gaps at high rates, parity at a low one, and how far the logits grow."""
    yield evidence.between(
        "at a rate of 3e-3 both are within 0.02 nats of each other", "without_3e-3", SAME
    )
    yield evidence.gap(
        "at 1e-2 the model without norms is worse by 0.05", "without_1e-2", HALF_AT_1E2
    )
    yield evidence.gap("at 3e-2 it is worse by 0.1", "without_3e-2", HALF_AT_3E2)
    normalised = evidence.cells("with_1e-2")
    yield evidence.in_every_run(
        "at 1e-2 its largest attention logit is 10 times that with norms, or more",
        ("without_1e-2",),
        lambda cell: largest_logit(cell) / largest_logit(normalised[cell.seed]),
        lambda ratio: ratio >= 10,
        about="logits",
        why="one seed of a similar model had shown 274 against 5.6",
    )


def claim() -> Claim:
    """The claim, its small version and the nearest to the paper's size."""
    return Claim(
        number="A20",
        name="qk_norm",
        title="norms of queries and keys let attention train at high rates",
        statement=(
            "Instabilities of large models show in small ones at high learning rates; normalising "
            "queries and keys stops the growth of attention logits that causes one of them."
        ),
        source="Wortsman et al. 2023, arXiv 2309.14322",
        paper=(
            PaperRow(
                "learning rates from 3e-4 to 3e-1, up to 1e5 steps of 256 sequences of C4",
                "the growth of attention logits goes away with qk-layernorm",
                ("logits",),
            ),
        ),
        scope=(
            "rates, lengths and sizes of the paper, whose runs have up to 1e5 steps, or about"
            " the drift of output logits"
        ),
        judge=judge,
        ablation=ablation(),
        large=ablation(recipes.gpt2_small()),
        hardware="8 GPUs of 80 GB a run",
    )


if __name__ == "__main__":
    run_ablation(ablation)
