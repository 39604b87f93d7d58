"""The policy: one string that says which number format every tensor has.

A policy is a superset of `jmp`'s strings. Base settings come first, rules by path follow after
semicolons, and the last rule that matches a site decides:

    p=f32,c=bf16,o=f32                              what jmp says: params, compute, output
    p=f32,c=bf16,o=f32; **/softmax: c=bf16          softmax in bf16 too
    mixed_bf16; blocks/0: c=f32; blocks/-1: c=f32   first and last block in f32

| key        | tensor                              | default |
|------------|-------------------------------------|---------|
| p, params  | parameters as stored and updated    | f32     |
| c, compute | everything a site computes with     | p       |
| o, output  | what the model hands on: its logits | c       |

A rule reaches a site in one of two ways. It *names* the site when its pattern matches the site's
own path; it *contains* the site when the pattern matches a path above it, and then sets what the
sites within follow by default. The difference matters for the sites of `WIDE_SITES`, which compute
in at least f32: neither the base nor a rule on a container narrows them, only a rule that names
them (`**/softmax: c=bf16`, or `blocks/0/**: c=bf16` for all of them in one block).

The base `o` belongs to the logits alone, as in jmp; inside the model a site hands on its own
compute format unless a rule that names it sets `o`.

Knows formats and jmp; which sites a model has it learns from the list of paths it is given.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import jmp

from lmjax.precision import paths
from lmjax.precision.formats import Format, parse_format

WIDE_SITES = {
    "norm": "a mean of squares overflows f16 and loses small differences in bf16",
    "query_norm": "as norm, over one head",
    "key_norm": "as norm, over one head",
    "softmax": "exponentials of differences, summed over the whole context",
    "rope": "an angle is a position times a frequency: bf16 has no integers above 256",
    "activation": "a chain of elementwise operations is rounded once, at its end",
    "loss": "a logarithm of a sum over the vocabulary, averaged over the batch",
}
"""Sites, by the last component of their path, that compute in at least f32, and why."""

OUTPUT_SITE = "head"
"""The site whose output is the model's output: the base `o` applies to it."""

PRESETS = {
    "mixed_bf16": "p=f32,c=bf16,o=f32",
    "mixed_f16": "p=f32,c=f16,o=f32",
    "pure_bf16": "p=bf16,c=bf16,o=bf16",
    "pure_f16": "p=f16,c=f16,o=f16",
    "mixed_bfloat16": "p=f32,c=bf16,o=bf16",
    "mixed_float16": "p=f32,c=f16,o=f16",
}
"""Policies by familiar name; the last two mean what Keras means by them."""

_KEYS = {"p": "p", "params": "p", "c": "c", "compute": "c", "o": "o", "output": "o"}
_NATIVE = ("f64", "f32", "bf16", "f16")


class PolicyError(ValueError):
    """A policy string that cannot be obeyed.

    Attributes:
      position: index of the offending character in the policy string, or None where the string is
        well formed but does not fit the model.
    """

    def __init__(self, message: str, *, text: str, position: int | None = None):
        where = "" if position is None else f" at character {position}"
        super().__init__(f"policy {text!r}{where}: {message}")
        self.position = position


@dataclass(frozen=True)
class SitePolicy:
    """The formats of one site: how its parameters are stored, what it computes with, its output."""

    params: Format
    compute: Format
    output: Format

    @property
    def jmp(self) -> jmp.Policy:
        """The same three formats as a `jmp.Policy`, which does the casting of pytrees."""
        return jmp.Policy(
            param_dtype=_native_dtype(self.params),
            compute_dtype=_native_dtype(self.compute),
            output_dtype=_native_dtype(self.output),
        )

    def to_compute(self, tree: Any) -> Any:
        """The floating-point leaves of a pytree, cast to the compute format."""
        return self.jmp.cast_to_compute(tree)

    def to_output(self, tree: Any) -> Any:
        """The floating-point leaves of a pytree, cast to the output format."""
        return self.jmp.cast_to_output(tree)

    def __str__(self) -> str:
        return f"p={self.params.name},c={self.compute.name},o={self.output.name}"


