"""What products read while a model reads a calibration text.

The statistics of a product's input leave the model as measurements of `precision/probes.py` do: in
place of the gradients of empty slots.

Knows models, runs that were loaded, and texts.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lmjax.console import stages
from lmjax.data import document_rows, tokenized_corpus, validation_batches
from lmjax.errors import InputError
from lmjax.inference import TrainedModel
from lmjax.model import (
    ANYWHERE,
    Batch,
    ModelConfig,
    assembled,
    in_evaluation,
    is_of_objective,
    objective_of,
    site_tree,
    structure,
    weights,
)
from lmjax.precision import exact, paths
from lmjax.precision.probes import Rounded
from lmjax.train import Phase
from lmjax.train.start import refuse_running_text

ROWS = 8
"""Windows or texts that are read at a time."""

Rows = dict[str, np.ndarray]
"""A batch, on the host."""

_WHO = "calibration"


class Inputs(NamedTuple):
    """The input of a product, over all tokens of a text; K is its width.

    Attributes:
      gram: f32[K, K], the sum of outer products of each token's input with itself.
      largest: f32[K], largest magnitudes.
      total: f32[K], sums of magnitudes.
      count: f32[], tokens.
      counts: of a slot, f32 for each token: 0 for padding; () if there is none.
    """

    gram: Any
    largest: Any
    total: Any
    count: Any
    counts: Any = ()

    @classmethod
    def empty(cls, width: int = 0, counts: Any = ()) -> Inputs:
        """Nothing seen."""
        zeros = np.zeros(width, np.float32)
        return cls(
            np.zeros((width, width), np.float32), zeros, zeros, np.zeros((), np.float32), counts
        )

    def of(self, tensor: Rounded) -> Inputs:
        """One product more, in f32; see `probes.Slot`."""
        x = tensor.raw.reshape(-1, tensor.raw.shape[-1]).astype(jnp.float32)
        count = jnp.asarray(x.shape[0], jnp.float32)
        if not isinstance(self.counts, tuple):
            counts = self.counts.reshape(-1)
            x, count = jnp.where(counts[:, None] > 0, x, jnp.zeros_like(x)), jnp.sum(counts)
        size = jnp.abs(x)
        gram = jnp.einsum("tk,tl->kl", x, x, precision="highest")
        return Inputs(gram, jnp.max(size, axis=0), jnp.sum(size, axis=0), count, self.counts)

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
    def of(cls, phase: Phase, params: Any, batches: Iterable[Rows]) -> Calibration:
        """What products read of batches of texts.

        Args:
          phase: the formats.
          params: as `TrainedModel.evaluated` is.
          batches: from `calibration_batches`.
        """
        read, found = exact.jit(_reading(phase)), None
        with stages.stage("reading the calibration text"):
            for batch in batches:
                new = jax.device_get(read(params, batch))
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


def _slots(phase: Phase, batch: Batch) -> dict[str, Any]:
    """An empty slot at each product with weights."""
    model, places = phase.config.model, phase.layout
    shapes = paths.flatten(structure(model)[1])
    widths = {
        site.path: shapes[path].shape[weight.axis]
        for path, weight in weights(model, phase.sites).items()
        for site in weight.readers
    }
    tokens, predictions = _counts(model, batch)

    def slot(place: Any) -> Any:
        width = widths.get(place.paths[0])
        counts = predictions if is_of_objective(model, f"{place.path}/") else tokens
        return None if width is None else {"x": {_WHO: Inputs.empty(width, counts)}}

    return site_tree(places, slot)


def _counts(model: ModelConfig, batch: Batch) -> tuple[Any, Any]:
    """Which tokens of a batch count, f32[B, T], and which rows of what the head reads."""
    if "lengths" not in batch:
        return (), ()
    seen = jnp.arange(batch["inputs"].shape[1], dtype=jnp.int32) < batch["lengths"][:, None]
    if "weights" not in batch:
        return seen.astype(jnp.float32), ()
    rows = batch["weights"][:, None] if model.pooled else jnp.float32(1)
    return seen.astype(jnp.float32) * rows, batch["weights"]


def _reading(phase: Phase) -> Any:
    """`(params, batch) ->` what each product reads, as `site_tree` lays it out."""
    model = phase.config.model

    def total(slots: Any, params: Any, batch: Batch) -> jax.Array:
        """The sum of all predictions, on which every product has a part."""
        params, quiet = in_evaluation(params)
        context = quiet._replace(slots=slots)
        with jax.numpy_dtype_promotion("strict"):
            own = assembled(params, model)
            x = own.trunk(
                batch,
                sites=phase.sites,
                context=context,
                cotangent_scales=None,
                constrain=ANYWHERE,
            )
            found = objective_of(model).predictions(x, own, batch, phase.sites, context)
            return jnp.sum(found.astype(jnp.float32))

    def read(params: Any, batch: Batch) -> Any:
        """The gradients of the slots."""
        posed = batch if model.pooled else objective_of(model).posed(batch, None)
        found = jax.grad(total)(_slots(phase, posed), params, posed)
        return jax.tree.map(lambda own: own._replace(counts=()), found, is_leaf=_is_inputs)

    return read


def calibration_batches(model: TrainedModel, file: Path | None, count: int) -> list[Rows]:
    """Batches of a calibration text, as the model is trained on them.

    Windows of running text; for an encoder that pools its first token, texts in rows of their own.
    They are spread evenly over the whole.

    Args:
      model: whose tokenizer and context are used.
      file: a text in UTF-8, for pooling with a text on each line; None: the training text.
      count: the most windows or rows.

    Raises:
      InputError: the file cannot be read, or has too little text.
    """
    config = model.config
    if config.model.pooled and file is not None:
        return list(_lines(model, file, count))
    if not config.model.headless:
        refuse_running_text(config, model.tokenizer)
    if not config.model.classes:
        return list(_windows(model, file, count))
    corpus = tokenized_corpus(config.data, window=config.context + 1)
    training = dataclasses.replace(
        corpus, validation=corpus.train, validation_classes=corpus.train_classes
    )
    size = min(ROWS, count)
    return list(
        validation_batches(
            training, length=config.context, batch_size=size, max_batches=count // size
        )
    )


def _windows(model: TrainedModel, file: Path | None, count: int) -> Iterator[Rows]:
    length = model.config.context + 1
    if file is None:
        tokens = np.asarray(tokenized_corpus(model.config.data, window=length).train)
    else:
        tokens = np.asarray(model.tokenizer.encode(_read(file)))
    if len(tokens) < length:
        raise InputError(
            f"{file or 'the training text'} has {len(tokens)} tokens, fewer than the {length} of "
            "a window; calibrate with a longer text"
        )
    starts = np.linspace(0, len(tokens) - length, min(count, len(tokens) // length), dtype=np.int64)
    windows = np.stack([tokens[start : start + length] for start in starts]).astype(np.int32)
    for start in range(0, len(windows), ROWS):
        rows = windows[start : start + ROWS]
        inputs, targets = rows[:, :-1], rows[:, 1:]
        yield {"inputs": inputs, "targets": targets, "weights": np.ones_like(inputs, np.float32)}


def _lines(model: TrainedModel, file: Path, count: int) -> Iterator[Rows]:
    """Rows of texts, without classes."""
    tokenizer = model.tokenizer
    texts = [line for line in _read(file).splitlines() if line.strip()]
    if not texts:
        raise InputError(f"{file} has no text; write one text on each line")
    start = [tokenizer.start_of_document] if tokenizer.has_start else []
    chosen = [texts[i * len(texts) // count] for i in range(count)] if len(texts) > count else texts
    documents = [
        np.concatenate([start, ids, [tokenizer.end_of_document]]).astype(np.int32)
        for ids in tokenizer.encode_batch(chosen)
    ]
    for first in range(0, len(documents), ROWS):
        rows, lengths = document_rows(documents[first : first + ROWS], model.config.context)
        yield {"inputs": rows, "lengths": lengths}


def _read(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except OSError as error:
        raise InputError(f"cannot read {file}: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise InputError(
            f"{file} is not UTF-8: byte {error.start} is not part of a character; it may be cut off"
        ) from error
