"""Gradients and steps of AdamW, next to torch's: what the tests of all architectures share."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from lmjax.interop.reading import Pretrained
from lmjax.interop.writing import tensors_of
from lmjax.model import ModelConfig, Params
from lmjax.optim.optimizer import OptimizerConfig
from lmjax.precision import paths
from lmjax.runs.config import Config

RATE, DECAY = 1e-3, 0.1


def as_tensors(found: Pretrained, params: Params) -> dict[str, np.ndarray]:
    """A tree like the parameters, by the names of their tensors."""
    flat = paths.flatten(params)
    dtypes = {path: np.dtype(np.float32) for path in flat}
    return dict(tensors_of(found.architecture, found.model, flat, dtypes))


def assert_gradients(gradients: Mapping[str, np.ndarray], theirs: Any) -> float:
    """Compares every gradient relative to the largest of its tensor; returns the largest of all.

    A tensor whose gradients are all below 0.001 of the largest of all is compared relative to that:
    those of the biases of keys, which shift all scores of a query alike, are rounding errors.
    """
    named = {n: p for n, p in theirs.named_parameters() if p.grad is not None}
    assert gradients.keys() == named.keys()
    largest = max(float(p.grad.abs().max()) for p in named.values())
    for name, gradient in gradients.items():
        wanted = named[name].grad.numpy()
        scale = max(np.abs(wanted).max(), 1e-3 * largest)
        np.testing.assert_allclose(gradient, wanted, rtol=0, atol=1e-4 * scale, err_msg=name)
    return largest


def their_adamw(parameters: Any, eps: float) -> Any:
    """Torch's optimizer, with the settings of `adamw`."""
    import torch

    settings = {"lr": RATE, "betas": (0.9, 0.99), "eps": eps, "weight_decay": DECAY}
    return torch.optim.AdamW(parameters, **settings)


def adamw(model: ModelConfig, eps: float, *, rows: int, context: int) -> Config:
    """A run of plain AdamW, which decays everything."""
    return Config(
        precision="f32",
        steps=10,
        context=context,
        batch_size=rows,
        model=dataclasses.replace(model, z_loss=0.0),
        optimizer=OptimizerConfig(
            learning_rate=RATE,
            schedule="constant",
            warmup_steps=0,
            eps=eps,
            weight_decay=DECAY,
            no_decay=(),
            clip_norm=0,
        ),
    )
