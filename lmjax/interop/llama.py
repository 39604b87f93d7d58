"""Llama 2 and 3 (Touvron et al. 2023, Meta 2024), and what its descendants share with it."""

from __future__ import annotations

from typing import Any, ClassVar

from lmjax.interop.architecture import Architecture, TensorRule, linear
from lmjax.interop.fields import Fields
from lmjax.model import ModelConfig, RopeScaling

_PARTIAL = "rotary embeddings turn whole heads here"


class Llama(Architecture):
    """`LlamaForCausalLM`; subclasses say what they do otherwise."""

    name = "llama"
    class_name = "LlamaForCausalLM"
    prefix = "model."
    buffers = (r".*rotary_emb\.inv_freq",)
    needs: ClassVar[dict[str, Any]] = {
        "positions": "rope",
        "norm": "rms",
        "activation": "swiglu",
        "qk_norm": False,
    }
    head_width: ClassVar[int] = 0
    """Where `config.json` names none; 0: width / heads."""

    def settings(self, fields: Fields) -> dict[str, Any]:
        """See `Architecture`."""
        fields.only("hidden_act", "silu", "silu", "the gate of a Llama-like MLP is a SiLU here")
        heads = fields.integer("num_attention_heads")
        mlp_bias, biased = self.biases(fields)
        self.refuse_windows(fields)
        base, scaling = _rope(fields)
        return {
            "vocab_size": fields.integer("vocab_size"),
            "max_positions": fields.integer("max_position_embeddings"),
            "width": fields.integer("hidden_size"),
            "layers": fields.integer("num_hidden_layers"),
            "heads": heads,
            "kv_heads": fields.integer("num_key_value_heads", heads),
            "head_width": fields.integer("head_dim", self.head_width or None) or 0,
            "mlp_width": fields.integer("intermediate_size"),
            "positions": "rope",
            "rope_base": base,
            "rope_scaling": scaling,
            "norm": "rms",
            "norm_epsilon": fields.real("rms_norm_eps", 1e-6),
            "activation": "swiglu",
            "bias": mlp_bias,
            "attention_bias": biased,
            "qk_norm": bool(self.needs["qk_norm"]),
            "dropout": fields.rate("attention_dropout", default=0.0),
            "tied": fields.flag("tie_word_embeddings", False),
        }

    def biases(self, fields: Fields) -> tuple[bool, str]:
        """Whether the MLP has biases, and which those of attention are."""
        mlp, attention = fields.flag("mlp_bias", False), fields.flag("attention_bias", False)
        return mlp, "same" if mlp == attention else "qkvo" if attention else "none"

    def refuse_windows(self, fields: Fields) -> None:
        """Refuses attention within a window."""
        if "sliding_attention" in (kinds := fields.any("layer_types", [])):
            count = kinds.count("sliding_attention")
            fields.problems.append(f"layer_types has sliding_attention {count} times: {WINDOW}")

    def fields(self, model: ModelConfig) -> dict[str, Any]:
        """See `Architecture`."""
        return {
            "vocab_size": model.vocab_size,
            "max_position_embeddings": model.max_positions,
            "hidden_size": model.width,
            "num_hidden_layers": model.layers,
            "num_attention_heads": model.heads,
            "num_key_value_heads": model.kv_head_count,
            "head_dim": model.head_size,
            "intermediate_size": model.mlp_size,
            "hidden_act": "silu",
            "rms_norm_eps": model.norm_epsilon,
            "rope_theta": model.rope_base,
            "rope_scaling": _rope_fields(model.rope_scaling),
            "initializer_range": model.init_std,
            "attention_dropout": model.dropout,
            "tie_word_embeddings": model.tied,
            **self.own_fields(model),
        }

    def own_fields(self, model: ModelConfig) -> dict[str, Any]:
        """Those that not all descendants have."""
        return {"attention_bias": model.out_bias, "mlp_bias": model.bias}

    def rules(self, model: ModelConfig) -> list[TensorRule]:
        """See `Architecture`."""
        attention, mlp = "blocks/attention", "blocks/mlp"
        qkv, out = {"bias": model.qkv_bias}, {"bias": model.out_bias}
        rules = [
            TensorRule("embed_tokens.weight", ("embed/table",)),
            TensorRule("layers.{}.input_layernorm.weight", (f"{attention}/norm/scale",)),
            *linear("layers.{}.self_attn.q_proj", f"{attention}/query", **qkv),
            *linear("layers.{}.self_attn.k_proj", f"{attention}/key", **qkv),
            *linear("layers.{}.self_attn.v_proj", f"{attention}/value", **qkv),
            *linear("layers.{}.self_attn.o_proj", f"{attention}/out", **out),
            TensorRule("layers.{}.post_attention_layernorm.weight", (f"{mlp}/norm/scale",)),
            *linear("layers.{}.mlp.gate_proj", f"{mlp}/gate", bias=model.bias),
            *linear("layers.{}.mlp.up_proj", f"{mlp}/up", bias=model.bias),
            *linear("layers.{}.mlp.down_proj", f"{mlp}/down", bias=model.bias),
            TensorRule("norm.weight", ("norm/scale",)),
        ]
        if model.qk_norm:
            for ours, theirs in (("query", "q"), ("key", "k")):
                name = f"layers.{{}}.self_attn.{theirs}_norm.weight"
                rules.append(TensorRule(name, (f"{attention}/{ours}_norm/scale",)))
        if not model.tied:
            rules.append(TensorRule("lm_head.weight", ("head/kernel",), transposed=True))
        return rules

    def more_obstacles(self, model: ModelConfig) -> list[str]:
        """See `Architecture`."""
        alike = model.qkv_bias == model.out_bias
        return [] if alike else [f"model.attention_bias is {model.attention_bias}"]