@dataclass(frozen=True)
class Rule:
    """`pattern: key=format,...`: settings for the sites that the pattern reaches."""

    pattern: str
    settings: Mapping[str, Format] = field(hash=False)
    position: int = field(default=0, compare=False)

    def __str__(self) -> str:
        return f"{self.pattern}: {_settings_string(self.settings)}"


@dataclass(frozen=True)
class Policy:
    """A parsed policy. `str(policy)` is its canonical string; parsing that gives it back."""

    base: SitePolicy
    rules: tuple[Rule, ...] = ()
    text: str = field(default="", compare=False)

    def resolve(self, path: str, depth: int | None = None) -> SitePolicy:
        """What the tensors of one site are.

        Args:
          path: the site, e.g. `blocks/3/attention/softmax`.
          depth: number of blocks, which negative indices in patterns count from.

        Returns:
          The site's formats after the base and every rule that reaches it, in order.
        """
        params, compute, output = self.base.params, self.base.compute, None
        wide = path.rsplit("/", 1)[-1] in WIDE_SITES
        if wide:
            compute = _at_least_f32(compute)
        if path == OUTPUT_SITE:
            output = self.base.output
        for rule in self.rules:
            named, contained = _reach(rule.pattern, path, depth)
            if not (named or contained):
                continue
            params = rule.settings.get("p", params)
            if "c" in rule.settings:
                inherits = wide and not named
                compute = _at_least_f32(rule.settings["c"]) if inherits else rule.settings["c"]
            if named:
                output = rule.settings.get("o", output)
        return SitePolicy(params, compute, output or compute)

    def resolve_all(
        self, site_paths: Sequence[str], depth: int | None = None
    ) -> dict[str, SitePolicy]:
        """Resolves every site of a model, and refuses rules that reach none of them.

        Raises:
          PolicyError: a rule matches nothing; the message lists the paths there are.
        """
        for rule in self.rules:
            if not any(any(_reach(rule.pattern, path, depth)) for path in site_paths):
                raise PolicyError(
                    f"the rule '{rule.pattern}' matches no site; the sites are: "
                    + ", ".join(_summarised(site_paths)),
                    text=self.text or str(self),
                    position=rule.position,
                )
        return {path: self.resolve(path, depth) for path in site_paths}

    def __str__(self) -> str:
        return "; ".join([str(self.base), *map(str, self.rules)])


def parse_policy(text: str) -> Policy:
    """Reads a policy string; every string that jmp accepts means what it means to jmp.

    The one exception is a key given twice with different values, where jmp lets the last one win:
    in a record of an experiment that is a mistake, so it is refused.

    Raises:
      PolicyError: with the position of the first character that cannot be right.
    """
    segments = _split(text, 0, ";")
    base = _parse_base(text, *segments[0])
    rules = tuple(_parse_rule(text, *segment) for segment in segments[1:])
    return Policy(base=base, rules=rules, text=text)


def _parse_base(text: str, segment: str, start: int) -> SitePolicy:
    name, start = _strip(segment, start)
    if not name:
        raise PolicyError(
            "expected a format, a preset or settings such as p=f32,c=bf16,o=f32",
            text=text,
            position=start,
        )
    preset = PRESETS.get(name)
    if preset is not None:
        settings = _parse_settings(preset, preset, 0)
    elif "=" in name:
        settings = _parse_settings(text, name, start)
    else:
        one = _parse_value(text, name, start, also=PRESETS)
        return SitePolicy(one, one, one)
    params = settings.get("p", parse_format("f32"))
    compute = settings.get("c", params)
    return SitePolicy(params, compute, settings.get("o", compute))


def _parse_rule(text: str, segment: str, start: int) -> Rule:
    pattern, colon, assignments = segment.partition(":")
    stripped, position = _strip(pattern, start)
    if not colon or not stripped:
        raise PolicyError("expected a rule such as **/softmax: c=f32", text=text, position=position)
    broken = re.search(r"\s|^/|//|/$", stripped)
    if broken:
        raise PolicyError(
            f"'{stripped}' is no path pattern; write components separated by single slashes",
            text=text,
            position=position + broken.start(),
        )
    settings = _parse_settings(text, assignments, start + len(pattern) + 1)
    return Rule(pattern=stripped, settings=settings, position=position)


