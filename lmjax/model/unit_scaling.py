"""Unit scaling: the constants that keep weights, activations and cotangents at unit variance.

Weights are drawn from N(0, 1), every operation divides by what it would multiply a standard
deviation by, and its gradient does the same with constants of its own (Blake et al. 2023, arXiv
2303.11257; u-muP, Blake et al. 2024, arXiv 2407.17465). At initialisation every tensor then has a
standard deviation of about 1, which is the middle of the range of f16 and fp8: no loss scale.

| operation | forward | backward |
|---|---|---|
| every product, `einsum(unit=True)` | 1/sqrt(terms) | 1/sqrt(terms), of dx and dw each |
| GELU | 1/rms | the same |
| gated SiLU | 1/rms, times 2^-1/4 | the same |
| softmax | root of the context / rms of a mean over it | the same |
| branch and residual stream | b at the branch's end, stream a, a^2 + b^2 = 1 | b at its start, a |
| embedding plus positions | 1/sqrt(2) | the same |
| parameter used many times: table, bias, norm | 1 | 1/sqrt(uses) |
| loss | 1 | tokens * sqrt(vocabulary) |

What leaves the backward pass must still be the gradient. A constant may differ between forward and
backward where it scales everything behind it alike: at parameters, which are leaves; at the loss
and the head, through which every path leads; and along a branch whose constants have the same
product both ways. This is so in every branch here, because a matrix multiplies norms by the same in
both directions:

    MLP      forward 1/sqrt(D) 1/sqrt(M)              backward 1/sqrt(M) 1/sqrt(D)
    values   forward 1/sqrt(D) 1/sqrt(S) 1/sqrt(KGH)  backward 1/sqrt(KH) 1/sqrt(TG) 1/sqrt(D)
    queries  forward 1/sqrt(D) 1/sqrt(H) 1/sqrt(S) 1/sqrt(KGH), and the same backward

(keys as queries; S = T wherever there is a gradient). For the same reason the two gradients of a
tied table agree in scale: as an embedding its rows are used tokens/V times each, so its constants
up to the logits are sqrt(V/tokens) sqrt(D/V), and as a head sqrt(D/tokens). So every gradient is
a positive constant times the true one, the same for all numbers of a parameter of a block. Between
blocks it differs: b is not among the constants of a branch's own parameters.

What stays: where a tensor has several readers their cotangents are added up, and biases sum
cotangents of tokens that attention has made alike. At the start the standard deviations of all
operands, results and cotangents of the model lie between a half and 2, those of the gradients of
biases and norm scales between 0.3 and 5 (but the biases of keys have none).

A constant is applied in at least f32 and rounded together with what it multiplies, never by itself:
a product is divided before it leaves its accumulator.

*Optimizers.* Adam, Lion and Muon do not see the constants, and unit gradients stay far away from
Adam's eps. What compares gradients of different parameters would: clipping to a global norm weighs
them by these constants. In a unit-scaled run `clip_norm` therefore bounds the root mean square of
all gradients, about 1 at the start, in place of their norm.

*Learning rates.* `learning_rate_factors` gives each parameter its own, so that the best rate does
not depend on the width (u-muP, table 2). The rates are larger than usual: weights are.
Weight decay is decoupled and multiplied with the same rates.

Knows JAX and the model's config.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lmjax.model.standard import Standard
from lmjax.precision.asides import aside
from lmjax.precision.exact import at_least_f32

Factor = float | jax.Array

GELU_GAIN = 1.0 / 0.65207
"""1 / sqrt(E[gelu(z)^2]), z from N(0, 1). Of the second moment, not the variance: what the next
product sees is not centred."""

GATED_SILU_GAIN = 2.0**-0.25 / 0.59647
"""1 / sqrt(E[(silu(z) u)^2]), z and u from N(0, 1), which also leaves their cotangents at 1; but
those of two products are then added up. One constant for both directions, so their geometric mean,
as in Blake et al. 2023, section 4: 0.84 forwards and 1.19 backwards, in place of 1 and 1.41."""


def scaled(x: jax.Array, forward: Factor = 1.0, backward: Factor = 1.0) -> jax.Array:
    """`x * forward`, whose cotangent is multiplied by `backward`; the factors get no gradient.

    Computed in at least f32 and rounded once, to the format of `x`.
    """
    return _scaled(x, jnp.asarray(forward, jnp.float32), jnp.asarray(backward, jnp.float32))


@jax.custom_vjp
def _scaled(x: jax.Array, forward: jax.Array, backward: jax.Array) -> jax.Array:
    return _times(x, forward)


def _scaled_forward(
    x: jax.Array, forward: jax.Array, backward: jax.Array
) -> tuple[jax.Array, jax.Array]:
    return _times(x, forward), backward


def _scaled_backward(backward: jax.Array, g: jax.Array) -> tuple[jax.Array, None, None]:
    return _times(g, backward), None, None


_scaled.defvjp(_scaled_forward, _scaled_backward)


def _times(x: jax.Array, factor: jax.Array) -> jax.Array:
    with aside("wide"):
        wide = at_least_f32(x.dtype)
        return (x.astype(wide) * factor.astype(wide)).astype(x.dtype)


class BranchWeights(NamedTuple):
    """By what a residual stream and a branch are multiplied where they are added: f32."""

    stream: jax.Array
    branch: jax.Array

    def enter(self, x: jax.Array) -> jax.Array:
        """The stream on its way into the branch: the cotangent that returns gets its weight here,
        so that inside the branch it has unit variance.
        """
        return scaled(x, backward=self.branch)

    def add(self, x: jax.Array, y: jax.Array) -> jax.Array:
        """The stream after the branch's result `y` was added, rounded once to the format of `x`."""
        with aside("wide"):
            wide = at_least_f32(x.dtype)
            y = scaled(y.astype(wide), forward=self.branch)
            return (x.astype(wide) * self.stream.astype(wide) + y).astype(x.dtype)


