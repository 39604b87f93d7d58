"""A pruned model of a trained one, in one shot: weights of low score become zero.

    magnitude   score |w|
    wanda       score |w| times the norm of the input that it multiplies, over a calibration text
                (Sun et al. 2024, arXiv 2306.11695, equation 1); equal norms make it magnitude

The weights of one output are compared with each other, or the N:M inputs in a row; see
`optim/pruning.py`, which prunes during training.

Knows loaded models and what products read.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from lmjax.checks import at_least, from_to_below, validate
from lmjax.compression.calibration import Calibration, calibration_batches
from lmjax.compression.quantize import refuse_non_finite
from lmjax.console import stages
from lmjax.inference import TrainedModel
from lmjax.model import layout, weights
from lmjax.optim.pruning import keep_mask, parse_pattern, refuse_uneven
from lmjax.precision import paths
from lmjax.precision.packed import Packed, Pieces, is_stored, packed


@dataclass(frozen=True)
class PruneConfig:
    """How a run is pruned."""

    pattern: str = "unstructured"
    """unstructured; or N:M such as 2:4: at most N of M inputs in a row are not zero."""
    sparsity: Annotated[float, from_to_below(0, 1)] = 0.5
    """Share of each output's inputs that becomes zero, if unstructured."""
    dense: tuple[str, ...] = ()
    """Weights that are not pruned, by path, such as blocks/mlp/down/kernel."""
    method: Literal["magnitude", "wanda"] = "magnitude"
    """Weights that go: those of least magnitude; or of least magnitude times norm of the input."""
    calibrate: Path | None = None
    """Calibration text in UTF-8, for a classifier one text per line; default: the training text."""
    windows: Annotated[int, at_least(1)] = 64
    """The most windows of the calibration text, each as long as the context; or texts of it."""

    def __post_init__(self) -> None:
        """Rejects values out of range."""
        validate(self)
        parse_pattern(self.pattern)


@dataclass(frozen=True)
class PrunedModel:
    """A pruned model.

    Attributes:
      model: to be used as a loaded one is.
      sparsity: the share of zeros in the weights of each product, by its path.
    """

    model: TrainedModel
    sparsity: Mapping[str, float]


def prune(model: TrainedModel, config: PruneConfig) -> PrunedModel:
    """Prunes the weights of blocks; other weights stay as they are.

    Raises:
      InputError: the text cannot be used, or parameters are not finite.
      ValueError: the pattern does not divide a weight, or weights to leave dense do not exist.
    """
    refuse_non_finite(model, stored=True)
    places, sites = layout(model.config.model), model.sites
    inside = {
        path: weight
        for path, weight in weights(model.config.model, sites).items()
        if places.stack.holds(path)
    }
    flat = paths.flatten(model.params, is_stored)
    pruned = refuse_uneven(
        config.pattern, {path: _shape(flat[path])[-2] for path in inside}, config.dense
    )
    calibration = None
    if config.method == "wanda":
        batches = calibration_batches(model, config.calibrate, config.windows)
        calibration = Calibration.of(model.phase, model.evaluated, batches)
    sparsity: dict[str, float] = {}
    with stages.stage("pruning"):
        for path in pruned:
            weight = inside[path]
            masks = _Masks(config, [_norms(calibration, site.path) for site in weight.readers])
            flat[path] = _masked(flat[path], masks)
            for site, mask in zip(weight.readers, masks.made, strict=True):
                sparsity[site.path] = 1.0 - float(np.mean(mask))
    made = dataclasses.replace(model, params=paths.unflatten(flat))
    return PrunedModel(made, {path: sparsity[path] for path in places.paths if path in sparsity})


def mask_of(w: np.ndarray, norms: np.ndarray | None, config: PruneConfig) -> np.ndarray:
    """Which weights of `[K, N]` stay, given the norms `[K]` of the inputs; zeros do not."""
    score = np.abs(w.astype(np.float32))
    if norms is not None:
        score = score * norms[:, None]
    kept, group = parse_pattern(config.pattern)
    zeros = group - kept if group else int(config.sparsity * len(w))
    return np.asarray(keep_mask(jnp.asarray(score), zeros, group)) & (w != 0)


class _Masks:
    """The masks of the members of a stack, one call after the other."""

    def __init__(self, config: PruneConfig, norms: list[np.ndarray | None]):
        self.made: list[np.ndarray] = []
        self._config, self._norms = config, norms

    def __call__(self, w: np.ndarray) -> np.ndarray:
        self.made.append(mask_of(w, self._norms[len(self.made)], self._config))
        return self.made[-1]


def _norms(calibration: Calibration | None, path: str) -> np.ndarray | None:
    """The norm of each channel of what a product read; None without a calibration."""
    if calibration is None:
        return None
    return np.sqrt(np.diag(calibration.inputs[path].gram))


def _shape(leaf: Any) -> tuple[int, ...]:
    return leaf.runs[0].shape if isinstance(leaf, Pieces) else leaf.shape


def _masked(leaf: Any, mask_of: Callable[[np.ndarray], np.ndarray]) -> Any:
    """A stack of weights with zeros where masks have none, however it is stored."""
    if isinstance(leaf, Pieces):
        return Pieces(tuple(_masked(run, mask_of) for run in leaf.runs))
    if not isinstance(leaf, Packed):
        array = np.asarray(leaf)
        return np.stack([np.where(mask_of(one), one, np.zeros_like(one)) for one in array])
    members = [jax.tree.map(lambda x, i=i: x[i], leaf) for i in range(leaf.shape[0])]
    made = []
    for one in members:
        found = one.quantized
        zero = jnp.zeros((), jnp.float32) if found.zero_point is None else _zero_of(one)
        values = jnp.where(mask_of(np.asarray(one.dense())), found.values, zero)
        made.append(
            packed(found._replace(values=values), one.quantizer, axis=one.axis, inputs=one.inputs)
        )
    return jax.device_get(jax.tree.map(lambda *leaves: jnp.stack(leaves), *made))


def _zero_of(weight: Packed) -> jax.Array:
    """The element that stands for zero, for each element of a weight with zero points."""
    found = weight.quantized
    assert found.zero_point is not None
    zeros = found.zero_point
    if weight.quantizer.groups == "block":
        zeros = jnp.repeat(zeros, weight.quantizer.block, axis=weight.axis)
        zeros = jax.lax.slice_in_dim(zeros, 0, weight.length, axis=zeros.ndim + weight.axis)
    return jnp.broadcast_to(zeros, weight.shape)
