"""The grammar of policies: a superset of `jmp`'s strings.

    p=f32,c=bf16,o=f32                                 what jmp says: params, compute, output
    p=f32,c=bf16,o=f32; **/softmax: c=bf16             rules by path after semicolons
    mixed_bf16; blocks/0: c=f32; blocks/-1: c=f32      presets by name, indices from the end
    c=bf16,w=e4m3@tensor,x=e4m3@tensor,g=e5m2@tensor   fp8 matmuls with a scale per tensor
    mixed_bf16,wb=mxfp4,xb=mxfp4,g=mxfp4.rht.sr      backward products in MXFP4, rotated first
    0: mixed_bf16; head: c=f32 | 1000: f32             phases: a whole policy from each step on

`KEYS` lists the keys and how each value is written. Every string that jmp accepts has the same
meaning here, with one exception: a key given twice with different values, where jmp uses the last
one, is an error, because in the record of an experiment it is a mistake.

Knows policies, their settings, formats and quantizers.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import jax

from lmjax.precision.formats import Format, parse_format
from lmjax.precision.hadamard import DEFAULT_BLOCK
from lmjax.precision.policy import NATIVE, Phase, Policy, PolicyError, Rule
from lmjax.precision.quantizer import Quantizer, parse_quantizer
from lmjax.precision.rounding import Rounding
from lmjax.precision.settings import Accumulator, Operand, Stored


class Key(NamedTuple):
    """One key of the grammar.

    Attributes:
      long: the longer name that means the same.
      tensor: what it decides.
      default: its value if it is not set.
      parse: from the text of a value to the value; raises ValueError.
    """

    long: str
    tensor: str
    default: str
    parse: Callable[[str], Any]


def _format(text: str) -> Format:
    if text == "half":  # jmp's meaning: whatever 16-bit format the accelerator is fast in
        text = "bf16" if jax.default_backend() == "tpu" else "f16"
    number_format = parse_format(text)
    if not number_format.signed or number_format.is_integer:
        raise ValueError(f"nothing is stored or computed in {text}; it is for w, x and g")
    return number_format


def _stored(text: str) -> Stored:
    name, dot, update = text.partition(".")
    if dot and update not in ("nearest", "sr", "kahan"):
        raise ValueError(f"updates are rounded by .sr or .kahan, not .{update}")
    return Stored(_format(name), update or "nearest")  # type: ignore[arg-type]


def _operand(text: str) -> Operand:
    name = re.sub(r"(\.(sr|rht[0-9]*))*\Z", "", text)
    options = text[len(name) :].split(".")[1:]
    rotations = [int(option[3:] or DEFAULT_BLOCK) for option in options if option != "sr"]
    if options.count("sr") > 1 or len(rotations) > 1:
        raise ValueError("write .sr and .rht once at most")
    if 0 in rotations:
        raise ValueError("a rotation of blocks of 0; write .rht, or .rhtN with a power of two")
    rounding: Rounding = "stochastic" if "sr" in options else "nearest_even"
    return Operand(parse_quantizer(_short(name)), rounding, *rotations)


def _backward_operand(text: str) -> Operand:
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


KEYS = {
    "p": Key("params", "parameters as stored and updated", "f32", _stored),
    "c": Key("compute", "everything a site computes with", "p", _format),
    "o": Key("output", "the model's output: its logits", "c", _format),
    "w": Key("weights", "weights as operands of products", "c", _operand),
    "x": Key("activations", "activations as operands of products", "c", _operand),
    "g": Key("grads", "cotangents entering the backward products", "c", _operand),
    "wb": Key("backward_weights", "weights in the backward products", "w", _backward_operand),
    "xb": Key("backward_activations", "activations in those", "x", _backward_operand),
    "a": Key("accum", "accumulation of products", "f32", _accumulator),
    "m": Key("matmul", "precision of products of f32 operands", "highest", _matmul),
    "r": Key("reduce", "gradient reductions across devices", "f32", _format),
    "mu": Key("first_moment", "first moment of the optimizer", "f32", _moment),
    "nu": Key("second_moment", "second moment of the optimizer", "f32", _moment),
    "kv": Key("cache", "keys and values kept while decoding", "c", _cache),
}
"""Every key, by its short name; the order is that of canonical strings."""

_SHORT = {name: short for short, key in KEYS.items() for name in (short, key.long)}


def _autocast(narrow: str) -> str:
    """Products in a 16-bit format; embeddings, residual stream and final norm stay f32."""
    return f"p=f32,c=f32,o=f32; **/attention: c={narrow}; **/mlp: c={narrow}; head: c={narrow}"


PRESETS = {
    "mixed_bf16": "p=f32,c=bf16,o=f32",
    "mixed_f16": "p=f32,c=f16,o=f32",
    "pure_bf16": "p=bf16,c=bf16,o=bf16",
    "pure_f16": "p=f16,c=f16,o=f16",
    "fp8": "p=f32,c=bf16,o=f32,w=e4m3@tensor,x=e4m3@tensor,g=e5m2@tensor",
    "mxfp8": "p=f32,c=bf16,o=f32,w=mxfp8.rceil,x=mxfp8.rceil,g=mxfp8.rceil",
    "nvfp4": "p=f32,c=bf16,o=f32,w=nvfp4,x=nvfp4,g=nvfp4.sr",
    "int8": "p=f32,c=bf16,o=f32,w=int8@channel,x=int8@channel,g=int8@channel",
    "mixed_bfloat16": "p=f32,c=bf16,o=bf16",
    "mixed_float16": "p=f32,c=f16,o=f16",
    "autocast_bf16": _autocast("bf16"),
    "autocast_f16": _autocast("f16"),
    "O0": "p=f32,c=f32,o=f32",
    "O1": _autocast("f16"),
    "O2": "p=f32,c=f16,o=f32",
    "O3": "p=f16,c=f16,o=f16",
}
"""Policies by familiar name; a preset may have rules, which come before those written after it.