@dataclass(frozen=True)
class UnitScaling(Standard):
    """The unit-scaled parametrisation of a model."""

    unit_products: ClassVar[bool] = True
    auto_loss_scale: ClassVar[bool] = False
    usual_rate: ClassVar[float | None] = 0.5
    """The best of 0.1, 0.3, 0.5 and 1 in 300 steps of `char_shakespeare`."""

    @property
    def weight_std(self) -> float:
        """1, in every weight."""
        return 1.0

    @property
    def last_weight_std(self) -> float:
        """1: `branches` weighs what is added to the residual stream."""
        return 1.0

    def shared(self, parameter: jax.Array, uses: float) -> jax.Array:
        """A parameter, or the rows taken from it, whose gradient is divided by sqrt(uses)."""
        return scaled(parameter, backward=uses**-0.5)

    def sum_of_embeddings(self, tokens: jax.Array, positions: jax.Array) -> jax.Array:
        """`[B, T, D]` and `[T, D]`, each of unit variance, to their sum, likewise, rounded once.

        A position is used by every row of the batch: the gradients of all are added up. Positions
        `[B, T, D]` are those of each row, used once each.
        """
        with aside("wide"):
            wide = at_least_f32(tokens.dtype)
            positions = self.shared(positions.astype(wide), tokens.size // positions.size)
            return ((tokens.astype(wide) + positions) * 0.5**0.5).astype(tokens.dtype)

    def queries(self, q: jax.Array) -> jax.Array:
        """Queries as they are: the product divides by sqrt(H)."""
        return q

    @property
    def score_factor(self) -> float:
        """1: scores have unit variance."""
        return 1.0

    def weight_factor(self, keys: int) -> float:
        """The gain of attention weights, forwards and backwards.

        The weights of t scores from N(0, 1) have squares that add up to about e / (t + e - 1):
        exact for t = 1, and E[exp(2z)] / (t E[exp(z)]^2) for many. A mean of t unit values has that
        variance, which is averaged over t up to the longest context. (u-muP, appendix B,
        interpolates between measured values; its scores are divided by H and so start out uniform.)

        The longest context is the model's and not the batch's, so that the model stays the same
        function in evaluation and generation: set it to the training context. By the root of the
        number of keys in the batch, S, the following product divides.
        """
        lengths = np.arange(1, self.config.max_positions + 1)
        mean_square = float(np.mean(math.e / (lengths + math.e - 1)))
        return math.sqrt(keys / mean_square)

    def activated(self, hidden: jax.Array) -> jax.Array:
        """The activation of unit inputs times its gain, forwards and backwards.

        GELU's cotangents become 1.04, for E[gelu'(z)^2] is 0.46.
        """
        gated = self.config.activation == "swiglu"
        return hidden * (GATED_SILU_GAIN if gated else GELU_GAIN)

    def branches(self) -> BranchWeights:
        """The weights of both branches of every block, f32[layers, 2].

        All 2 layers branches count alike, and together as much as the embedding (u-muP, section
        3.2, with its ratios at 1): after l of them the stream holds n = 2 layers + l parts, of
        which the next branch becomes one more: a^2 = n / (n + 1), b^2 = 1 / (n + 1).
        """
        branches = 2 * self.config.layers
        parts = np.arange(branches, 2 * branches).reshape(self.config.layers, 2)
        return BranchWeights(
            stream=jnp.asarray(np.sqrt(parts / (parts + 1)), jnp.float32),
            branch=jnp.asarray(np.sqrt(1 / (parts + 1)), jnp.float32),
        )

    def logits(self, logits: jax.Array) -> jax.Array:
        """Logits `[..., V]` of which a cotangent softmax - onehot gets unit variance.

        Its squares add up to about 1 (Blake et al. 2023, table A.2, have V / sqrt(V - 1), which is
        the same for large V and holds the loss's mean against its own number of tokens).
        """
        return scaled(logits, backward=math.sqrt(logits.shape[-1]))

    def losses(self, losses: jax.Array, weight: float) -> jax.Array:
        """Losses of tokens whose cotangent, which is `weight`, becomes 1."""
        return scaled(losses, backward=1.0 / weight)

    def learning_rate_factors(self, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, float]:
        """Factors by which the best learning rate does not depend on the width (u-muP, table 2, for
        Adam).

        1/sqrt(fan_in) for matrices; for tables, biases and norms, whose use sums over nothing,
        1/sqrt(width). The head is a matrix like any other, because its logits start at unit
        variance; in u-muP they vanish with the width, and its rate does not.
        """
        width = self.config.width
        fan_in = lambda path, shape: shape[-2] if path.endswith("/kernel") else width
        return {path: fan_in(path, shape) ** -0.5 for path, shape in shapes.items()}

    def clip_norm(self, bound: float, count: int) -> float:
        """A bound on the root mean square: gradients are of the order of 1, each of them."""
        return bound * math.sqrt(count)
