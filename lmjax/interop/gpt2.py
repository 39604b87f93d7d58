"""GPT-2 (Radford et al. 2019): learned positions, LayerNorm, linear layers stored `[in, out]`."""

from __future__ import annotations

from typing import Any, ClassVar

from lmjax.interop.architecture import Architecture, TensorRule
from lmjax.interop.fields import Fields
from lmjax.model import ModelConfig

ACTIVATIONS = {
    "gelu_new": "gelu",
    "gelu_pytorch_tanh": "gelu",
    "gelu_fast": "gelu",
    "gelu": "gelu_erf",
    "relu": "relu",
    "silu": "silu",
    "swish": "silu",
}
"""Names in `transformers`, and here."""

_SCALES = "attention scores are scaled by 1/sqrt(head width) here, whatever the layer"


class GPT2(Architecture):
    """`GPT2LMHeadModel`."""

    name = "gpt2"
    class_name = "GPT2LMHeadModel"
    prefix = "transformer."
    buffers = (r".*\.attn\.(bias|masked_bias)",)
    needs: ClassVar[dict[str, Any]] = {
        "positions": "learned",
        "norm": "layer",
        "bias": True,
        "qkv_bias": True,
        "out_bias": True,
        "qk_norm": False,
        "activation": tuple(dict.fromkeys(ACTIVATIONS.values())),
    }

    def settings(self, fields: Fields) -> dict[str, Any]:
        """See `Architecture`."""
        fields.only("scale_attn_weights", True, True, _SCALES)
        fields.only("scale_attn_by_inverse_layer_idx", False, False, _SCALES)
        fields.only("add_cross_attention", False, False, "cross attention is not supported")
        return {
            "vocab_size": fields.integer("vocab_size"),
            "max_positions": fields.integer("n_positions"),
            "width": fields.integer("n_embd"),
            "layers": fields.integer("n_layer"),
            "heads": fields.integer("n_head"),
            "mlp_width": fields.integer("n_inner", None) or 0,
            "activation": fields.choice("activation_function", "gelu_new", ACTIVATIONS),
            "norm_epsilon": fields.real("layer_norm_epsilon", 1e-5),
            "dropout": fields.rate("embd_pdrop", "attn_pdrop", "resid_pdrop", default=0.1),
            "tied": fields.flag("tie_word_embeddings", True),
        }

    def fields(self, model: ModelConfig) -> dict[str, Any]:
        """See `Architecture`."""
        names = {ours: theirs for theirs, ours in reversed(ACTIVATIONS.items())}
        rates = ("embd_pdrop", "attn_pdrop", "resid_pdrop")
        return {
            "vocab_size": model.vocab_size,
            "n_positions": model.max_positions,
            "n_embd": model.width,
            "n_layer": model.layers,
            "n_head": model.heads,
            "n_inner": model.mlp_size,
            "activation_function": names[model.activation],
            "layer_norm_epsilon": model.norm_epsilon,
            "initializer_range": model.init_std,
            "tie_word_embeddings": model.tied,
            **dict.fromkeys(rates, model.dropout),
        }

    def rules(self, model: ModelConfig) -> list[TensorRule]:
        """See `Architecture`; `Conv1D` stores `[in, out]`, and queries, keys, values as one."""
        attention, mlp = "blocks/attention", "blocks/mlp"
        layers = {
            "h.{}.ln_1": ((f"{attention}/norm",), "scale"),
            "h.{}.attn.c_attn": (
                tuple(f"{attention}/{n}" for n in ("query", "key", "value")),
                "kernel",
            ),
            "h.{}.attn.c_proj": ((f"{attention}/out",), "kernel"),
            "h.{}.ln_2": ((f"{mlp}/norm",), "scale"),
            "h.{}.mlp.c_fc": ((f"{mlp}/up",), "kernel"),
            "h.{}.mlp.c_proj": ((f"{mlp}/down",), "kernel"),
            "ln_f": (("norm",), "scale"),
        }
        rules = [
            TensorRule("wte.weight", ("embed/table",)),
            TensorRule("wpe.weight", ("positions/table",)),
        ]
        for tensor, (places, weight) in layers.items():
            for name, own in (("weight", weight), ("bias", "bias")):
                rules.append(
                    TensorRule(f"{tensor}.{name}", tuple(f"{place}/{own}" for place in places))
                )
        if not model.tied:
            rules.append(TensorRule("lm_head.weight", ("head/kernel",), transposed=True))
        return rules

    def more_obstacles(self, model: ModelConfig) -> list[str]:
        """See `Architecture`."""
        found = []
        if model.kv_head_count != model.heads:
            found.append(f"model.kv_heads is {model.kv_head_count}, not {model.heads} as heads")
        if model.head_size * model.heads != model.width:
            found.append(
                f"model.head_width is {model.head_size}, not width / heads, "
                f"{model.width / model.heads:g}"
            )
        return found
