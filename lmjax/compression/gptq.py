"""GPTQ: rounds weights so that errors of earlier inputs are made good by later ones.

Frantar et al. 2023, arXiv 2210.17323, algorithm 1. With H the sum of outer products of what a
product reads, and U the upper Cholesky factor of H^-1, the rows w_k of `W [K, N]` are rounded in
order; each leaves the error e = (w_k - q_k) / U_kk, and every later row w_l loses U_kl e. Rows are
taken in the order in which they stand.

Knows quantizers and their arithmetic.
"""

from __future__ import annotations

import functools
from typing import Any, Final

import jax
import jax.numpy as jnp
import numpy as np

from lmjax.compression.observers import Observer, observed_factors
from lmjax.errors import InputError
from lmjax.precision import exact
from lmjax.precision.quantizer import Quantizer
from lmjax.precision.scaling import Factors, Quantized, dequantize, quantize_with_scale

DAMPING: Final = 0.01
"""Share of the mean of H's diagonal that is added to it, as in the paper, section 3.3."""

CHUNK: Final = 128
"""Rows after which the error is passed on to all later ones, where factors are not of blocks."""


def gptq(
    w: jax.Array, gram: np.ndarray, quantizer: Quantizer, observer: Observer = "minmax"
) -> Quantized:
    """The elements and factors of a weight.

    Args:
      w: f32[K, N], K what the product sums over.
      gram: f32[K, K], see `calibration.Inputs`; the identity makes it round to nearest.
      quantizer: format and groups, which run along the first axis.
      observer: finds factors; those of a block from its rows as they are when it is reached.

    Raises:
      InputError: H cannot be inverted.
    """
    size = len(w)
    chunk = quantizer.block or min(CHUNK, size)
    padding = -size % chunk
    upper = np.pad(inverse_factor(gram), (0, padding))
    upper[np.arange(size, size + padding), np.arange(size, size + padding)] = 1.0
    padded = jnp.pad(w, ((0, padding), (0, 0)))
    values, factors = _rounded(padded, jnp.asarray(upper), quantizer, observer, chunk)
    return Quantized(values[:size], *factors)


def inverse_factor(gram: np.ndarray) -> np.ndarray:
    """f32, upper triangular: U with U^T U the inverse of H, dampened.

    Inputs that are always zero count as independent of all others.
    """
    h = np.asarray(gram, np.float64)
    diagonal = np.diag(h)
    damping = DAMPING * diagonal.mean() or 1.0
    h = h + np.diag(np.where(diagonal == 0, 1.0, 0.0) + damping)
    try:
        lower = np.linalg.cholesky(np.linalg.inv(h))
    except np.linalg.LinAlgError as error:
        raise InputError(
            "the second moments of the calibration text cannot be inverted; use a longer text"
        ) from error
    return lower.T.astype(np.float32)


@functools.partial(exact.jit, static_argnums=(2, 3, 4))
def _rounded(
    w: jax.Array, upper: jax.Array, quantizer: Quantizer, observer: Observer, chunk: int
) -> tuple[jax.Array, Factors]:
    blocks = quantizer.groups == "block"
    whole = observed_factors(w, quantizer, observer, axis=0)

    alive = (w != 0).astype(w.dtype)

    def one_row(state: Any, index: jax.Array) -> Any:
        """Rounds one row, f32[1, N], and moves its error to later rows of the chunk."""
        rows, own, factors, start = state
        # What was pruned stays zero: it takes no part of the error of others.
        row = jax.lax.dynamic_slice_in_dim(rows, index, 1)
        row = row * jax.lax.dynamic_slice_in_dim(alive, start + index, 1)
        quantized = quantize_with_scale(row, quantizer, axis=0, factors=factors)
        reach = jax.lax.dynamic_slice_in_dim(own, index, 1)[0]
        error = (row - dequantize(quantized, quantizer, axis=0)) / reach[index]
        return (rows - reach[:, None] * error, own, factors, start), (
            quantized.values[0],
            error[0],
        )

    def one_chunk(w: jax.Array, start: jax.Array) -> Any:
        """Rounds `chunk` rows from `start`, then moves their errors to all later rows."""
        rows = jax.lax.dynamic_slice_in_dim(w, start, chunk)
        reach = jax.lax.dynamic_slice_in_dim(upper, start, chunk)
        own = jax.lax.dynamic_slice_in_dim(reach, start, chunk, axis=1)
        factors = whole
        if blocks:
            given = {"tensor_scale": whole.tensor_scale} if quantizer.tensor_scale else {}
            factors = observed_factors(rows, quantizer, observer, axis=0, **given)
        _, (values, errors) = jax.lax.scan(one_row, (rows, own, factors, start), jnp.arange(chunk))
        w = w - jnp.einsum("ck,cn->kn", reach, errors, precision="highest")
        return w, (values, (factors.scale, factors.zero_point) if blocks else None)

    starts = jnp.arange(0, len(w), chunk)
    _, (values, own) = jax.lax.scan(one_chunk, w, starts)
    values = values.reshape(w.shape)
    if not blocks:
        return values, whole
    scale, zero_point = jax.tree.map(lambda leaf: leaf.reshape(-1, leaf.shape[-1]), own)
    return values, Factors(scale, zero_point, whole.tensor_scale)
