"""Compiling programs that round where they say they round.

By default XLA may keep more precision than a program asks for: it drops the rounding to bf16 inside
chains of operations, so that a "bf16" experiment silently runs in something wider. Nothing in the
loss shows it. Every program of lmjax is therefore compiled through `jit` below, with that licence
taken away, and every run first asks `check_canary` whether the backend in use complies.

Knows JAX only.
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
    """The backend drops roundings although told not to: no precision result would be true."""


ORDER_OPTIONS: dict[str, dict[str, bool | str]] = {
    "cpu": {"xla_disable_hlo_passes": "algsimp"},
    "gpu": {"xla_gpu_deterministic_ops": True},
}
"""What a backend needs to compute the same in the same order, whatever is around it.

XLA's algebraic simplifier takes apart the program of a single device otherwise than that of several
(a reshape lands on the other side of a division, a fusion ends there, and its multiplication and
addition are no longer one instruction). The CPU compiler does without it. GPU kernels that add in
whatever order their threads arrive are replaced or refused.
"""


def jit(function: Callable[..., Any], *, fixed_order: bool = False, **options: Any) -> Any:
    """`jax.jit` with excess precision off; takes the same options.

    Args:
      function: to be compiled.
      fixed_order: whether it must sum in the same order whenever it runs.
      options: of `jax.jit`.
    """
    order = ORDER_OPTIONS.get(jax.default_backend(), {}) if fixed_order else {}
    return jax.jit(function, compiler_options=COMPILER_OPTIONS | order, **options)


def at_least_f32(dtype: Any) -> np.dtype:
    """The dtype to accumulate in: f64 for f64, f32 for everything narrower."""
    return np.dtype(np.float64 if np.dtype(dtype) == np.float64 else np.float32)


def _chain(x: jax.Array) -> jax.Array:
    """A bf16 multiply-add whose result must be representable in bf16, handed on as f32."""
    return (x + x * jnp.asarray(0.3, jnp.bfloat16)).astype(jnp.float32)


def dropped_roundings(compile_with: Callable[[Callable[..., Any]], Any] = jit) -> int:
    """How many of 256 results of a bf16 chain are not bf16 values after compiling.

    Args:
      compile_with: turns a Python function into a compiled one; `jax.jit` shows what XLA does when
        nobody tells it otherwise.

    Returns:
      0 when every rounding happened.
    """
    x = jnp.linspace(1.0, 2.0, 256, dtype=jnp.float32).astype(jnp.bfloat16)
    results = np.asarray(compile_with(_chain)(x))
    representable = results.astype(jnp.bfloat16).astype(np.float32)
    return int(np.sum(results != representable))


@functools.cache
def check_canary(backend: str | None = None) -> None:
    """Proves on the backend in use that compiled programs keep every rounding.

    The answer cannot change within a process, so it is computed once per backend.

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
