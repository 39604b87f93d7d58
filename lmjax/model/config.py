"""What a Transformer is made of, as one frozen dataclass, and the published families by name.

Knows nothing but how fields are checked.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal

from lmjax.checks import above, at_least, between, from_to_below, validate

Size = Annotated[int, at_least(1)]
DerivedSize = Annotated[int, at_least(0)]
"""0: derived from other fields."""

Remat = Literal["none", "dots", "attention", "full", "offload"]
"""What can be recomputed in the backward pass, in the order of what is kept on the device."""

DEEPEST = 1024
"""Blocks: the deepest published Transformer has 1,000 layers (DeepNet, Wang et al. 2022)."""


@dataclass(frozen=True)
class RopeScaling:
    """How rotary frequencies are lowered for contexts longer than those first trained on."""

    kind: Literal["none", "linear", "llama3"] = "none"
    """none; linear, all frequencies divided by the factor (Chen et al. 2023); llama3, only those
    that turn slowly (Llama 3.1, Meta 2024)."""
    factor: Annotated[float, at_least(1)] = 1.0
    """What slow frequencies are divided by."""
    low_frequency: Annotated[float, above(0)] = 1.0
    """llama3: frequencies of at most this many turns in the original context are divided."""
    high_frequency: Annotated[float, above(0)] = 4.0
    """llama3: frequencies of at least this many turns in the original context stay."""
    original_positions: Size = 8192
    """llama3: the original context."""

    def __post_init__(self) -> None:
        """Refuses bounds in the wrong order."""
        validate(self, "model.rope_scaling")
        if self.low_frequency >= self.high_frequency:
            raise ValueError(
                f"model.rope_scaling.high_frequency is {self.high_frequency}; it must be above "
                f"model.rope_scaling.low_frequency, which is {self.low_frequency}"
            )


@dataclass(frozen=True)
class ModelConfig:
    """A Transformer. One code path; the fields tell GPT-2 from Llama, and both from BERT."""

    family: Literal["decoder", "encoder"] = "decoder"
    """Which row of `families.py` puts the model together: a decoder predicts the next token (GPT-2,
    Llama); an encoder reads in both directions, with norms after its branches (BERT, Devlin et al.
    2019), and predicts masked tokens or classes."""
    vocab_size: Size = 256
    """Rows of the embedding table; at least as many as the tokenizer has tokens."""
    max_positions: Size = 256
    """Longest context; with learned positions, the rows of their table."""
    width: Size = 128
    """Size of the residual stream."""
    layers: Annotated[int, at_least(1, DEEPEST)] = 4
    """Number of blocks."""
    heads: Size = 4
    """Query heads."""
    kv_heads: DerivedSize = 0
    """Key and value heads, shared by groups of query heads; 0: as many as heads."""
    head_width: DerivedSize = 0
    """Size of one head; 0: width / heads."""
    mlp_width: DerivedSize = 0
    """Hidden size of the MLP; 0: four times the width."""
    positions: Literal["learned", "rope"] = "learned"
    """Learned absolute positions, or rotary embeddings (Su et al. 2021)."""
    rope_base: Annotated[float, at_least(1)] = 10000.0
    """Base of the rotary frequencies."""
    rope_scaling: RopeScaling = RopeScaling()
    norm: Literal["layer", "rms"] = "layer"
    """LayerNorm (Ba et al. 2016) or RMSNorm (Zhang and Sennrich 2019)."""
    norm_epsilon: Annotated[float, above(0)] = 1e-5
    """Added to the variance before the square root."""
    activation: Literal["gelu", "gelu_erf", "relu", "silu", "swiglu"] = "gelu"
    """GELU (Hendrycks and Gimpel 2016), its tanh form or exact; ReLU; SiLU; or a SiLU-gated MLP
    (Shazeer 2020)."""
    bias: bool = True
    """Biases in the linear layers and the LayerNorms."""
    attention_bias: Literal["same", "none", "qkv", "qkvo"] = "same"
    """Biases of attention's linear layers: as `bias` says; none; those of queries, keys and values
    (Qwen 2); or all four."""
    tied: bool = True
    """The head reuses the embedding table."""
    token_types: DerivedSize = 0
    """Encoder: rows of the table of token types, which tell the segments of a text apart; 0: none.
    """
    classes: DerivedSize = 0
    """Encoder: classes of texts to predict; 0: masked tokens."""
    headless: bool = False
    """Encoder: it ends with the pooled first token (`BertModel` of transformers), to be read, or
    started from with a new head; nothing is predicted."""
    mask_token: DerivedSize = 0
    """Encoder: id that stands for a masked token; 0: the last of the vocabulary."""
    mask_rate: Annotated[float, between(0, 1)] = 0.15
    """Encoder: the share of tokens that are masked and predicted."""
    qk_norm: bool = False
    """RMSNorm on queries and keys, per head (Henry et al. 2020)."""
    dropout: Annotated[float, from_to_below(0, 1)] = 0.0
    """Rate for embeddings, attention weights and what each half block adds."""
    z_loss: Annotated[float, at_least(0)] = 0.0
    """Weight of the squared log-partition in the loss (PaLM, section 5); 1e-4 is usual."""
    parametrisation: Literal["standard", "unit"] = "standard"
    """What keeps numbers in range: small initial weights, or unit scaling (Blake et al. 2023), by
    which weights, activations and gradients start with a standard deviation of about 1 and narrow
    formats need no loss scale. It wants learning rates of its own; see `unit_scaling.py`."""
    init_std: Annotated[float, at_least(0)] = 0.02
    """Standard deviation of initial weights; divided by sqrt(2 layers) where a block ends. With
    unit scaling it is 1, whatever stands here."""
    remat: Remat = "none"
    """What the backward pass computes again: nothing; all but products with weights; all but what
    attention read; everything; or everything, from block inputs kept in the memory of the host,
    which CPUs refuse."""
    unroll: Size = 1
    """Blocks per iteration of the scan over layers: more compile time, less overhead. With `remat`,
    CPUs take one, since XLA would undo the recomputation of others."""

    def __post_init__(self) -> None:
        """Refuses what cannot be built."""
        validate(self, "model")
        if not self.head_width and self.width % self.heads:
            raise ValueError(
                f"model.heads is {self.heads}, which does not divide model.width {self.width}; "
                f"choose heads among {_divisors(self.width)}, or set model.head-width"
            )
        if self.heads % self.kv_head_count:
            raise ValueError(
                f"model.kv_heads is {self.kv_heads}, which does not divide model.heads "
                f"{self.heads}; choose kv-heads among {_divisors(self.heads)}"
            )
        if self.positions == "rope" and self.head_size % 2:
            raise ValueError(
                f"rotary positions turn pairs, but a head is {self.head_size} wide; make "
                "model.head-width even"
            )
        self._refuse_other_family()
        if self.parametrisation == "unit" and self.activation not in ("gelu", "swiglu"):
            raise ValueError(
                f"unit scaling has no gain for the activation {self.activation}; choose gelu or "
                "swiglu"
            )

    def _refuse_other_family(self) -> None:
        """Refuses settings of an encoder in a decoder, and ids beyond the vocabulary."""
        if self.mask_token >= self.vocab_size:
            raise ValueError(
                f"model.mask_token is {self.mask_token}, but model.vocab_size is {self.vocab_size};"
                " choose a smaller id or raise --model.vocab-size"
            )
        for name in ("token_types", "classes", "mask_token", "headless"):
            if self.family == "decoder" and getattr(self, name):
                raise ValueError(
                    f"model.{name} is {getattr(self, name)}, which a decoder does not have; leave "
                    "it at its default or set --model.family encoder"
                )
        if self.headless and self.classes:
            raise ValueError(
                f"model.classes is {self.classes}, but model.headless leaves out the head that "
                "predicts them; leave one of both out"
            )

    # The fields that 0 leaves open are derived here and not filled in, so that
    # `dataclasses.replace(config, width=...)` keeps deriving them.

    @property
    def head_size(self) -> int:
        """Size of one head."""
        return self.head_width or self.width // self.heads

    @property
    def kv_head_count(self) -> int:
        """Number of key and value heads."""
        return self.kv_heads or self.heads

    @property
    def qkv_bias(self) -> bool:
        """Whether queries, keys and values have biases."""
        return self.bias if self.attention_bias == "same" else self.attention_bias != "none"

    @property
    def out_bias(self) -> bool:
        """Whether what leaves attention has a bias."""
        return self.bias if self.attention_bias == "same" else self.attention_bias == "qkvo"

    @property
    def mask_id(self) -> int:
        """The id that stands for a masked token."""
        return self.mask_token or self.vocab_size - 1

    @property
    def tied_head(self) -> bool:
        """Whether the head multiplies by the embedding table."""
        return self.tied and not self.pooled

    @property
    def pooled(self) -> bool:
        """Whether an encoder pools the first token, which stands for the whole text."""
        return self.headless or self.classes > 0

    def predicted(self, length: int) -> int:
        """How many positions of a row of this length an objective reads."""
        if self.family == "decoder":
            return length
        return 1 if self.pooled else max(1, round(self.mask_rate * length))

    @property
    def mlp_size(self) -> int:
        """Hidden size of the MLP."""
        return self.mlp_width or 4 * self.width

    def resolved(self) -> ModelConfig:
        """The same model with every derived field written out: what a run records."""
        return replace(
            self,
            head_width=self.head_size,
            kv_heads=self.kv_head_count,
            mlp_width=self.mlp_size,
        )


def _divisors(number: int) -> str:
    small = [d for d in range(1, math.isqrt(number) + 1) if number % d == 0]
    return ", ".join(map(str, sorted({*small, *(number // d for d in small)})))


def gpt2(**changes: Any) -> ModelConfig:
    """GPT-2 small (Radford et al. 2019): 124,439,808 parameters."""
    small = ModelConfig(vocab_size=50257, max_positions=1024, width=768, layers=12, heads=12)
    return replace(small, **changes)


def llama_1b(**changes: Any) -> ModelConfig:
    """Llama 3.2 1B (Meta 2024): 1,235,814,400 parameters.

    Without the rescaling of rotary frequencies (`rope_scaling`) that the release uses to reach 128k
    tokens of context.
    """
    one_billion = ModelConfig(
        vocab_size=128256,
        max_positions=8192,
        width=2048,
        layers=16,
        heads=32,
        kv_heads=8,
        mlp_width=8192,
        positions="rope",
        rope_base=500000.0,
        norm="rms",
        activation="swiglu",
        bias=False,
    )
    return replace(one_billion, **changes)
