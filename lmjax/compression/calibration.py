"""What products read while a model reads a calibration text.

The statistics of a product's input leave the model as measurements of `precision/probes.py` do: in
place of the gradients of empty slots.

Knows models, runs that were loaded, and texts.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lmjax.console import stages
from lmjax.data import Tokenizer, tokenized_corpus
from lmjax.errors import InputError
from lmjax.inference import TrainedModel
from lmjax.model import ANYWHERE, Context, Params, assembled, site_tree, structure, weights
from lmjax.precision import exact, paths
from lmjax.precision.probes import Rounded
from lmjax.train import Config, Phase

ROWS = 8
"""Windows that are read at a time."""

_WHO = "calibration"


class Inputs(NamedTuple):
    """The input of a product, over all tokens of a text; K is its width.

    Attributes:
      gram: f32[K, K], the sum of outer products of each token's input with itself.
      largest: f32[K], largest magnitudes.
      total: f32[K], sums of magnitudes.
      count: f32[], tokens.
    """

    gram: Any
    largest: Any
    total: Any
    count: Any

    @classmethod
    def empty(cls, width: int = 0) -> Inputs:
        """Nothing seen."""
        zeros = np.zeros(width, np.float32)
        return cls(np.zeros((width, width), np.float32), zeros, zeros, np.zeros((), np.float32))

    @classmethod
    def of(cls, tensor: Rounded) -> Inputs:
        """One product more, in f32; see `probes.Slot`."""
        x = tensor.raw.reshape(-1, tensor.raw.shape[-1]).astype(jnp.float32)
        size = jnp.abs(x)
        gram = jnp.einsum("tk,tl->kl", x, x, precision="highest")
        count = jnp.asarray(x.shape[0], jnp.float32)
        return cls(gram, jnp.max(size, axis=0), jnp.sum(size, axis=0), count)

    def combine(self, other: Inputs) -> Inputs:
        """Of both texts."""
        total = Inputs(*(a + b for a, b in zip(self, other, strict=True)))
        return total._replace(largest=np.maximum(self.largest, other.largest))

    def scaled(self, factors: np.ndarray) -> Inputs:
        """The same input, divided by a factor for each channel."""
        gram = self.gram / np.outer(factors, factors)
        return Inputs(gram, self.largest / factors, self.total / factors, self.count)


@dataclass(frozen=True)
class Calibration:
    """The inputs of every product with weights, by its path as policies have it."""

    inputs: Mapping[str, Inputs]

    @classmethod
    def of(cls, phase: Phase, params: Params, windows: np.ndarray) -> Calibration:
        """What products read of windows `int32[N, context]`, each a text of its own."""
        slots = _slots(phase)
        read = exact.jit(jax.grad(_sum_of_logits(phase), argnums=1))
        found: Any = None
        with stages.stage("reading the calibration text"):
            for start in range(0, len(windows), ROWS):
                new = jax.device_get(read(params, slots, windows[start : start + ROWS]))
                add = lambda a, b: a.combine(b)
                found = new if found is None else jax.tree.map(add, found, new, is_leaf=_is_inputs)
        flat = paths.flatten(found, _is_inputs)
        return cls(
            {
                path: jax.tree.map(lambda leaf, i=i: leaf[i], own) if place.stack else own
                for place in phase.layout.places
                if (own := flat.get(f"{place.path}/x/{_WHO}")) is not None
                for i, path in enumerate(place.paths)
            }
        )


def _is_inputs(node: Any) -> bool:
    return isinstance(node, Inputs)


def _slots(phase: Phase) -> dict[str, Any]:
    """An empty slot at each product with weights."""
    model, places = phase.config.model, phase.layout
    shapes = paths.flatten(structure(model)[1])
    widths = {
        site.path: shapes[path].shape[weight.axis]
        for path, weight in weights(model, phase.sites).items()
        for site in weight.readers
    }

    def slot(place: Any) -> Any:
        width = widths.get(place.paths[0])
        return None if width is None else {"x": {_WHO: Inputs.empty(width)}}

    return site_tree(places, slot)


def _sum_of_logits(phase: Phase) -> Any:
    """Anything that depends on every product, to be differentiated."""

    def total(params: Params, slots: Any, tokens: jax.Array) -> jax.Array:
        """The sum of the logits of `tokens`, int32[B, T]; its gradient fills the slots."""
        context = Context(None, None, slots)
        with jax.numpy_dtype_promotion("strict"):
            model = assembled(params, phase.config.model)
            x = model.trunk(
                {"inputs": tokens},
                sites=phase.sites,
                context=context,
                cotangent_scales=None,
                constrain=ANYWHERE,
            )
            return jnp.sum(model.logits(x, phase.sites, context).astype(jnp.float32))

    return total


def calibration_windows(model: TrainedModel, file: Path | None, count: int) -> np.ndarray:
    """Windows of a calibration text, spread evenly over it.

    Args:
      model: whose tokenizer and context are used.
      file: a text in UTF-8; None: the training text of the run.
      count: the most windows.

    Returns:
      `int32[N, context + 1]`: inputs, and the token after each.

    Raises:
      InputError: the file cannot be read or is shorter than a window.
    """
    config = model.config
    length = config.context + 1
    tokens = _tokens(config, model.tokenizer, file)
    if len(tokens) < length:
        raise InputError(
            f"{file or 'the training text'} has {len(tokens)} tokens, fewer than the {length} of "
            "a window; calibrate with a longer text"
        )
    starts = np.linspace(0, len(tokens) - length, min(count, len(tokens) // length), dtype=np.int64)
    return np.stack([tokens[start : start + length] for start in starts]).astype(np.int32)


def _tokens(config: Config, tokenizer: Tokenizer, file: Path | None) -> np.ndarray:
    if file is None:
        return np.asarray(tokenized_corpus(config.data, window=config.context + 1).train)
    try:
        return np.asarray(tokenizer.encode(file.read_text(encoding="utf-8")))
    except OSError as error:
        raise InputError(f"cannot read {file}: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise InputError(
            f"{file} is not UTF-8: byte {error.start} is not part of a character; it may be cut off"
        ) from error


def batches(windows: np.ndarray) -> Iterator[dict[str, np.ndarray]]:
    """Windows as batches of an evaluation."""
    for start in range(0, len(windows), ROWS):
        rows = windows[start : start + ROWS]
        inputs, targets = rows[:, :-1], rows[:, 1:]
        yield {"inputs": inputs, "targets": targets, "weights": np.ones(inputs.shape, np.float32)}
