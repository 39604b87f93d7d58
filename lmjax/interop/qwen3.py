"""Qwen 3 (Qwen Team 2025): a Llama with RMSNorm on queries and keys."""

from __future__ import annotations

from typing import Any, ClassVar

from lmjax.interop.fields import Fields
from lmjax.interop.llama import Llama
from lmjax.interop.qwen2 import Qwen2
from lmjax.model import ModelConfig


class Qwen3(Qwen2):
    """`Qwen3ForCausalLM`."""

    name = "qwen3"
    class_name = "Qwen3ForCausalLM"
    needs: ClassVar[dict[str, Any]] = {**Llama.needs, "bias": False, "qk_norm": True}
    head_width = 128
    more_obstacles = Llama.more_obstacles

    def biases(self, fields: Fields) -> tuple[bool, str]:
        """Those of attention, if it has any."""
        return False, "qkvo" if fields.flag("attention_bias", False) else "same"

    def own_fields(self, model: ModelConfig) -> dict[str, Any]:
        """No window."""
        return {**super().own_fields(model), "attention_bias": model.out_bias}
