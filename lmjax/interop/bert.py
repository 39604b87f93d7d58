"""BERT (Devlin et al. 2019): an encoder with a head for masked tokens, for classes, or none."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar

from lmjax.interop.architecture import Architecture, TensorRule, linear
from lmjax.interop.fields import Fields
from lmjax.interop.gpt2 import ACTIVATIONS
from lmjax.model import ModelConfig

_POSITIONS = "only absolute positions are supported"
_DECODER = "it reads in one direction; only bidirectional BERTs are supported"
TOKENS, CLASSES = "BertForMaskedLM", "BertForSequenceClassification"
HEADLESS = "BertModel"
_INSIDE = "bert."
"""What the names of all tensors but those of a head begin with, where there is a head."""
_BLOCK = "bert.encoder.layer.{}"


class Bert(Architecture):
    """`BertForMaskedLM`, `BertForSequenceClassification` and `BertModel`, which has no head."""

    name = "bert"
    class_name = TOKENS
    prefix = ""
    buffers = (r"(bert\.)?embeddings\.position_ids", r"cls\.predictions\.(decoder\.)?bias")
    needs: ClassVar[dict[str, Any]] = {
        "family": "encoder",
        "positions": "learned",
        "norm": "layer",
        "bias": True,
        "qkv_bias": True,
        "out_bias": True,
        "qk_norm": False,
        "activation": tuple(dict.fromkeys(ACTIVATIONS.values())),
    }

    def class_of(self, model: ModelConfig) -> str:
        """See `Architecture`."""
        return HEADLESS if model.headless else CLASSES if model.classes else TOKENS

    def settings(self, fields: Fields) -> dict[str, Any]:
        """See `Architecture`."""
        fields.only("position_embedding_type", "absolute", "absolute", _POSITIONS)
        fields.only("is_decoder", False, False, _DECODER)
        fields.only("add_cross_attention", False, False, "cross attention is not supported")
        wanted = fields.any("architectures", [TOKENS])
        head = wanted[0] if isinstance(wanted, list) and wanted else wanted
        if head not in (TOKENS, CLASSES, HEADLESS):
            fields.problems.append(
                f"architectures is {wanted!r}; supported are {TOKENS}, {CLASSES} and {HEADLESS}"
            )
        if head == HEADLESS:
            fields.notes.append(
                "it has no head: it encodes texts, and --init-from starts training with a new one"
            )
        names = fields.any("id2label", {"0": "LABEL_0", "1": "LABEL_1"})
        if not isinstance(names, dict) or names.keys() != {*map(str, range(len(names)))}:
            fields.problems.append(f"id2label is {names!r}; it must number classes from 0")
            names = {}
        return {
            "family": "encoder",
            "vocab_size": fields.integer("vocab_size"),
            "max_positions": fields.integer("max_position_embeddings", 512),
            "width": fields.integer("hidden_size"),
            "layers": fields.integer("num_hidden_layers"),
            "heads": fields.integer("num_attention_heads"),
            "mlp_width": fields.integer("intermediate_size"),
            "token_types": fields.integer("type_vocab_size", 2),
            "activation": fields.choice("hidden_act", "gelu", ACTIVATIONS),
            "norm_epsilon": fields.real("layer_norm_eps", 1e-12),
            "dropout": fields.rate(
                "hidden_dropout_prob", "attention_probs_dropout_prob", default=0.1
            ),
            "tied": fields.flag("tie_word_embeddings", True),
            "classes": len(names) if head == CLASSES else 0,
            "headless": head == HEADLESS,
        }

    def fields(self, model: ModelConfig) -> dict[str, Any]:
        """See `Architecture`."""
        names = {ours: theirs for theirs, ours in reversed(ACTIVATIONS.items())}
        rates = ("hidden_dropout_prob", "attention_probs_dropout_prob")
        labels = [f"LABEL_{i}" for i in range(model.classes)]
        return {
            "vocab_size": model.vocab_size,
            "max_position_embeddings": model.max_positions,
            "hidden_size": model.width,
            "num_hidden_layers": model.layers,
            "num_attention_heads": model.heads,
            "intermediate_size": model.mlp_size,
            "type_vocab_size": model.token_types,
            "hidden_act": names[model.activation],
            "layer_norm_eps": model.norm_epsilon,
            "initializer_range": model.init_std,
            "tie_word_embeddings": model.tied,
            **(numbered(labels) if labels else {}),
            **dict.fromkeys(rates, model.dropout),
        }

    def rules(self, model: ModelConfig) -> list[TensorRule]:
        """See `Architecture`."""
        rules = self._trunk()
        if model.pooled:
            rules += linear("bert.pooler.dense", "pool/dense", bias=True)
        if model.headless:
            bare = lambda rule: replace(rule, tensor=rule.tensor.removeprefix(_INSIDE))
            return [bare(rule) for rule in rules]
        if model.classes:
            return rules + linear("classifier", "head", bias=True)
        rules += linear("cls.predictions.transform.dense", "transform/dense", bias=True)
        rules += _norm("cls.predictions.transform.LayerNorm", "transform/norm")
        if model.tied:
            return [*rules, TensorRule("cls.predictions.bias", ("head/bias",))]
        return rules + linear("cls.predictions.decoder", "head", bias=True)

    def _trunk(self) -> list[TensorRule]:
        """The tensors of embeddings and blocks."""
        tables = {"word": "embed", "position": "positions", "token_type": "types"}
        rules = [
            TensorRule(f"bert.embeddings.{theirs}_embeddings.weight", (f"{ours}/table",))
            for theirs, ours in tables.items()
        ]
        rules += _norm("bert.embeddings.LayerNorm", "norm")
        layers = {
            "attention.self.query": "attention/query",
            "attention.self.key": "attention/key",
            "attention.self.value": "attention/value",
            "attention.output.dense": "attention/out",
            "intermediate.dense": "mlp/up",
            "output.dense": "mlp/down",
        }
        for theirs, ours in layers.items():
            rules += linear(f"{_BLOCK}.{theirs}", f"blocks/{ours}", bias=True)
        for theirs, ours in {"attention.output": "attention", "output": "mlp"}.items():
            rules += _norm(f"{_BLOCK}.{theirs}.LayerNorm", f"blocks/{ours}/norm")
        return rules

    def more_obstacles(self, model: ModelConfig) -> list[str]:
        """See `Architecture`."""
        found = []
        if not model.token_types:
            found.append("model.token_types is 0, not 1 or more")
        if model.kv_head_count != model.heads:
            found.append(f"model.kv_heads is {model.kv_head_count}, not {model.heads} as heads")
        if model.head_size * model.heads != model.width:
            found.append(
                f"model.head_width is {model.head_size}, not width / heads, "
                f"{model.width / model.heads:g}"
            )
        return found


def numbered(labels: Sequence[str]) -> dict[str, Any]:
    """The fields of `config.json` that name classes."""
    return {
        "id2label": {str(number): label for number, label in enumerate(labels)},
        "label2id": {label: number for number, label in enumerate(labels)},
    }


def named(values: Mapping[str, Any], classes: int) -> tuple[str, ...]:
    """The classes that a `config.json` names; empty if it only numbers them."""
    names = values.get("id2label") or {}
    found = tuple(str(names.get(str(i), f"LABEL_{i}")) for i in range(classes))
    return () if found == tuple(f"LABEL_{i}" for i in range(classes)) else found


def _norm(tensor: str, place: str) -> list[TensorRule]:
    """The rules of a LayerNorm."""
    parts = {"weight": "scale", "bias": "bias"}
    return [
        TensorRule(f"{tensor}.{theirs}", (f"{place}/{ours}",)) for theirs, ours in parts.items()
    ]
