"""Qwen 2 and 2.5 (Qwen Team 2024): a Llama with biases of queries, keys and values."""

from __future__ import annotations

from typing import Any, ClassVar

from lmjax.interop.fields import Fields
from lmjax.interop.llama import WINDOW, Llama
from lmjax.model import ModelConfig


class Qwen2(Llama):
    """`Qwen2ForCausalLM`."""

    name = "qwen2"
    class_name = "Qwen2ForCausalLM"
    needs: ClassVar[dict[str, Any]] = {
        **Llama.needs,
        "bias": False,
        "qkv_bias": True,
        "out_bias": False,
    }

    def biases(self, fields: Fields) -> tuple[bool, str]:
        """Those of queries, keys and values."""
        return False, "qkv"

    def refuse_windows(self, fields: Fields) -> None:
        """Refuses a window that is in use."""
        super().refuse_windows(fields)
        fields.only("use_sliding_window", False, False, WINDOW)
        fields.any("sliding_window")

    def own_fields(self, model: ModelConfig) -> dict[str, Any]:
        """No window."""
        return {"use_sliding_window": False}

    def more_obstacles(self, model: ModelConfig) -> list[str]:
        """None."""
        return []
