"""What a model that tells classes apart gets right on held-out texts: counts, scores, a picture."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lmjax.data import TokenizedCorpus, validation_batches
from lmjax.files.filenames import no_math
from lmjax.model import Constrain, assembled, in_evaluation, objective_of
from lmjax.parallel import sharding
from lmjax.runs.resolved import Phase
from lmjax.train.step import Batch


@dataclass(frozen=True)
class Confusion:
    """How many texts of each class were taken for which.

    Attributes:
      counts: int64[C, C], by the class of a text and by the one that the model finds likeliest, the
        first of equally likely ones. NaN counts as the first class.
      labels: the names of the classes.
    """

    counts: np.ndarray
    labels: tuple[str, ...]

    @property
    def accuracy(self) -> float:
        """The share of texts whose class was found."""
        return float(np.trace(self.counts) / self.counts.sum())

    @property
    def f1(self) -> float:
        """The mean over classes of 2 TP / (2 TP + FP + FN); 0 of a class that nothing is or was."""
        right = np.diagonal(self.counts)
        either = self.counts.sum(0) + self.counts.sum(1)
        return float(np.mean(2 * right / np.maximum(either, 1)))

    def as_result(self) -> dict[str, Any]:
        """As fields of `result.json`."""
        return {
            "accuracy": self.accuracy,
            "error_rate": 1 - self.accuracy,
            "f1": self.f1,
            "labels": list(self.labels),
            "confusion": self.counts.tolist(),
        }


def held_out_classes(
    phase: Phase, params: Any, corpus: TokenizedCorpus, mesh: sharding.Mesh
) -> tuple[float, Confusion]:
    """The mean loss of a text of the validation split, in nats, and the confusion of them all."""
    config = phase.config
    program = config.reductions.jit(_counting(phase, mesh), mesh)
    share, shares = sharding.batch_share(mesh)
    nats = texts = np.zeros((), np.float64)
    counts = np.zeros((config.model.classes,) * 2, np.int64)
    for rows in validation_batches(
        corpus,
        length=config.context,
        batch_size=config.evaluation.batch_size,
        multiple=config.reductions.multiple(mesh),
        process_index=share,
        process_count=shares,
    ):
        more = program(params, sharding.global_batch(mesh, rows, shares))
        nats, texts = (
            total + np.float64(x) for total, x in zip((nats, texts), more[0], strict=True)
        )
        counts += np.asarray(more[1], np.int64)
    names = map(str, range(len(corpus.classes), config.model.classes))
    return float(nats / texts), Confusion(counts, (*corpus.classes, *names))


def _counting(phase: Phase, mesh: Any) -> Callable[[Any, Batch], Any]:
    """`(params, batch) -> (nats, texts), int32[C, C]`."""
    config, sites, objective = phase.config, phase.sites, objective_of(phase.config.model)

    def of_part(constrain: Constrain) -> Any:
        """The counting of a part of a batch, with activations placed by `constrain`."""

        def count(params: Any, batch: Batch) -> tuple[Any, jax.Array]:
            """The summed loss and the confusion of one batch."""
            with jax.numpy_dtype_promotion("strict"):
                own, context = in_evaluation(params)
                model = assembled(own, config.model)
                x = model.trunk(
                    batch, sites=sites, context=context, cotangent_scales=None, constrain=constrain
                )
                found = jnp.argmax(model.logits(x, sites, context)[:, 0], axis=-1)
                size = config.model.classes
                pairs = batch["classes"] * jnp.int32(size) + found.astype(jnp.int32)
                weights = (batch["weights"] > 0).astype(jnp.int32)
                counts = jnp.zeros(size * size, jnp.int32).at[pairs].add(weights)
                sums = objective.evaluate(x, model, batch, sites, context, constrain)
                return sums, counts.reshape(size, size)

        return count

    return sharding.traced_for(mesh, config.reductions.evaluation(of_part, mesh))


def draw_confusion(confusion: Confusion, title: str, path: Path) -> None:
    """Draws the counts as a PNG; shades are shares of the texts of a class."""
    from matplotlib.figure import Figure

    counts, labels = confusion.counts, confusion.labels
    shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    size = 3.4 + 0.5 * len(labels)
    figure = Figure(figsize=(size + 0.8, size), layout="constrained")
    panel = figure.subplots()
    image = panel.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    for (row, column), share in np.ndenumerate(shares) if len(labels) <= 12 else ():
        panel.text(
            column,
            row,
            f"{counts[row, column]:,}\n{share:.1%}",
            ha="center",
            va="center",
            color="white" if share > 0.5 else "black",
        )
    ticks: Sequence[int] = range(len(labels))
    panel.set_xticks(ticks, labels)
    panel.set_yticks(ticks, labels)
    panel.set_xlabel("class found")
    panel.set_ylabel("class of the text")
    figure.suptitle(no_math(title), fontsize=9, wrap=True)
    panel.set_title(f"accuracy {confusion.accuracy:.4f}, F1 {confusion.f1:.4f}", fontsize=10)
    figure.colorbar(image, ax=panel, label="share of a class", shrink=0.8)
    figure.savefig(path, dpi=120)
