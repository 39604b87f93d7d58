"""The keys of the grammar of policies: one row each.

A row says what a key is called, which field of `SitePolicy` it sets, how its values are written and
what it follows if it is not set. Policies, rules, tables and the grammar read this table.

Knows the values of keys, formats and quantizers.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any, Final, NamedTuple

import jax

from lmjax.precision.formats import Format, parse_format
from lmjax.precision.hadamard import DEFAULT_BLOCK
from lmjax.precision.quantizer import Quantizer, parse_quantizer
from lmjax.precision.rounding import Rounding
from lmjax.precision.settings import Accumulator, Operand, Storage


class Key(NamedTuple):
    """One key of the grammar.

    Attributes:
      long: the longer name that means the same.
      tensor: what it decides.
      default: its value if it is not set: that of another key, or a value.
      parse: from the text of a value to the value; raises ValueError.
      kind: the type of its values.
      other: the field of `SitePolicy` that it sets, if that is not called `long`.
    """

    long: str
    tensor: str
    default: str
    parse: Callable[[str], Any]
    kind: type
    other: str = ""

    @property
    def field(self) -> str:
        """The field of `SitePolicy` that it sets."""
        return self.other or self.long


def _format(text: str) -> Format:
    if text == "half":  # jmp's meaning: whatever 16-bit format the accelerator is fast in
        text = "bf16" if jax.default_backend() == "tpu" else "f16"
    number_format = parse_format(text)
    if not number_format.signed or number_format.is_integer:
        raise ValueError(f"nothing is stored or computed in {text}; it is for w, x and g")
    return number_format


def _stored(text: str) -> Storage:
    name, dot, update = text.partition(".")
    if dot and update not in ("nearest", "sr", "kahan"):
        raise ValueError(f"updates are rounded by .sr or .kahan, not .{update}")
    return Storage(_format(name), update or "nearest")  # type: ignore[arg-type]


def _weights(text: str) -> Operand:
    name = text.removesuffix(".stored")
    return replace(_operand(name), kept="" if name == text else "stored")


def _activations(text: str) -> Operand:
    name = text.removesuffix(".static")
    return replace(_operand(name), kept="" if name == text else "static")


def _operand(text: str) -> Operand:
    name = re.sub(r"(\.(sr|rht[0-9]*))*\Z", "", text)
    options = text[len(name) :].split(".")[1:]
    rotations = [int(option[3:] or DEFAULT_BLOCK) for option in options if option != "sr"]
    if options.count("sr") > 1 or len(rotations) > 1:
        raise ValueError("write .sr and .rht once at most")
    if 0 in rotations:
        raise ValueError("a rotation of blocks of 0; write .rht, or .rhtN with a power of two")
    rounding: Rounding = "stochastic" if "sr" in options else "nearest_even"
    return Operand(parse_quantizer(_short(name)), rounding, rotations[0] if rotations else 0)


def _cotangents(text: str) -> Operand:
    operand = _operand(text)
    if operand.quantizer.way == "learned":
        raise ValueError("factors are learned for w and x, which have gradients; use .observedN")
    return operand


def _backward(text: str) -> Operand:
    operand = _operand(text)
    if operand.quantizer.history:
        raise ValueError("histories are those of w, x and g; leave out .delayed")
    return operand


def _accumulator(text: str) -> Accumulator:
    match = re.fullmatch(r"(\w+)(?:@block([1-9]\d*))?", text)
    if match is None:
        raise ValueError("write a format, or FORMAT@blockN for chunks of N terms")
    return Accumulator(_format(match[1]), int(match[2] or 0))


def _matmul(text: str) -> str:
    if text not in ("highest", "tf32", "default"):
        raise ValueError(f"unknown matmul precision '{text}'; use highest, tf32 or default")
    return text


def _moment(text: str) -> Quantizer:
    quantizer = parse_quantizer(_short(text))
    if quantizer.affine or quantizer.history or quantizer.groups == "channel":
        raise ValueError("moments are stored in a format, FORMAT@tensor or FORMAT@blockN")
    return quantizer


def _cache(text: str) -> Quantizer:
    quantizer = parse_quantizer(_short(text))
    if quantizer.groups == "tensor" or quantizer.tensor_scale:
        raise ValueError(
            "keys and values arrive one position at a time and cannot share a factor; write a "
            "format, FORMAT@channel or FORMAT@blockN"
        )
    return quantizer


def _short(name: str) -> str:
    """Long and jmp names of formats, shortened; anything else as it is."""
    try:
        return parse_format(name).name
    except ValueError:
        return name


KEYS: Final = {
    "p": Key("params", "parameters as stored and updated", "f32", _stored, Storage, "stored"),
    "c": Key("compute", "everything a site computes with", "p", _format, Format),
    "o": Key("output", "the model's output: its logits", "c", _format, Format),
    "w": Key("weights", "weights as operands of products", "c", _weights, Operand),
    "x": Key("activations", "activations as operands of products", "c", _activations, Operand),
    "g": Key("grads", "cotangents entering the backward products", "c", _cotangents, Operand),
    "wb": Key("backward_weights", "weights in the backward products", "w", _backward, Operand),
    "xb": Key("backward_activations", "activations in those", "x", _backward, Operand),
    "a": Key("accum", "accumulation of products", "f32", _accumulator, Accumulator),
    "m": Key("matmul", "precision of products of f32 operands", "highest", _matmul, str),
    "r": Key("reduce", "gradient reductions across devices", "f32", _format, Format),
    "mu": Key("first_moment", "first moment of the optimizer", "f32", _moment, Quantizer, "mu"),
    "nu": Key("second_moment", "second moment of the optimizer", "f32", _moment, Quantizer, "nu"),
    "kv": Key("cache", "keys and values kept while decoding", "c", _cache, Quantizer),
}
"""Every key, by its short name; the order is that of canonical strings."""

OPERANDS: Final = tuple(key for key, row in KEYS.items() if row.kind is Operand)
"""Keys that quantize operands of products."""