WINDOW = "attention within a window is not supported"


def _rope(fields: Fields) -> tuple[float, RopeScaling]:
    """The base of rotary frequencies and how they are lowered.

    Version 5 of transformers has both in `rope_parameters`, earlier ones in two fields.
    """
    values = fields.any("rope_parameters") or fields.any("rope_scaling") or {}
    fields.any("rope_scaling")
    fields.only("partial_rotary_factor", 1.0, 1.0, _PARTIAL)
    inside = Fields(values if isinstance(values, dict) else {})
    base = inside.real("rope_theta", fields.real("rope_theta", 10000.0))
    kind = inside.any("rope_type", inside.any("type", "default"))
    inside.only("partial_rotary_factor", 1.0, 1.0, _PARTIAL)
    scaling = RopeScaling()
    if kind == "linear":
        scaling = RopeScaling("linear", inside.real("factor"))
    elif kind == "llama3":
        low, high = inside.real("low_freq_factor"), inside.real("high_freq_factor")
        original = inside.integer("original_max_position_embeddings")
        if low < high:
            scaling = RopeScaling("llama3", inside.real("factor"), low, high, original)
        else:
            inside.problems.append(f"low_freq_factor {low} is not below high_freq_factor {high}")
    elif kind != "default":
        inside.problems.append(f"its type is {kind!r}; supported are default, linear and llama3")
    if unknown := inside.unread():
        inside.problems.append(f"{', '.join(unknown)} is unknown")
    fields.problems += [f"rotary embeddings: {problem}" for problem in inside.problems]
    return float(base), scaling


def _rope_fields(scaling: RopeScaling) -> dict[str, Any] | None:
    if scaling.kind == "none":
        return None
    if scaling.kind == "linear":
        return {"rope_type": "linear", "factor": scaling.factor}
    return {
        "rope_type": "llama3",
        "factor": scaling.factor,
        "low_freq_factor": scaling.low_frequency,
        "high_freq_factor": scaling.high_frequency,
        "original_max_position_embeddings": scaling.original_positions,
    }
