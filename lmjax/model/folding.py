"""Where a factor for each channel of a product's input can be moved into what made that input.

Dividing the input of a product by a vector and multiplying the rows of its weights by the same
leaves its result unchanged. The division costs nothing where it can be done in advance: in the
scale and bias of a norm, or in the columns and the bias of a linear layer, if nothing that stands
between is nonlinear in it.

Knows the config and where parameters are.
"""

from __future__ import annotations

from typing import NamedTuple

from lmjax.model.config import ModelConfig
from lmjax.model.families import layout, structure
from lmjax.model.layout import BLOCKS
from lmjax.precision import paths


class Fold(NamedTuple):
    """What a vector of factors is moved between; all in the same block.

    Attributes:
      divided: parameters whose last axis is divided by it.
      readers: places, as parameters have them, whose weights are multiplied by it row by row.
    """

    divided: tuple[str, ...]
    readers: tuple[str, ...]


def folds(config: ModelConfig) -> tuple[Fold, ...]:
    """Every place for such a vector in the blocks of a model.

    Norms that stand before what they normalise; values, where each head has its own; and the
    ungated half of a gated MLP.
    """
    parameters = paths.flatten(structure(config)[1])
    made: dict[str, tuple[str, ...]] = {}
    if config.family == "decoder":  # what leaves a norm after a branch is the residual stream
        made[f"{BLOCKS}/attention/norm"] = ("query", "key", "value")
        made[f"{BLOCKS}/mlp/norm"] = ("up", "gate")
    if config.kv_head_count == config.heads:
        made[f"{BLOCKS}/attention/value"] = ("out",)
    if config.activation == "swiglu":
        made[f"{BLOCKS}/mlp/up"] = ("down",)
    found = []
    for source, names in made.items():
        own = [f"{source}/{name}" for name in ("scale", "kernel", "bias")]
        readers = [f"{source.rpartition('/')[0]}/{name}" for name in names]
        found.append(
            Fold(
                tuple(path for path in own if path in parameters),
                tuple(path for path in readers if layout(config).has(path)),
            )
        )
    return tuple(found)
