"""Elementwise functions whose gradients keep what they were given, and compute the rest again.

XLA's CPU backend would keep what a gradient reads of them in f32: of GELU a hyperbolic tangent,
twice as large as the bf16 input. To compute it again takes as long as to write and read it.

Knows JAX, contractions and policies.
"""

from __future__ import annotations

from collections.abc import Callable

import jax

from lmjax.precision.contraction import is_one_cpu, not_before
from lmjax.precision.policy import SitePolicy


def recomputed(
    function: Callable[..., jax.Array], site: SitePolicy, x: jax.Array, *others: jax.Array
) -> jax.Array:
    """`function(x, *others)`, of which the backward pass keeps only the arguments on one CPU.

    Args:
      function: of float arrays; it closes over none that has a gradient.
      site: in whose scope the backward pass computes.
      x: the first argument, of the size of the result.
      others: the other arguments.
    """
    if not is_one_cpu():
        return function(x, *others)
    run = jax.custom_vjp(function)

    def backward(kept: tuple[jax.Array, ...], g: jax.Array) -> tuple[jax.Array, ...]:
        with site.scope:
            # Else XLA would find that all of this is known from the forward pass, and keep it.
            _, pull = jax.vjp(function, not_before(g, kept[0]), *kept[1:])
            return pull(g)

    run.defvjp(lambda *arguments: (function(*arguments), arguments), backward)
    return run(x, *others)