def _parse_settings(text: str, segment: str, start: int) -> dict[str, Format]:
    settings: dict[str, Format] = {}
    for part, part_start in _split(segment, start, ","):
        name, equals, value = part.partition("=")
        name, name_start = _strip(name, part_start)
        key = _KEYS.get(name)
        if key is None:
            raise PolicyError(
                f"unknown key '{name}'; the keys are " + ", ".join(_KEYS),
                text=text,
                position=name_start,
            )
        if not equals:
            raise PolicyError(
                f"expected '=' after '{name}'", text=text, position=name_start + len(name)
            )
        value_start = part_start + part.index("=") + 1
        parsed = _parse_value(text, *_strip(value, value_start))
        if settings.get(key, parsed) != parsed:
            raise PolicyError(
                f"'{name}' is given twice, as {settings[key].name} and as {parsed.name}; keep one",
                text=text,
                position=name_start,
            )
        settings[key] = parsed
    return settings


def _parse_value(text: str, name: str, position: int, also: Sequence[str] | Mapping = ()) -> Format:
    if name == "half":  # jmp's meaning: whatever 16-bit format the accelerator is fast in
        return parse_format("bf16" if jax.default_backend() == "tpu" else "f16")
    try:
        parsed = parse_format(name)
    except ValueError as error:
        known = [*_NATIVE, "float64", "float32", "bfloat16", "float16", "full", "half", *also]
        close = difflib.get_close_matches(name, known, n=1)
        hint = f"did you mean '{close[0]}'?" if close else "write one of " + ", ".join(known)
        raise PolicyError(
            f"unknown format '{name}'; {hint}", text=text, position=position
        ) from error
    if parsed.name not in _NATIVE:
        raise PolicyError(
            f"'{name}' can be quantized to but not yet stored or computed in; use one of "
            + ", ".join(_NATIVE),
            text=text,
            position=position,
        )
    return parsed


def _reach(pattern: str, path: str, depth: int | None) -> tuple[bool, bool]:
    """Whether the pattern names the site itself, and whether it names what contains the site."""
    pattern = _absolute(pattern, depth)
    return (
        paths.matches(pattern, path),
        any(paths.matches(pattern, above) for above in paths.ancestors(path)),
    )


def _absolute(pattern: str, depth: int | None) -> str:
    """Replaces a negative block index by the index it stands for."""
    if depth is None:
        return pattern
    parts = pattern.split("/")
    return "/".join(
        str(depth + int(part)) if re.fullmatch(r"-\d+", part) and depth + int(part) >= 0 else part
        for part in parts
    )


def _at_least_f32(compute: Format) -> Format:
    return compute if compute.bits > 32 else parse_format("f32")


def _native_dtype(number_format: Format) -> Any:
    assert number_format.dtype is not None, number_format.name
    return number_format.dtype.type  # jmp prints scalar types but not np.dtype instances


def _settings_string(settings: Mapping[str, Format]) -> str:
    return ",".join(f"{key}={number_format.name}" for key, number_format in settings.items())


def _split(segment: str, start: int, separator: str) -> list[tuple[str, int]]:
    """The parts of a segment, each with the position of its first character in the policy."""
    parts = []
    for part in segment.split(separator):
        parts.append((part, start))
        start += len(part) + len(separator)
    return parts


def _strip(part: str, start: int) -> tuple[str, int]:
    """The part without surrounding white space, and the position of what is left."""
    return part.strip(), start + len(part) - len(part.lstrip())


def _summarised(site_paths: Sequence[str]) -> list[str]:
    """The paths with block indices as `*`: what somebody who mistyped a path needs to see."""
    return list(dict.fromkeys(re.sub(r"/\d+(?=/|$)", "/*", path) for path in site_paths))
