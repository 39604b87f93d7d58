"""AWQ and SmoothQuant: channels of activations are scaled against rows of weights before rounding.

    SmoothQuant   s = max|x|^a / max|w|^(1 - a), a = 1/2: outliers of activations move into weights
                  (Xiao et al. 2023, arXiv 2211.10438, equation 4)
    AWQ           s = mean|x|^a, with the a in [0, 1] under which the product of rounded weights
                  is nearest to the exact one: weights of large inputs are rounded more finely
                  (Lin et al. 2024, arXiv 2306.00978, equation 5)

Where the division of activations can be folded into what made them, it costs nothing; elsewhere
nothing is scaled (`model/folding.py`).

Knows models, quantizers and what products read.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lmjax.compression.calibration import Calibration, Inputs
from lmjax.compression.observers import Observer, observed_factors
from lmjax.model.folding import folds
from lmjax.precision import exact
from lmjax.precision.quantizer import Quantizer
from lmjax.precision.scaling import dequantize, quantize_with_scale
from lmjax.train import Phase

ALPHA: Final = 0.5
ALPHAS: Final = tuple(np.linspace(0.0, 1.0, 21).tolist())


class Read(NamedTuple):
    """A product that reads what may be scaled: its weight f32[K, N], its quantizer, its input."""

    weight: np.ndarray
    quantizer: Quantizer
    inputs: Inputs


Choose = Callable[[Sequence[Read], Observer], np.ndarray]
"""From products with the same input to its factors f32[K]."""


def smoothquant(reads: Sequence[Read], observer: Observer) -> np.ndarray:
    """The factors of SmoothQuant."""
    del observer
    of_w = np.max([np.abs(read.weight).max(axis=1) for read in reads], axis=0)
    of_x = reads[0].inputs.largest
    with np.errstate(divide="ignore", invalid="ignore"):
        return _usable(of_x**ALPHA / of_w ** (1 - ALPHA))


def awq(reads: Sequence[Read], observer: Observer) -> np.ndarray:
    """The factors of AWQ; ones if they are best."""
    mean = reads[0].inputs.total / max(float(reads[0].inputs.count), 1.0)
    best, least = np.ones_like(mean), np.inf
    for alpha in ALPHAS:
        with np.errstate(divide="ignore", invalid="ignore"):
            factors = _usable(mean**alpha)
        factors = factors / np.sqrt(factors.max() * factors.min())
        error = sum(
            float(_error(read.weight, factors, read.inputs.gram, read.quantizer, observer))
            for read in reads
        )
        if error < least:
            best, least = factors, error
    return best.astype(np.float32)


def _usable(factors: np.ndarray) -> np.ndarray:
    """Factors with 1 for channels that are always zero, or whose weights are."""
    return np.where(np.isfinite(factors) & (factors > 0), factors, 1.0).astype(np.float32)


def _scaled_error(
    w: jax.Array, factors: jax.Array, gram: jax.Array, quantizer: Quantizer, observer: Observer
) -> jax.Array:
    """Sum of squared errors of the product, if weights are scaled by factors and then rounded."""
    scaled = w * factors[:, None]
    own = observed_factors(scaled, quantizer, observer, axis=0)
    rounded = quantize_with_scale(scaled, quantizer, axis=0, factors=own)
    miss = dequantize(rounded, quantizer, axis=0) / factors[:, None] - w
    return jnp.einsum("kn,kl,ln->", miss, gram, miss, precision="highest")


_error: Any = exact.jit(_scaled_error, static_argnums=(3, 4))


def smoothed(
    phase: Phase,
    flat: Mapping[str, np.ndarray],
    calibration: Calibration,
    choose: Choose,
    observer: Observer,
) -> tuple[dict[str, np.ndarray], Calibration]:
    """Parameters by path and the inputs of products after both were scaled.

    Args:
      phase: the formats; products whose weights are not stored keep the others from nothing.
      flat: parameters by path, f32.
      calibration: what products read.
      choose: `awq` or `smoothquant`.
      observer: finds the factors of quantizers.
    """
    changed = {path: np.array(leaf) for path, leaf in flat.items()}
    inputs = dict(calibration.inputs)
    stack = phase.layout.stack
    for fold in folds(phase.config.model):
        for index in range(stack.size):
            sites = {path: phase.sites[stack.member(index, path)] for path in fold.readers}
            reads = [
                Read(changed[f"{path}/kernel"][index], site.stores, inputs[site.path])
                for path, site in sites.items()
                if site.stores is not None
            ]
            if not reads:
                continue
            factors = choose(reads, observer)
            for path in fold.divided:
                changed[path][index] /= factors
            for path, site in sites.items():
                changed[f"{path}/kernel"][index] *= factors[:, None]
                inputs[site.path] = inputs[site.path].scaled(factors)
    return changed, Calibration(inputs)
