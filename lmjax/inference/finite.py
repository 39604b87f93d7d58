"""The error raised when a model computes numbers that are not finite."""

from __future__ import annotations

import numpy as np

from lmjax.inference.run import TrainedModel
from lmjax.precision import paths


class NonFiniteError(RuntimeError):
    """The model computed NaN or infinity; the message says where, why and what to do."""


def not_finite(model: TrainedModel, what: str) -> NonFiniteError:
    """Returns the error for a non-finite result of a model.

    Args:
      model: the model.
      what: what was computed, such as `the logits of token 3`.
    """
    text = f"{what} are not finite, at step {model.step} of the run in {model.config.precision}"
    damaged = [
        path
        for path, leaf in paths.flatten(model.params).items()
        if not np.isfinite(np.asarray(leaf).astype(np.float64)).all()
    ]
    if damaged:
        return NonFiniteError(
            f"{text}: the parameter {damaged[0]} holds a NaN or an infinity, as "
            f"{len(damaged)} of {len(paths.flatten(model.params))} do; use a run that has not "
            "diverged"
        )
    return NonFiniteError(
        f"{text}: all parameters are finite, so a format is too narrow for what is computed from "
        "them; compute in a wider one, such as --precision f32"
    )
