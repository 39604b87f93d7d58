"""A model written as Hugging Face lays it out, tensor by tensor, at most one shard in memory.

Knows the model's config and parameters; the caller publishes the folder.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from lmjax import strict_json
from lmjax.interop.architecture import Architecture, TensorRule
from lmjax.interop.bert import numbered
from lmjax.interop.reading import CONFIG, HEAD
from lmjax.interop.tensors import DTYPES, few, write
from lmjax.model import ModelConfig, Params
from lmjax.precision import paths

_ROPE = ("rope_parameters", "rope_scaling", "rope_theta", "dtype")
"""Fields of `config.json` that other versions of transformers call otherwise."""


def write_pretrained(
    folder: Path,
    architecture: Architecture,
    model: ModelConfig,
    params: Params,
    *,
    precision: str,
    dtype: str | None = None,
    labels: Sequence[str] = (),
    imported: Mapping[str, Any],
    limit: int,
) -> tuple[str, ...]:
    """Writes `config.json` and the tensors of a model.

    Args:
      folder: an empty one.
      architecture: what the model is; see `architecture_of`.
      model: its config.
      params: its parameters, on any devices. f32, bf16 and f16 are written bit for bit; narrower
        formats, which safetensors readers do not take for parameters, as f32, which holds them all.
      precision: the policy of the run.
      dtype: f32, bf16 or f16, to which all are rounded; None: as stored.
      labels: the names of classes, by number; none: `LABEL_0` and so on.
      imported: the `config.json` that the model was imported with; fields that lmjax does not set
        are kept.
      limit: bytes of a shard.

    Returns:
      Which parameters are written in another dtype than their own, in words.
    """
    flat = paths.flatten(params)
    dtypes = {path: _written(leaf.dtype, dtype) for path, leaf in flat.items()}
    sizes = sum(leaf.size * dtypes[path].itemsize for path, leaf in flat.items())
    write(tensors_of(architecture, model, flat, dtypes), sizes, folder, limit)
    names = {dtype.name for dtype in dtypes.values()}
    config = {name: value for name, value in imported.items() if name not in _ROPE}
    config |= {
        "architectures": [architecture.class_of(model)],
        "model_type": architecture.name,
        "torch_dtype": names.pop() if len(names) == 1 else "float32",
        **architecture.fields(model),
        **(numbered(labels) if labels else {}),
        "lmjax": {"precision": precision},
    }
    text = strict_json.dumps(config, indent=2, sort_keys=True)
    (folder / CONFIG).write_text(text + "\n", encoding="utf-8")
    cast = [path for path, leaf in flat.items() if dtypes[path] != leaf.dtype]
    return (f"{few(cast)} written as {dtypes[cast[0]].name}",) if cast else ()


def tensors_of(
    architecture: Architecture,
    model: ModelConfig,
    params: Mapping[str, jax.Array],
    dtypes: Mapping[str, np.dtype[Any]],
) -> Iterator[tuple[str, np.ndarray]]:
    """Every tensor by name, one in memory at a time."""
    for rule in architecture.rules(model):
        prefix = "" if rule.tensor == HEAD else architecture.prefix
        dtype = np.result_type(*(dtypes[path] for path in rule.parameters))
        for layer in range(model.layers if rule.stacked else 1):
            columns = [_column(params[path], layer, rule).astype(dtype) for path in rule.parameters]
            whole = np.concatenate(columns, axis=-1) if len(columns) > 1 else columns[0]
            yield prefix + rule.tensor.format(layer), whole.T if rule.transposed else whole


def _column(leaf: jax.Array, layer: int, rule: TensorRule) -> np.ndarray:
    return np.asarray(leaf[layer] if rule.stacked else leaf)


def _written(dtype: Any, wanted: str | None) -> np.dtype[Any]:
    """The dtype that numbers of another are written in."""
    if wanted is not None:
        return DTYPES[wanted.upper()]
    return np.dtype(dtype) if np.dtype(dtype) in DTYPES.values() else DTYPES["F32"]
