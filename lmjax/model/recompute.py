"""Elementwise functions whose gradients keep what they were given, and compute the rest again.

XLA would keep every intermediate result that a gradient reads, in f32: of a norm, two copies of its
input, and of GELU a hyperbolic tangent, each twice as large as the bf16 input. To compute them
again takes as long as to write and read them.

Knows JAX, contractions and policies.
"""

from __future__ import annotations

from collections.abc import Callable

import jax

from lmjax.precision.contraction import not_before
from lmjax.precision.policy import SitePolicy


def recomputed(
    function: Callable[..., jax.Array], site: SitePolicy, x: jax.Array, *others: jax.Array
) -> jax.Array:
    """`function(x, *others)`, of which the backward pass keeps only the arguments.

    Args:
      function: of float arrays; it closes over none that has a gradient.
      site: in whose scope the backward pass computes.
      x: the first argument, of the size of the result.
      others: the other arguments.
    """
    run = jax.custom_vjp(function)

    def backward(kept: tuple[jax.Array, ...], g: jax.Array) -> tuple[jax.Array, ...]:
        with site.scope:
            # Else XLA would find that all of this is known from the forward pass, and keep it.
            _, pull = jax.vjp(function, not_before(g, kept[0]), *kept[1:])
            return pull(g)

    run.defvjp(lambda *arguments: (function(*arguments), arguments), backward)
    return run(x, *others)