`mixed_bfloat16` and `mixed_float16` are Keras' names, O0 to O3 those of Apex. `autocast_*` is
PyTorch's autocast, and O1 of Apex is `autocast_f16`: both patch products to run in 16 bits and
promote sums to the wider operand, while O2 casts the whole model. The factors of `mxfp8` are
rounded up, as in the recipe of Mishra et al. 2025, arXiv 2506.08027; those of the MX specification
let the largest elements saturate: `w=mxfp8,x=mxfp8,g=mxfp8`."""


def parse_policy(text: str) -> Policy:
    """Reads a policy string.

    Raises:
      PolicyError: with the position of the first character that cannot be right.
    """
    # No format, preset or key begins with a digit or a sign: what does was meant as a step.
    if "|" not in text and not re.match(r"\s*[-+0-9]", text):
        return _parse_phase_policy(text, text, 0)
    phases: list[Phase] = []
    for segment, start in _split(text, 0, "|"):
        phases.append(_parse_phase(text, segment, start, phases))
    return replace(phases[0].policy, later=tuple(phases[1:]))


def _parse_phase(text: str, segment: str, start: int, earlier: Sequence[Phase]) -> Phase:
    """`STEP: POLICY`, which comes after some earlier phases."""
    step, colon, policy = segment.partition(":")
    name, position = _strip(step, start)
    # Ten digits, zeros before them aside, hold every step that an int32 counts, and int reads them.
    if not colon or not re.fullmatch(r"0{0,99}[0-9]{1,10}", name):
        raise PolicyError(
            "expected a phase: the step it begins at, a colon and a policy, such as 0: f32",
            text=text,
            position=position,
        )
    first = int(name)
    if not earlier and first:
        raise PolicyError(
            f"the first phase begins at step {first}; it must begin at 0",
            text=text,
            position=position,
        )
    if earlier and first <= earlier[-1].start:
        raise PolicyError(
            f"a phase begins at step {first} after one that begins at {earlier[-1].start}; put "
            "phases in order, each at a step of its own",
            text=text,
            position=position,
        )
    return Phase(first, _parse_phase_policy(text, policy, start + len(step) + 1))


def _parse_phase_policy(text: str, segment: str, start: int) -> Policy:
    """Base and rules."""
    (base, base_start), *written = _split(segment, start, ";")
    settings, rules = _parse_base(text, base, base_start)
    return Policy(settings, (*rules, *(_parse_rule(text, *rule) for rule in written)), text)


def _parse_base(text: str, segment: str, start: int) -> tuple[dict[str, Any], tuple[Rule, ...]]:
    """Settings of the base with p, c and o filled in as jmp fills them in, and a preset's rules."""
    name, start = _strip(segment, start)
    if not name:
        raise PolicyError(
            "expected a format, a preset or settings such as p=f32,c=bf16,o=f32",
            text=text,
            position=start,
        )
    first, comma, changes = name.partition(",")
    rules: tuple[Rule, ...] = ()
    if "=" in first:
        settings = _parse_settings(text, name, start)
    else:
        settings, rules = _parse_name(text, first.rstrip(), start)
        if comma:
            settings |= _parse_settings(text, changes, start + len(first) + 1)
    stored = settings.get("p", Stored(parse_format("f32")))
    compute = settings.get("c", stored.format)
    filled = {"p": stored, "c": compute, "o": settings.get("o", compute)} | settings
    return {key: filled[key] for key in KEYS if key in filled}, rules


