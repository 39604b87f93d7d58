"""Every architecture that lmjax exchanges with Hugging Face, by its `model_type`.

A new one is a subclass of `Architecture` in a small file of its own, and a row here.
"""

from __future__ import annotations

from typing import Final

from lmjax.errors import InputError
from lmjax.interop.architecture import Architecture
from lmjax.interop.bert import Bert
from lmjax.interop.gpt2 import GPT2
from lmjax.interop.llama import Llama
from lmjax.interop.mistral import Mistral
from lmjax.interop.qwen2 import Qwen2
from lmjax.interop.qwen3 import Qwen3
from lmjax.model import ModelConfig

ARCHITECTURES: Final[dict[str, Architecture]] = {
    architecture.name: architecture
    for architecture in (GPT2(), Bert(), Llama(), Qwen2(), Qwen3(), Mistral())
}
"""In the order in which a model without a name is tried; Mistral, which is a Llama, comes last."""


def architecture_of(model: ModelConfig, preferred: str = "") -> Architecture:
    """The architecture that a model is exported as.

    Args:
      model: its config.
      preferred: the one that it was imported as.

    Raises:
      InputError: it is none; the message says why.
    """
    named = [ARCHITECTURES[preferred]] if preferred in ARCHITECTURES else []
    obstacles = {}
    for architecture in (*named, *ARCHITECTURES.values()):
        obstacles[architecture.name] = architecture.obstacles(model)
        if not obstacles[architecture.name]:
            return architecture
    fewest = min(obstacles, key=lambda name: len(obstacles[name]))
    raise InputError(
        f"this model is none of {', '.join(ARCHITECTURES)}; nearest is {fewest}, but "
        + "; ".join(obstacles[fewest])
    )
