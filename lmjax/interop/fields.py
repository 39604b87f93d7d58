"""The fields of a Hugging Face `config.json`, read one by one; what is wrong is collected.

Knows nothing but the errors that it collects.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_WITHOUT_EFFECT = (
    # names, versions, and how others run a model
    "_name_or_path", "architectures", "model_type", "torch_dtype", "dtype", "transformers_version",
    "auto_map", "use_cache", "pretraining_tp", "reorder_and_upcast_attn", "_attn_implementation",
    "attn_implementation", "gradient_checkpointing", "finetuning_task", "problem_type", "prefix",
    "output_attentions", "output_hidden_states", "return_dict", "return_dict_in_generate",
    "use_return_dict", "keys_to_ignore_at_inference", "task_specific_params", "lmjax",
    "is_decoder", "is_encoder_decoder", "max_window_layers", "n_ctx", "chunk_size_feed_forward",
    # ids that tokenizers know, heads that are not imported, initialization
    "bos_token_id", "eos_token_id", "pad_token_id", "unk_token_id", "sep_token_id", "cls_token_id",
    "decoder_start_token_id", "tokenizer_class", "id2label", "label2id", "num_labels",
    "summary_type", "summary_use_proj", "summary_activation", "summary_first_dropout",
    "summary_proj_to_labels", "initializer_range", "initializer_cutoff_factor",
)  # fmt: skip
_MISSING: Any = object()


class Fields:
    """Fields by name, with the values that the family's own code gives absent ones.

    Attributes:
      problems: what prevents an import, one line each.
      notes: what a user should know.
    """

    def __init__(self, values: Mapping[str, Any]):
        self._values, self._read = values, set(_WITHOUT_EFFECT)
        self.problems: list[str] = []
        self.notes: list[str] = []

    def integer(self, name: str, default: Any = _MISSING) -> Any:
        """A whole number above zero; 1 if it is missing and has no default."""
        return self._typed(name, default, (int,), "a whole number above 0")

    def real(self, name: str, default: Any = _MISSING) -> Any:
        """A number above zero."""
        return self._typed(name, default, (int, float), "a number above 0")

    def flag(self, name: str, default: bool) -> bool:
        """True or false."""
        value = self.any(name, default)
        if not isinstance(value, bool):
            self.problems.append(f"{name} is {value!r}; it must be true or false")
        return bool(value)

    def rate(self, *names: str, default: float) -> float:
        """The dropout rate that several fields share; 0 with a note where they differ."""
        rates = {name: self.any(name, default) for name in names}
        if len({*rates.values()}) == 1 and isinstance(rate := rates[names[0]], int | float):
            return float(rate)
        listed = ", ".join(f"{name} {rate}" for name, rate in rates.items())
        self.notes.append(f"{listed}: lmjax has one rate of dropout, which is now 0")
        return 0.0

    def any(self, name: str, default: Any = None) -> Any:
        """Whatever a field holds; null means the default."""
        self._read.add(name)
        value = self._values.get(name)
        return default if value is None else value

    def given(self, name: str, default: Any) -> Any:
        """Whatever a field holds, null included; the default only if it is absent."""
        self._read.add(name)
        return self._values.get(name, default)

    def only(self, name: str, allowed: Any, default: Any, why: str) -> None:
        """Refuses any other value than one; `why` says what it would need."""
        if (value := self.any(name, default)) != allowed:
            self.problems.append(f"{name} is {value!r}: {why}")

    def choice(self, name: str, default: str, known: Mapping[str, str]) -> str:
        """What a field's value is called in lmjax."""
        value = self.any(name, default)
        if not isinstance(value, str) or value not in known:
            self.problems.append(f"{name} is {value!r}; supported are {', '.join(known)}")
            return next(iter(known.values()))
        return known[value]

    def unread(self) -> list[str]:
        """The fields that were not read and may have an effect."""
        return sorted(set(self._values) - self._read)

    def _typed(self, name: str, default: Any, kinds: tuple[type, ...], what: str) -> Any:
        value = self.any(name, default)
        if value is _MISSING:
            self.problems.append(f"config.json has no {name}")
            return 1
        if value is None:
            return None
        if type(value) not in kinds or not value > 0:
            self.problems.append(f"{name} is {value!r}; it must be {what}")
            return 1
        return value
