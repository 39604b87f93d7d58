"""What an architecture of Hugging Face is: how its fields and its tensors are called.

Each one is a subclass in a small file of its own, and a row in `architectures.py`.

Knows the model's config; no files.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from lmjax.interop.fields import Fields
from lmjax.model import ModelConfig


@dataclass(frozen=True)
class TensorRule:
    """One tensor of a file, and the parameters that it consists of.

    Attributes:
      tensor: its name; `{}` stands for the index of a block.
      parameters: ours, by stacked path; several stand side by side along their last axis.
      transposed: whether the file has `[out, in]` where a kernel is `[in, out]`.
    """

    tensor: str
    parameters: tuple[str, ...]
    transposed: bool = False

    @property
    def stacked(self) -> bool:
        """Whether it is one tensor for each block."""
        return "{}" in self.tensor


def linear(tensor: str, place: str, *, bias: bool) -> list[TensorRule]:
    """The rules of a `torch.nn.Linear` and the `Dense` at a place."""
    weight = TensorRule(f"{tensor}.weight", (f"{place}/kernel",), transposed=True)
    return [weight, *([TensorRule(f"{tensor}.bias", (f"{place}/bias",))] if bias else [])]


class Architecture:
    """A model as `transformers` defines it.

    Attributes:
      name: its `model_type`.
      class_name: the class with a language-model head.
      prefix: what the names of all tensors but the head begin with, and lack in files that were
        saved without a head.
      buffers: names of tensors that are no parameters, as regular expressions.
      needs: values of fields of `ModelConfig` that it cannot do without.
    """

    name: ClassVar[str]
    class_name: ClassVar[str]
    prefix: ClassVar[str]
    buffers: ClassVar[tuple[str, ...]] = ()
    needs: ClassVar[Mapping[str, Any]]

    def class_of(self, model: ModelConfig) -> str:
        """The class that a model is exported as."""
        return self.class_name

    def settings(self, fields: Fields) -> dict[str, Any]:
        """The fields of `ModelConfig`; what is wrong with `fields` is collected there."""
        raise NotImplementedError

    def fields(self, model: ModelConfig) -> dict[str, Any]:
        """The fields of `config.json`, the inverse of `settings`."""
        raise NotImplementedError

    def rules(self, model: ModelConfig) -> list[TensorRule]:
        """Every tensor of a model, without the prefix but for the head."""
        raise NotImplementedError

    def obstacles(self, model: ModelConfig) -> list[str]:
        """Why a model is none of this architecture, one line each; empty if it is one."""
        needs = {"family": "decoder", **self.needs, "parametrisation": "standard"}
        found = [
            f"model.{name} is {getattr(model, name)}, not {' or '.join(map(str, _all(wanted)))}"
            for name, wanted in needs.items()
            if getattr(model, name) not in _all(wanted)
        ]
        return found + self.more_obstacles(model)

    def more_obstacles(self, model: ModelConfig) -> list[str]:
        """Those that no single value decides."""
        return []


def _all(wanted: Any) -> Sequence[Any]:
    return wanted if isinstance(wanted, tuple) else (wanted,)
