"""What each product costs if it alone is quantized, as the loss on a calibration text.

Knows loaded models and steps of evaluation.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from lmjax.compression.calibration import Rows
from lmjax.console import stages
from lmjax.errors import InputError
from lmjax.inference import TrainedModel
from lmjax.model import objective_of, weights
from lmjax.parallel import sharding
from lmjax.precision import paths
from lmjax.train import Phase, make_eval_step


def losses_alone(
    model: TrainedModel,
    phase: Phase,
    flat: Mapping[str, np.ndarray],
    rounded: Callable[..., Any],
    batches: Sequence[Rows],
) -> dict[str, float]:
    """By how many nats the loss of a token or text rises, for each product that stores weights.

    Args:
      model: as trained; its policy computes everything but the weights in question.
      phase: the formats that weights are to get.
      flat: parameters by path, f32, as they are to be rounded.
      rounded: `(site, weight, axis) -> Packed`.
      batches: of the calibration text.

    Raises:
      InputError: the model predicts nothing, or the text lacks its classes.
    """
    config = phase.config.model
    if config.headless or not set(objective_of(config).reads) <= batches[0].keys():
        raise InputError(
            "products are ranked by their loss, but these calibration texts have no classes; leave "
            "out --keep-worst, or calibrate a classifier on its own training text"
        )
    mesh = sharding.make_mesh(sharding.MeshConfig())
    evaluate = make_eval_step(model.phase, mesh)

    def loss(changed: Mapping[str, np.ndarray]) -> float:
        params = dataclasses.replace(model, params=paths.unflatten(dict(changed))).evaluated
        sums = np.sum([np.asarray(evaluate(params, b), np.float64) for b in batches], 0)
        return float(sums[0] / sums[1])

    exactly = loss(flat)
    found = {}
    with stages.stage("measuring what each product costs"):
        for path, weight in weights(phase.config.model, phase.sites).items():
            for index, site in enumerate(weight.readers):
                if site.stores is None:
                    continue
                whole = flat[path]
                own = whole if whole.ndim == 2 else whole[index]
                after = np.asarray(rounded(site, jnp.asarray(own), weight.axis).dense())
                changed = after if whole.ndim == 2 else np.array(whole)
                if whole.ndim == 3:
                    changed[index] = after
                found[site.path] = loss({**flat, path: changed}) - exactly
    return found
