"""A folder as Hugging Face lays it out, read: first checked as a whole, then tensor by tensor.

Knows the model's config and parameters, and where a mesh keeps them.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Final, NamedTuple

import jax
import numpy as np

from lmjax import strict_json
from lmjax.errors import InputError
from lmjax.files.filenames import printable
from lmjax.interop.architecture import Architecture, TensorRule
from lmjax.interop.architectures import ARCHITECTURES
from lmjax.interop.bert import named
from lmjax.interop.fields import Fields
from lmjax.interop.tensors import DTYPES, TensorFiles, few
from lmjax.model import ModelConfig, Params, structure
from lmjax.parallel import sharding
from lmjax.precision import paths

CONFIG = "config.json"
POLICIES: Final[Mapping[str, str]] = {
    "float32": "f32",
    "bfloat16": "p=bf16,c=bf16,o=f32",
    "float16": "p=f16,c=f16,o=f32",
}
"""The policy that a model is imported with, by the dtype of its parameters."""


class Part(NamedTuple):
    """Where a parameter is in the files: in which tensors, and from which column on."""

    rule: TensorRule
    start: int


@dataclass(frozen=True)
class Pretrained:
    """A model in a folder; its tensors stay on disk until `parameters` reads them.

    Attributes:
      folder: where it is.
      architecture: what it is.
      model: its config.
      precision: the policy that it was exported with, if lmjax did, or that of its dtype.
      dtype: in which `parameters` gives them: that of the files, or f32 where they have several.
      notes: what a user should know.
      labels: the names of its classes, by number; none if they are only numbered.
    """

    folder: Path
    architecture: Architecture
    model: ModelConfig
    precision: str
    dtype: np.dtype[Any]
    notes: tuple[str, ...]
    labels: tuple[str, ...]
    files: TensorFiles = field(repr=False)

    def parameters(self, mesh: sharding.Mesh) -> Params:
        """The parameters, each piece read from disk onto the device where it lives.

        Raises:
          InputError: a number is NaN or infinite.
        """
        _, shapes, axes = structure(self.model)
        placed = paths.flatten(sharding.state_shardings(mesh, axes, shapes))
        flat = {
            path: jax.make_array_from_callback(leaf.shape, placed[path], partial(self._piece, path))
            for path, leaf in paths.flatten(shapes).items()
        }
        return paths.unflatten(flat)

    @cached_property
    def _parts(self) -> dict[str, Part]:
        return {
            path: Part(rule, start)
            for rule in self.architecture.rules(self.model)
            for path, start in zip(rule.parameters, _starts(self.model, rule), strict=True)
        }

    def _piece(self, path: str, index: tuple[slice, ...]) -> np.ndarray:
        """A piece of a parameter, by its indices in the stacked array."""
        rule, start = self._parts[path]
        shape = _shapes(self.model)[path]
        whole = [slice(*s.indices(size)) for s, size in zip(index, shape, strict=True)]
        layers = whole.pop(0) if rule.stacked else slice(0, 1)
        whole[-1] = slice(whole[-1].start + start, whole[-1].stop + start)
        inside = tuple(reversed(whole)) if rule.transposed else tuple(whole)
        tensor = _present(self.architecture, self.files, rule.tensor)

        def read(name: str) -> np.ndarray:
            found = self.files.read(name, inside)
            if not np.isfinite(found).all():
                raise InputError(f"{self.folder}: {name} holds NaN or infinite numbers")
            return found.T if rule.transposed else found

        if not rule.stacked:
            return np.ascontiguousarray(read(tensor), self.dtype)
        sizes = [s.stop - s.start for s in (layers, *whole)]
        piece = np.empty(sizes, self.dtype)
        for position, layer in enumerate(range(layers.start, layers.stop)):
            piece[position] = read(tensor.format(layer))
        return piece


def is_pretrained(folder: Path) -> bool:
    """Whether a folder holds a model as Hugging Face lays it out, and no run."""
    try:
        return "model_type" in strict_json.read(folder / CONFIG)
    except (OSError, ValueError, TypeError):
        return False


@contextlib.contextmanager
def pretrained(folder: Path) -> Iterator[Pretrained]:
    """Opens and checks a model in a folder.

    Raises:
      InputError: it cannot be imported; the message lists what and why.
    """
    architecture, model, values, notes = _read_model(folder)
    files = TensorFiles(folder)
    try:
        _refuse(folder, _problems(architecture, model, files))
        names = {path for rule in architecture.rules(model) for path in _names(rule, model)}
        tags = {files.headers[_present(architecture, files, name)].tag for name in names}
        dtype = DTYPES[tags.pop()] if len(tags) == 1 else DTYPES["F32"]
        own = values.get("lmjax")
        precision = own.get("precision") if isinstance(own, dict) else None
        precision = precision if isinstance(precision, str) else POLICIES[dtype.name]
        labels = named(values, model.classes)
        yield Pretrained(folder, architecture, model, precision, dtype, notes, labels, files)
    finally:
        files.close()


def read_model(folder: Path) -> ModelConfig:
    """The config of a model in a folder, without a look at its tensors.

    Raises:
      InputError: it cannot be imported.
    """
    return _read_model(folder)[1]


def _read_model(
    folder: Path,
) -> tuple[Architecture, ModelConfig, dict[str, Any], tuple[str, ...]]:
    values = _read_config(folder)
    architecture = ARCHITECTURES[values["model_type"]]
    fields = Fields(values)
    settings = architecture.settings(fields)
    _refuse(folder, fields.problems)
    try:
        model = ModelConfig(**settings)
    except ValueError as error:
        raise InputError(f"{folder} cannot be imported: {error}") from error
    if unread := fields.unread():
        fields.notes.append(f"without effect in lmjax: {', '.join(unread)}")
    return architecture, model, values, tuple(fields.notes)


def _read_config(folder: Path) -> dict[str, Any]:
    try:
        values = strict_json.read_object(folder / CONFIG)
        kind = values["model_type"]
    except OSError as error:
        raise InputError(
            f"{folder} holds no model: {CONFIG} cannot be read ({error.strerror})"
        ) from error
    except (ValueError, KeyError) as error:
        what = "has no model_type" if isinstance(error, KeyError) else f"is damaged: {error}"
        raise InputError(f"{folder / CONFIG} {what}") from error
    if kind not in ARCHITECTURES:
        raise InputError(
            f"{folder} is a {kind!r}, an architecture that lmjax does not know; it knows "
            f"{', '.join(ARCHITECTURES)}"
        )
    return values


def _problems(architecture: Architecture, model: ModelConfig, files: TensorFiles) -> list[str]:
    """What is wrong with the tensors of a folder."""
    wanted = {
        _present(architecture, files, name): shape
        for rule in architecture.rules(model)
        for name, shape in _names(rule, model).items()
    }
    found, headers = [], files.headers
    if missing := [name for name in wanted if name not in headers]:
        found.append(f"{few(missing)} missing")
    if surplus := _surplus(architecture, model, files, wanted):
        found.append(f"no place for {few(surplus)}")
    for name in wanted.keys() & headers.keys():
        shape, tag = headers[name]
        if shape != wanted[name]:
            found.append(f"{name} is {list(shape)}, but {CONFIG} makes it {list(wanted[name])}")
        if tag not in DTYPES:
            found.append(f"{name} is {tag}; supported are {', '.join(DTYPES)}")
    return sorted(found)


def _surplus(
    architecture: Architecture, model: ModelConfig, files: TensorFiles, wanted: Mapping[str, Any]
) -> list[str]:
    """The tensors that are no parameters, no buffers, and no copy of the embedding."""
    table = _present(architecture, files, architecture.rules(model)[0].tensor)

    def is_known(name: str) -> bool:
        if any(re.fullmatch(buffer, name) for buffer in architecture.buffers):
            return True
        return name == HEAD and model.tied and table in wanted and files.are_equal(name, table)

    return [name for name in files.headers if name not in wanted and not is_known(name)]


HEAD = "lm_head.weight"


def _present(architecture: Architecture, files: TensorFiles, tensor: str) -> str:
    """A tensor's name in these files, which may lack the prefix."""
    prefixed = any(name.startswith(architecture.prefix) for name in files.headers)
    return architecture.prefix + tensor if prefixed and tensor != HEAD else tensor


def _names(rule: TensorRule, model: ModelConfig) -> dict[str, tuple[int, ...]]:
    """The names that a rule stands for, and the shape of each in a file."""
    shapes = [_shapes(model)[path][1 if rule.stacked else 0 :] for path in rule.parameters]
    whole = (*shapes[0][:-1], sum(shape[-1] for shape in shapes))
    shape = tuple(reversed(whole)) if rule.transposed else whole
    layers = range(model.layers if rule.stacked else 1)
    return {rule.tensor.format(layer): shape for layer in layers}


def _starts(model: ModelConfig, rule: TensorRule) -> list[int]:
    """The first column of each parameter of a tensor."""
    widths = [_shapes(model)[path][-1] for path in rule.parameters]
    return [sum(widths[:position]) for position in range(len(widths))]


def _shapes(model: ModelConfig) -> dict[str, tuple[int, ...]]:
    return {path: leaf.shape for path, leaf in paths.flatten(structure(model)[1]).items()}


def _refuse(folder: Path, problems: list[str]) -> None:
    if problems:
        more = f"; and {len(problems) - 12} more" if len(problems) > 12 else ""
        listed = "; ".join(problems[:12]) + more
        raise InputError(f"{folder} cannot be imported: {printable(listed)}")
