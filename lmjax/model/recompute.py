"""Elementwise functions whose gradients keep what they were given.

What a gradient reads of them beside their arguments, autodiff keeps in f32: of GELU a hyperbolic
tangent, twice as large as the bf16 input. GPUs compute it faster than they read it, and fuse it
with the gradient. On CPUs it takes as long, and the last bits of a step would depend on whether
telemetry measures it; on TPUs, neither has been timed.

Knows JAX and backends.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax

from lmjax.precision.backend import this_backend


def recomputed(function: Callable[..., jax.Array], *arguments: Any) -> jax.Array:
    """`function(*arguments)`; on GPUs, the backward pass keeps only the arguments.

    `jax.checkpoint` would write out the cotangent as well, in the format that the function returns.

    Args:
      function: a site, which takes and returns arrays as they are stored.
      *arguments: trees of what the backward pass reads.
    """
    if this_backend().platform != "gpu":
        return function(*arguments)
    converted, closed_over = jax.closure_convert(function, *arguments)

    @jax.custom_vjp
    def run(arguments: Any, closed_over: Any) -> jax.Array:
        return converted(*arguments, *closed_over)

    def backward(kept: Any, g: jax.Array) -> Any:
        # Else XLA would find that all of this is known from the forward pass, and keep it.
        arguments, closed_over = kept
        arguments = jax.lax.optimization_barrier(arguments)
        _, pull = jax.vjp(lambda a, c: converted(*a, *c), arguments, closed_over)
        return pull(g)

    run.defvjp(lambda *kept: (run(*kept), kept), backward)
    return run(arguments, closed_over)