def _parse_name(text: str, name: str, start: int) -> tuple[dict[str, Any], tuple[Rule, ...]]:
    """A preset, or one format for everything as in jmp: settings and rules."""
    if name in PRESETS:
        preset = _parse_phase_policy(PRESETS[name], PRESETS[name], 0)
        return dict(preset.base), tuple(replace(rule, position=start) for rule in preset.rules)
    number_format = _parse_value(text, "c", name, start, also=tuple(PRESETS))
    return {"p": Stored(number_format), "c": number_format, "o": number_format}, ()


def _parse_rule(text: str, segment: str, start: int) -> Rule:
    pattern, colon, assignments = segment.partition(":")
    stripped, position = _strip(pattern, start)
    if not colon or not stripped:
        raise PolicyError("expected a rule such as **/softmax: c=f32", text=text, position=position)
    broken = re.search(r"\s|^/|//|/$", stripped)
    if broken:
        raise PolicyError(
            f"'{stripped}' is not a path pattern; write components separated by single slashes",
            text=text,
            position=position + broken.start(),
        )
    settings = _parse_settings(text, assignments, start + len(pattern) + 1)
    return Rule(pattern=stripped, settings=settings, position=position)


def _parse_settings(text: str, segment: str, start: int) -> dict[str, Any]:
    settings: dict[str, Any] = {}
    for part, part_start in _split(segment, start, ","):
        name, equals, value = part.partition("=")
        name, name_start = _strip(name, part_start)
        key = _SHORT.get(name)
        if key is None:
            raise PolicyError(
                f"unknown key '{name}'; the keys are " + ", ".join(_SHORT),
                text=text,
                position=name_start,
            )
        if not equals:
            raise PolicyError(
                f"expected '=' after '{name}'", text=text, position=name_start + len(name)
            )
        parsed = _parse_value(text, key, *_strip(value, part_start + part.index("=") + 1))
        if settings.get(key, parsed) != parsed:
            raise PolicyError(
                f"'{name}' is given twice, as {settings[key]} and as {parsed}; keep one",
                text=text,
                position=name_start,
            )
        settings[key] = parsed
    return {key: settings[key] for key in KEYS if key in settings}


def _parse_value(text: str, key: str, value: str, position: int, also: tuple[str, ...] = ()) -> Any:
    try:
        return KEYS[key].parse(value)
    except ValueError as error:
        known = [*NATIVE, "float64", "float32", "bfloat16", "float16", "full", "half", *also]
        close = difflib.get_close_matches(value, known, n=1)
        hint = f"did you mean '{close[0]}'?" if close else str(error)
        raise PolicyError(
            f"'{value}' is not a valid value of '{key}' ({KEYS[key].tensor}); {hint}",
            text=text,
            position=position,
        ) from error


def _split(segment: str, start: int, separator: str) -> list[tuple[str, int]]:
    """The parts of a segment, each with the position of its first character in the policy."""
    parts = []
    for part in segment.split(separator):
        parts.append((part, start))
        start += len(part) + len(separator)
    return parts


def _strip(part: str, start: int) -> tuple[str, int]:
    """The part without surrounding white space, and the position of the remainder."""
    return part.strip(), start + len(part) - len(part.lstrip())
