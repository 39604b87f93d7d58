"""Compiles programs without excess precision, so that every rounding takes place.

By default XLA may keep more precision than a program asks for: it drops roundings to bf16 inside
chains of operations, so that a "bf16" experiment silently runs in wider precision, which the loss
does not reveal. lmjax therefore compiles every program through `jit` below, which disables this,
and every run first calls `check_canary` to verify that the backend complies.

Knows only JAX.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

COMPILER_OPTIONS: dict[str, bool | str] = {"xla_allow_excess_precision": False}


class ExcessPrecisionError(RuntimeError):
    """The backend drops roundings despite the option, so no precision result would be valid."""


ORDER_OPTIONS: dict[str, dict[str, bool | str]] = {
    "cpu": {"xla_disable_hlo_passes": "algsimp"},
    "gpu": {"xla_gpu_deterministic_ops": True},
}
"""Compiler options that make a program sum in the same order, whatever surrounds it.

XLA's algebraic simplifier rewrites the program of a single device differently from that of several
(a reshape moves across a division and ends a fusion, so that a multiplication and an addition are
no longer one instruction). It is disabled on CPU. GPU kernels whose order of summation depends on
thread timing are replaced or refused.
"""


LOOP_OPTIONS: dict[str, dict[str, bool | str]] = {
    "cpu": {
        "xla_disable_hlo_passes": "while-loop-invariant-code-motion,"
        "while-loop-expensive-invariant-code-motion"
    }
}
"""Compiler options for loops that are bound by reading weights.

XLA moves casts of weights out of a loop, which then reads the wider copy in every turn: decoding
GPT-2 small from bf16 took 1.3 times as long on a CPU, and from int8 needed twice the memory. A
train step kept the weights of its head a second time, transposed.
"""


def jit(
    function: Callable[..., Any],
    *,
    fixed_order: str = "",
    weights_in_loop: str = "",
    **options: Any,
) -> Any:
    """`jax.jit` without excess precision; takes the same options.

    Args:
      function: the function to compile.
      fixed_order: platform whose compiler must always sum in the same order; empty: any order.
      weights_in_loop: platform whose compiler must leave what it does to weights in loops; empty:
        any.
      options: options of `jax.jit`.
    """
    own = ORDER_OPTIONS.get(fixed_order, {}) | LOOP_OPTIONS.get(weights_in_loop, {})
    return jax.jit(function, compiler_options=COMPILER_OPTIONS | own, **options)


def at_least_f32(dtype: Any) -> np.dtype:
    """The dtype to accumulate in: f64 for f64, f32 for everything narrower."""
    return np.dtype(np.float64 if np.dtype(dtype) == np.float64 else np.float32)


def _chain(x: jax.Array) -> jax.Array:
    """A bf16 multiply-add whose result must be representable in bf16, returned as f32."""
    return (x + x * jnp.asarray(0.3, jnp.bfloat16)).astype(jnp.float32)


def dropped_roundings(compile_with: Callable[[Callable[..., Any]], Any] = jit) -> int:
    """Counts how many of 256 results of a compiled bf16 chain are not bf16 values.

    Args:
      compile_with: compiles a Python function; `jax.jit` shows XLA's default behaviour.

    Returns:
      0 if every rounding took place.
    """
    x = jnp.linspace(1.0, 2.0, 256, dtype=jnp.float32).astype(jnp.bfloat16)
    results = np.asarray(compile_with(_chain)(x))
    representable = results.astype(jnp.bfloat16).astype(np.float32)
    return int(np.sum(results != representable))


@functools.cache
def check_canary(backend: str | None = None) -> None:
    """Checks that programs compiled for the current backend keep every rounding.

    The result cannot change within a process, so it is computed once per backend.

    Raises:
      ExcessPrecisionError: the compiled chain returned values that bf16 cannot represent.
    """
    backend = backend or jax.default_backend()
    dropped = dropped_roundings()
    if dropped:
        raise ExcessPrecisionError(
            f"the {backend} backend dropped {dropped} of 256 bf16 roundings although "
            "xla_allow_excess_precision is off; set XLA_FLAGS=--xla_allow_excess_precision=false "
            "or use a jaxlib that honours the option, because no precision would be what it says"
        )
