"""The grammar of policies: a superset of `jmp`'s strings.

    p=f32,c=bf16,o=f32                                 what jmp says: params, compute, output
    p=f32,c=bf16,o=f32; **/softmax: c=bf16             rules by path after semicolons
    mixed_bf16; blocks/0: c=f32; blocks/-1: c=f32      presets by name, indices from the end
    c=bf16,w=e4m3@tensor,x=e4m3@tensor,g=e5m2@tensor   fp8 matmuls with a scale per tensor
    mixed_bf16,wb=mxfp4,xb=mxfp4,g=mxfp4.rht.sr      backward products in MXFP4, rotated first
    0: mixed_bf16; head: c=f32 | 1000: f32             phases: a whole policy from each step on

`keys.py` lists the keys and how each value is written. Every string that jmp accepts has the same
meaning here, with one exception: a key given twice with different values, where jmp uses the last
one, is an error, because in the record of an experiment it is a mistake.

Knows policies, their keys and formats.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from lmjax.precision.formats import parse_format
from lmjax.precision.keys import KEYS
from lmjax.precision.policy import NATIVE, Policy, PolicyError, PolicyPhase, Rule
from lmjax.precision.settings import Storage

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
    phases: list[PolicyPhase] = []
    for segment, start in _split(text, 0, "|"):
        phases.append(_parse_phase(text, segment, start, phases))
    return replace(phases[0].policy, later=tuple(phases[1:]))


def _parse_phase(
    text: str, segment: str, start: int, earlier: Sequence[PolicyPhase]
) -> PolicyPhase:
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
    return PolicyPhase(first, _parse_phase_policy(text, policy, start + len(step) + 1))


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
    stored = settings.get("p", Storage(parse_format("f32")))
    compute = settings.get("c", stored.format)
    filled = {"p": stored, "c": compute, "o": settings.get("o", compute)} | settings
    return {key: filled[key] for key in KEYS if key in filled}, rules


def _parse_name(text: str, name: str, start: int) -> tuple[dict[str, Any], tuple[Rule, ...]]:
    """A preset, or one format for everything as in jmp: settings and rules."""
    if name in PRESETS:
        preset = _parse_phase_policy(PRESETS[name], PRESETS[name], 0)
        return dict(preset.base), tuple(replace(rule, position=start) for rule in preset.rules)
    number_format = _parse_value(text, "c", name, start, also=tuple(PRESETS))
    return {"p": Storage(number_format), "c": number_format, "o": number_format}, ()


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
