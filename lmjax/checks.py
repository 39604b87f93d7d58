"""Validation of config fields: each range is declared beside its field and checked in one place.

    every: Annotated[int, at_least(1), housekeeping("when the state is written")] = 500

`validate`, called by a config's `__post_init__`, rejects any value that does not have the declared
type or lies outside the declared range. Every numeric field must declare a range, so a new field
cannot be forgotten. Comparisons are written so that NaN fails them, and no range contains infinity:
settings that need it use a finite value instead, such as `clip_norm=0`.

Below all other rooms; depends on Python only.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import inspect
import math
import numbers
import struct
import types
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Union

LARGEST_INT = 2**31 - 1
"""Counters and dimensions of arrays are 32-bit integers."""

LARGEST_F32 = (2 - 2**-23) * 2.0**127
SMALLEST_NORMAL_F32 = 2.0**-126


@dataclass(frozen=True)
class Range:
    """The numbers that a field may hold. Use the functions below to create one.

    A float must also lie in the range after rounding to f32, the dtype in which settings meet
    tensors: there 1e-50 is 0, and so is a subnormal on hardware that flushes them.

    Attributes:
      least, most: the bounds; None: those of the type.
      above, below: whether the bound itself is excluded.
      also: single values allowed outside the bounds.
      power_of_two: whether only powers of two are allowed.
      f64: only Python uses the number; it is never converted to f32.
      hint: what to write instead of a value that is out of range.
    """

    least: float | None = None
    most: float | None = None
    above: bool = False
    below: bool = False
    also: tuple[int, ...] = ()
    power_of_two: bool = False
    f64: bool = False
    hint: str = ""

    def holds(self, value: float, largest: float) -> bool:
        """Whether the range contains a number of a type whose maximum is `largest`."""
        if value in self.also:
            return True
        least = -largest if self.least is None else self.least
        most = largest if self.most is None else self.most
        if not (least < value if self.above else least <= value):
            return False
        if not (value < most if self.below else value <= most):
            return False
        return not self.power_of_two or (value > 0 and math.frexp(value)[0] == 0.5)

    def __str__(self) -> str:
        """The range in words, to follow "it must be"."""
        bounds = []
        if self.least is not None and not (self.power_of_two and self.least == 0):
            bounds.append(f"{'above' if self.above else 'at least'} {_short(self.least)}")
        if self.most is not None:
            bounds.append(f"{'below' if self.below else 'at most'} {_short(self.most)}")
        words = " and ".join(bounds)
        if self.power_of_two:
            words = ", ".join(filter(None, ("a power of two", words)))
        return " or ".join([*map(str, self.also), words])


def at_least(least: float, most: float | None = None, **more: Any) -> Range:
    """Numbers from `least` to `most`, both included."""
    return Range(least, most, **more)


def above(least: float, **more: Any) -> Range:
    """Numbers greater than `least`."""
    return Range(least, above=True, **more)


def from_to_below(least: float, most: float, **more: Any) -> Range:
    """Numbers from `least`, included, to `most`, excluded."""
    return Range(least, most, below=True, **more)


def between(least: float, most: float, **more: Any) -> Range:
    """Numbers between `least` and `most`, both excluded."""
    return Range(least, most, above=True, below=True, **more)


def power_of_two(least: float = 0, most: float | None = None, **more: Any) -> Range:
    """Powers of two from `least` to `most`."""
    return Range(least, most, power_of_two=True, **more)


@dataclass(frozen=True)
class Housekeeping:
    """Marks a field that is not part of a run's identity, as it does not affect the parameters.

    A resumed run may change it. `why` says why no computed result depends on it.
    """

    why: str


housekeeping = Housekeeping


def validate(config: Any, part: str = "", error: type[ValueError] = ValueError) -> None:
    """Checks every field of a frozen dataclass against its annotation.

    Converts numbers to plain Python ones: NumPy scalars are accepted, integers for floats, and
    lists for tuples. Equal configs therefore have equal representations, in JSON as well.

    Args:
      config: an instance; called from its `__post_init__`.
      part: its dotted name in the whole config, the prefix of messages.
      error: the exception type to raise.

    Raises:
      ValueError (or `error`): names the field, its value and the allowed values.
      TypeError: a numeric field declares no range.
    """
    for name, hint in _hints(config.__class__).items():
        value = getattr(config, name)
        taken = _taken(f"{part}.{name}" if part else name, value, hint, error)
        if taken is not value:
            object.__setattr__(config, name, taken)


def validate_value(name: str, value: Any, hint: Any, error: type[ValueError] = ValueError) -> Any:
    """The value as a field with that annotation would keep it; raises as `validate` does."""
    return _taken(name, value, hint, error)


def validate_arguments(
    function: Callable[..., Any],
    arguments: Mapping[str, Any],
    error: type[ValueError] = ValueError,
) -> None:
    """Checks the arguments of a command's function, as `validate` does for fields.

    Messages name the flag: `--top-k` for `top_k`.
    """
    hints = typing.get_type_hints(function, include_extras=True)
    for name, value in arguments.items():
        _taken(f"--{name.replace('_', '-')}", value, hints[name], error)


def numeric_fields(config: type) -> dict[str, Range | None]:
    """The numeric fields of a dataclass and its nested dataclasses, by dotted name."""
    return {
        name: _range_of(hint)
        for name, hint in _walk(config)
        if any(base in (int, float) for base in _bases(hint))
    }


def housekeeping_fields(config: type) -> dict[str, str]:
    """The fields marked `housekeeping`, including those of marked parts, and the reasons."""
    found: dict[str, str] = {}
    for name, hint in _walk(config, parts=True):
        marks = [mark.why for mark in _metadata(hint) if isinstance(mark, Housekeeping)]
        inherited = [why for part, why in found.items() if name.startswith(part + ".")]
        if marks or inherited:
            found[name] = (marks or inherited)[0]
    leaves = {name for name, _ in _walk(config)}
    return {name: why for name, why in found.items() if name in leaves}


def fields(config: type) -> list[str]:
    """The dotted names of all fields of a dataclass and of the dataclasses inside it."""
    return [name for name, _ in _walk(config)]


def leaves(config: type) -> Iterator[tuple[str, Any]]:
    """The dotted names of all fields, and their types without annotations."""
    return ((name, _unannotated(hint)) for name, hint in _walk(config))


def choices(config: type) -> dict[str, tuple[str, ...]]:
    """The choices of fields that have a closed list of values, by dotted name."""
    literals = ((name, _unannotated(hint)) for name, hint in _walk(config))
    return {n: typing.get_args(hint) for n, hint in literals if typing.get_origin(hint) is Literal}


def suggestion(word: str, known: Iterable[str]) -> str:
    """`; did you mean X?` for the closest known word, or an empty string."""
    close = difflib.get_close_matches(word, list(known), 1, 0.6)
    return f"; did you mean {close[0]!r}?" if close else ""


@functools.cache
def _hints(config: type) -> dict[str, Any]:
    hints = typing.get_type_hints(config, include_extras=True)
    return {f.name: hints[f.name] for f in dataclasses.fields(config)}


def _walk(config: type, prefix: str = "", *, parts: bool = False) -> Iterator[tuple[str, Any]]:
    for name, hint in _hints(config).items():
        inner = _unannotated(hint)
        nested = isinstance(inner, type) and dataclasses.is_dataclass(inner)
        if parts or not nested:
            yield prefix + name, hint
        if nested:
            yield from _walk(inner, f"{prefix}{name}.", parts=parts)


def _unannotated(hint: Any) -> Any:
    return typing.get_args(hint)[0] if typing.get_origin(hint) is Annotated else hint


def _metadata(hint: Any) -> tuple[Any, ...]:
    return typing.get_args(hint)[1:] if typing.get_origin(hint) is Annotated else ()


def _bases(hint: Any) -> Iterator[Any]:
    """The types in a hint, without annotations, unions and containers."""
    hint = _unannotated(hint)
    if typing.get_origin(hint) is Literal or not typing.get_args(hint):
        yield hint
        return
    for part in typing.get_args(hint):
        yield from _bases(part)


def _range_of(hint: Any) -> Range | None:
    """The range declared anywhere in a hint."""
    found = [mark for mark in _metadata(hint) if isinstance(mark, Range)]
    inner = _unannotated(hint)
    if found or typing.get_origin(inner) is Literal:
        return found[0] if found else None
    return next(filter(None, map(_range_of, typing.get_args(inner))), None)


def _taken(name: str, value: Any, hint: Any, error: type[ValueError]) -> Any:
    """The value as the field keeps it."""
    inner, origin = _unannotated(hint), typing.get_origin(_unannotated(hint))
    if origin in (Union, types.UnionType):
        options = typing.get_args(inner)
        if value is None and type(None) in options:
            return None
        (option,) = (o for o in options if o is not type(None))
        return _taken(name, value, option, error)
    if origin is Literal:
        return _one_of(name, value, typing.get_args(inner), error)
    if origin is tuple:
        if not isinstance(value, tuple | list):
            raise error(f"{name} is {_brief(value)}; it must be a tuple")
        (element, _) = typing.get_args(inner)
        parts = tuple(_taken(f"{name}[{i}]", part, element, error) for i, part in enumerate(value))
        return value if isinstance(value, tuple) and parts == value else parts
    if origin is Mapping:
        if not isinstance(value, Mapping):
            raise error(f"{name} is {_brief(value)}; it must be a mapping")
        for key, part in value.items():
            _taken(f"{name}[{key!r}]", part, typing.get_args(inner)[1], error)
        return value
    if inner in (int, float):
        declared = next((mark for mark in _metadata(hint) if isinstance(mark, Range)), None)
        if declared is None:
            raise TypeError(f"{name} declares no range; annotate it, such as with at_least(0)")
        return _number(name, value, inner, declared, error)
    if isinstance(inner, type) and not isinstance(value, inner):
        raise error(f"{name} is {_brief(value)}; it must be {_KINDS.get(inner, inner.__name__)}")
    return value


_KINDS = {bool: "True or False", str: "a string"}


def _one_of(name: str, value: Any, options: tuple[Any, ...], error: type[ValueError]) -> Any:
    if isinstance(value, str) and value in options:
        return value
    near = suggestion(value, options) if isinstance(value, str) else ""
    raise error(f"{name} is {_brief(value)}; choose one of {', '.join(options)}{near}")


def _number(
    name: str, value: Any, kind: type, declared: Range, error: type[ValueError]
) -> int | float:
    """A plain number of the declared type and range."""
    hint = f"; {declared.hint}" if declared.hint else ""
    noun = "a whole number" if kind is int else "a finite number"
    must = f"it must be {noun}, {declared}{hint}" if str(declared) else f"it must be {noun}{hint}"
    wanted = numbers.Integral if kind is int else numbers.Real
    if isinstance(value, bool) or not isinstance(value, wanted):
        raise error(f"{name} is {_brief(value)}; {must}")
    if kind is int:
        plain: int | float = int(value)  # type: ignore[call-overload]
        if not declared.holds(plain, LARGEST_INT):
            too_large = declared.most is None and plain > LARGEST_INT
            raise error(
                f"{name} is {_brief(plain)}; it must be "
                + (f"at most {LARGEST_INT}" if too_large else f"{declared}{hint}")
            )
        return value if type(value) is int else plain
    try:
        plain = float(value) + 0.0  # -0.0 becomes 0.0
    except OverflowError:
        plain = math.inf
    if not math.isfinite(plain):
        raise error(f"{name} is {_brief(value)}; {must}")
    if not declared.holds(plain, LARGEST_F32):
        too_large = declared.most is None and plain > LARGEST_F32
        raise error(
            f"{name} is {plain!r}; it must be "
            + (f"at most {_short(LARGEST_F32)}" if too_large else f"{declared}{hint}")
        )
    if not declared.f64 and not declared.holds(rounded := _to_f32(plain), LARGEST_F32):
        raise error(
            f"{name} is {plain!r}, which is {rounded:g} in f32, in which it is used; it must be "
            f"{declared}{hint}"
        )
    return plain


def _to_f32(value: float) -> float:
    """Rounded to f32, subnormals flushed to 0."""
    try:
        (rounded,) = struct.unpack("f", struct.pack("f", value))
    except OverflowError:
        return math.copysign(math.inf, value)
    return rounded if abs(rounded) >= SMALLEST_NORMAL_F32 else 0.0


def _short(number: float) -> str:
    """A bound in readable form: powers of two as such, others without unneeded digits."""
    if isinstance(number, int):
        wide = number > LARGEST_INT and number & (number + 1) == 0
        return f"2**{number.bit_length()} - 1" if wide else str(number)
    mantissa, exponent = math.frexp(number)
    power = mantissa == 0.5 and abs(exponent - 1) > 16
    return f"2**{exponent - 1}" if power else f"{number:.6g}"


def _brief(value: Any) -> str:
    """A value for a message, on one line and of limited length."""
    try:
        text = repr(value)
    except ValueError:  # an integer with more digits than Python prints
        return f"a number of {value.bit_length()} bits"
    text = " ".join(text.split())
    return text if len(text) <= 60 else text[:57] + "..."


def signature_of(function: Callable[..., Any]) -> dict[str, Range | None]:
    """The numeric parameters of a command's function and their declared ranges."""
    hints = typing.get_type_hints(function, include_extras=True)
    return {
        name: _range_of(hints[name])
        for name in inspect.signature(function).parameters
        if name in hints and any(base in (int, float) for base in _bases(hints[name]))
    }
