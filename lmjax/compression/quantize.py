"""A quantized model of a trained one.

Weights are rounded from what products read of them, so to nearest and without calibration the
quantized model computes, bit for bit, what the trained one does under the same policy without
`.stored`. That is what trained under such a policy (quantization-aware training) has learned; a
weight whose factor was learned or observed in training keeps it, if it is rounded to nearest.

Knows loaded models, policies and the methods of this room.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lmjax.compression.calibration import Calibration, calibration_batches
from lmjax.compression.gptq import gptq
from lmjax.compression.observers import observed_factors
from lmjax.compression.request import QuantizeConfig, keeping, quantized_policy
from lmjax.compression.sensitivity import losses_alone
from lmjax.compression.smoothing import awq, smoothed, smoothquant
from lmjax.console import stages
from lmjax.errors import InputError
from lmjax.inference import TrainedModel
from lmjax.model import Calibrated, stored_weights, weights
from lmjax.precision import exact, paths
from lmjax.precision.packed import Packed, one_member, packed
from lmjax.precision.policy import Policy, SitePolicy
from lmjax.precision.scaling import Factors, quantize_with_scale
from lmjax.train import Phase, phase_of


@dataclass(frozen=True)
class Layer:
    """What quantization did to the weights of one product.

    Attributes:
      path: of the site.
      format: the quantizer; of a kept product the compute format.
      weight_snr: signal-to-noise ratio of the weights, in dB: 10 log10 of the sum of squares over
        that of errors. Infinite without errors.
      output_snr: that of the product on the calibration text, without bias; None if there is none.
      loss_alone: by what the loss on the calibration text rises, in nats, if this product
        alone is quantized; None if that was not measured.
    """

    path: str
    format: str
    weight_snr: float
    output_snr: float | None
    loss_alone: float | None


@dataclass(frozen=True)
class QuantizedModel:
    """A quantized model.

    Attributes:
      model: to be used as a loaded one is.
      layers: what became of each product's weights, in the order of computation.
      before, after: the weight of the product with the lowest signal-to-noise ratio, f32[K, N], for
        a picture.
      worst: the path of that product.
    """

    model: TrainedModel
    layers: tuple[Layer, ...]
    before: np.ndarray
    after: np.ndarray
    worst: str


def quantize(model: TrainedModel, config: QuantizeConfig) -> QuantizedModel:
    """Quantizes a model.

    Raises:
      InputError: the policy, the text or the model cannot be used.
    """
    refuse_non_finite(model)
    policy = quantized_policy(model.config.policy, config.policy)
    phase = _phase(model, policy)
    stored = sum(site.stores is not None for site in phase.sites.values())
    if config.keep_worst >= stored:
        raise InputError(
            f"keep_worst is {config.keep_worst}, but this policy quantizes the weights of only "
            f"{stored} products; keep fewer of them"
        )
    static = any(s.activations and s.activations.kept for s in phase.sites.values())
    calibrated = config.method != "nearest" or static
    batches = None
    if calibrated or config.keep_worst or config.calibrate:
        batches = calibration_batches(model, config.calibrate, config.windows)
    flat = {
        path: np.asarray(leaf).astype(np.float32)
        for path, leaf in paths.flatten(model.params).items()
    }
    calibration = None
    if batches is not None:
        calibration = Calibration.of(model.phase, model.evaluated, batches)
        choose = {"awq": awq, "smoothquant": smoothquant}.get(config.method)
        if choose is not None:
            with stages.stage("scaling channels"):
                flat, calibration = smoothed(phase, flat, calibration, choose, config.observer)
    rounding = _Rounding(config, calibration, _trained_factors(model, phase))
    alone: Mapping[str, float] = {}
    if config.keep_worst and batches is not None:
        alone = losses_alone(model, phase, flat, rounding, batches)
        kept = sorted(alone, key=lambda path: -alone[path])[: config.keep_worst]
        phase = _phase(model, keeping(policy, kept, phase.sites))
    with stages.stage("rounding weights"):
        params = _stored_like(flat, model.params, phase, rounding)
    layers, pair = _layers(flat, params, phase, calibration, alone)
    made = dataclasses.replace(model.within(phase), params=params)
    return QuantizedModel(made, layers, *pair)


def refuse_non_finite(model: TrainedModel, *, stored: bool = False) -> None:
    """Refuses parameters that nothing can be made of.

    Args:
      model: a loaded model.
      stored: whether weights may be stored as elements.

    Raises:
      InputError: a parameter holds NaN or an infinity, or is stored as elements already.
    """
    for path, site in model.sites.items():
        if site.stores is not None and not stored:
            raise InputError(
                f"the weights of {path} are stored as {site.stores} already; start from the run "
                "that this one was made of"
            )
    for path, leaf in paths.flatten(model.params).items():
        if not np.isfinite(np.asarray(leaf).astype(np.float32)).all():
            raise InputError(
                f"the parameter {path} holds a NaN or an infinity; use a run that has not diverged"
            )


def _phase(model: TrainedModel, policy: Policy) -> Phase:
    """The model's phase under another policy.

    Raises:
      InputError: the policy does not fit the model, or quantizes none of its weights.
    """
    try:
        phase = phase_of(dataclasses.replace(model.config, precision=str(policy)))
    except ValueError as error:
        raise InputError(str(error)) from error
    if not any(site.stores for site in phase.sites.values()):
        raise InputError(
            f"the policy '{policy}' quantizes no weights; write w= with a format that has factors, "
            "such as w=int8@channel or w=int4@block32"
        )
    return phase


def _trained_factors(model: TrainedModel, phase: Phase) -> dict[str, jax.Array]:
    """Learned and observed factors of weights that keep their quantizer, f32[] by site."""
    if not isinstance(model.evaluated, Calibrated):
        return {}
    found: dict[str, jax.Array] = {}
    for path, factor in paths.flatten(model.evaluated.factors).items():
        place, _, role = path.rpartition("/")
        for index, site in enumerate(phase.layout.place(place).paths):
            operand, stores = model.sites[site].second, phase.sites[site].stores
            if role == "w" and operand and stores == operand.quantizer.of_the_tensor:
                found[site] = factor[index] if factor.ndim else factor
    return found


@dataclass(frozen=True)
class _Rounding:
    """How one weight is rounded.

    Attributes:
      config: what was asked for.
      calibration: what products read, if that was measured.
      trained: factors that weights were trained with, f32[] by the path of their product.
    """

    config: QuantizeConfig
    calibration: Calibration | None
    trained: Mapping[str, jax.Array]

    def __call__(self, site: SitePolicy, x: jax.Array, axis: int) -> Packed:
        """A weight of a site, `[., .]` f32, as it is stored."""
        assert site.stores is not None
        read = site.to_compute(x).astype(jnp.float32)
        quantizer, inputs = site.stores, self._inputs(site)
        if self.config.method == "gptq" and self.calibration is not None:
            gram = self.calibration.inputs[site.path].gram
            turned = read if axis == -2 else read.T
            found = gptq(turned, gram, quantizer, self.config.observer)
            if axis == -1:
                turn = lambda leaf: leaf.T if leaf.ndim == 2 else leaf
                found = jax.tree.map(turn, found)
        else:
            trained = self.trained.get(site.path)
            found = _nearest(read, quantizer, axis, self.config.observer, trained)
        return packed(found, quantizer, axis=axis, inputs=inputs)

    def _inputs(self, site: SitePolicy) -> jax.Array | None:
        """The static factor of a site's activations: that of the largest seen."""
        of_x = site.activations
        if of_x is None or not of_x.kept or self.calibration is None:
            return None
        largest = jnp.asarray(self.calibration.inputs[site.path].largest)
        if not float(largest.max()):
            raise InputError(
                f"the input of {site.path} is zero on the whole calibration text, so no factor "
                "follows from it; calibrate with another text, or leave out .static"
            )
        return observed_factors(largest, of_x.quantizer, "minmax", axis=0).scale


