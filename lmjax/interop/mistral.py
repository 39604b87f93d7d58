"""Mistral (Jiang et al. 2023) without its window: a Llama without biases."""

from __future__ import annotations

from typing import Any, ClassVar

from lmjax.interop.fields import Fields
from lmjax.interop.llama import WINDOW, Llama
from lmjax.model import ModelConfig


class Mistral(Llama):
    """`MistralForCausalLM`."""

    name = "mistral"
    class_name = "MistralForCausalLM"
    needs: ClassVar[dict[str, Any]] = {
        **Llama.needs,
        "bias": False,
        "qkv_bias": False,
        "out_bias": False,
    }

    def biases(self, fields: Fields) -> tuple[bool, str]:
        """None."""
        return False, "same"

    def refuse_windows(self, fields: Fields) -> None:
        """Refuses a window below the context; without the field, it is 4096 in transformers."""
        super().refuse_windows(fields)
        window = fields.given("sliding_window", 4096)
        if window is not None and window < fields.integer("max_position_embeddings"):
            fields.problems.append(f"sliding_window is {window}: {WINDOW}")

    def own_fields(self, model: ModelConfig) -> dict[str, Any]:
        """No window."""
        return {"sliding_window": None}
