"""Muon's direction (Jordan et al. 2024): momentum, orthogonalised by Newton-Schulz iterations.

optax has it too (`optax.contrib.muon`), and the state here is the one of optax. Its products run at
whatever precision the backend has by default, one pass in bf16 on a TPU and TF32 on a GPU, and its
Frobenius norm overflows where no element does. Here every product is one of f32 at the highest
precision, whatever a policy says of the model's products (`m`), and the norm is scaled.

Knows JAX, optax and `squares`.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import optax

from lmjax.precision.squares import scale_for_squares

ITERATIONS = 5
COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""Of x, (x x^T) x and (x x^T)^2 x: the singular values of the result lie around 1."""

RMS = 0.2
"""Root mean square of an update, about that of AdamW's (Moonlight, Liu et al. 2025)."""


def scale_by_muon(decay: float, eps: float) -> optax.GradientTransformation:
    """Gradients of stacked matrices, f32[layers, in, out], to orthogonalised Nesterov momentum.

    Args:
      decay: of the momentum, whose start at 0 is corrected for as in Adam.
      eps: added to the norm that a matrix is divided by.
    """

    def init(params: optax.Params) -> optax.contrib.MuonState:
        return optax.contrib.MuonState(
            count=jnp.zeros([], jnp.int32),
            mu=optax.tree.zeros_like(params, dtype=jnp.float32),
            ns_coeffs=jnp.asarray(COEFFICIENTS),
        )

    def update(gradients: Any, state: Any, _: Any = None) -> tuple[Any, Any]:
        """Orthogonalised momentum of matrices, with Nesterov's look ahead."""
        mu = optax.tree.update_moment(gradients, state.mu, decay, 1)
        count = optax.safe_increment(state.count)
        now = optax.tree.bias_correction(gradients, decay, count)
        ahead = optax.tree.bias_correction(mu, decay, optax.safe_increment(count))
        momentum = jax.tree.map(lambda m, g: decay * m + (1 - decay) * g, ahead, now)
        turned = jax.vmap(lambda x: orthogonalised(x, state.ns_coeffs, eps))
        mu = optax.tree.cast(mu, jnp.float32)
        return jax.tree.map(turned, momentum), optax.contrib.MuonState(count, mu, state.ns_coeffs)

    return optax.GradientTransformation(init, update)


def orthogonalised(x: jax.Array, coefficients: jax.Array, eps: float) -> jax.Array:
    """A matrix of the singular vectors of `x` and of singular values between about 0.7 and 1.2.

    Args:
      x: f32[in, out].
      coefficients: f32[3], as `COEFFICIENTS`.
      eps: added to the Frobenius norm of `x`.
    """
    if x.shape[0] > x.shape[1]:
        return orthogonalised(x.T, coefficients, eps).T
    scale = scale_for_squares(jnp.max(jnp.abs(x)))
    x = x * scale
    x = x / (jnp.sqrt(jnp.sum(jnp.square(x))) + eps * scale)
    first, second, third = coefficients.astype(x.dtype)
    for _ in range(ITERATIONS):
        square = _product(x, x.T)
        x = first * x + _product(second * square + _product(third * square, square), x)
    return x


def scale_by_shape() -> optax.GradientTransformation:
    """Makes the root mean square of orthogonalised matrices `[..., in, out]` `RMS`."""
    return optax.stateless(
        lambda updates, _: jax.tree.map(lambda u: math.sqrt(max(u.shape[-2:])) * RMS * u, updates)
    )


def _product(x: jax.Array, y: jax.Array) -> jax.Array:
    return jnp.matmul(x, y, precision=jax.lax.Precision.HIGHEST, preferred_element_type=x.dtype)