def _to_nearest(
    read: jax.Array, quantizer: Any, axis: int, observer: Any, trained: jax.Array | None
) -> Any:
    if trained is None:
        factors = observed_factors(read, quantizer, observer, axis=axis)
    else:
        factors = Factors(trained)
    return quantize_with_scale(read, quantizer, axis=axis, factors=factors)


_nearest = exact.jit(_to_nearest, static_argnums=(1, 2, 3))


def _stored_like(
    flat: Mapping[str, np.ndarray], like: Any, phase: Phase, rounding: _Rounding
) -> Any:
    """Parameters in their stored formats, weights as elements and factors."""

    def store(sites: tuple[SitePolicy, ...], x: jax.Array, axis: int) -> Packed:
        made = [rounding(site, one, axis) for site, one in zip(sites, x, strict=True)]
        return jax.tree.map(lambda *leaves: jnp.stack(leaves), *made)

    held = {path: leaf.dtype for path, leaf in paths.flatten(like).items()}
    dense = paths.unflatten({path: jnp.asarray(x).astype(held[path]) for path, x in flat.items()})
    return jax.device_get(stored_weights(dense, phase.config.model, phase.sites, store))


def _layers(
    flat: Mapping[str, np.ndarray],
    params: Any,
    phase: Phase,
    calibration: Calibration | None,
    alone: Mapping[str, float],
) -> tuple[tuple[Layer, ...], tuple[np.ndarray, np.ndarray, str]]:
    """What became of each product, and the weight that became worst, before and after."""
    own = paths.flatten(params, lambda node: not isinstance(node, dict))
    found: dict[str, Layer] = {}
    worst, pair = np.inf, (np.zeros((1, 1)), np.zeros((1, 1)), "")
    for path, weight in weights(phase.config.model, phase.sites).items():
        for index, site in enumerate(weight.readers):
            before = flat[path] if flat[path].ndim == 2 else flat[path][index]
            if site.stores is None:
                found[site.path] = Layer(
                    site.path, site.compute.name, np.inf, None, alone.get(site.path)
                )
                continue
            stored = own[path] if flat[path].ndim == 2 else one_member(own[path], index)
            after = np.asarray(stored.dense())
            turned = (before, after) if weight.axis == -2 else (before.T, after.T)
            signal, noise = turned[0], turned[1] - turned[0]
            snr = decibel(np.sum(signal**2, dtype=np.float64), np.sum(noise**2, dtype=np.float64))
            output = None
            if calibration is not None:
                gram = calibration.inputs[site.path].gram.astype(np.float64)
                output = decibel(*(float(np.sum(np.dot(gram, m) * m)) for m in (signal, noise)))
            found[site.path] = Layer(site.path, str(site.stores), snr, output, alone.get(site.path))
            if snr < worst:
                worst, pair = snr, (*turned, site.path)
    return tuple(found[path] for path in phase.layout.paths if path in found), pair


def decibel(signal: float, noise: float) -> float:
    """`10 log10(signal / noise)`."""
    return float("inf") if noise == 0 else 10 * float(np.log10(max(signal, 1e-300) / noise))
