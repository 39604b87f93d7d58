"""Reads traced programs: one `Fact` for each equation of a jaxpr, nested ones included.

Also where a value comes from within its site: what it was last rounded to on its way through
operations that change no number, such as transposes and casts to wider dtypes.

Knows jaxprs, layouts of sites and how scopes are named.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, NamedTuple

from jax.extend import core

from lmjax.hlo.scopes import Scope, located
from lmjax.inspection.facts import (
    ROLES,
    Fact,
    OperationKind,
    dtype_name,
    is_float,
    key_of,
    narrower,
    rounding_of,
)
from lmjax.inspection.primitives import CALLS, FUSED, JOINS, LEAVES, LOOPS, MOVES, kind_of
from lmjax.precision.formats import parse_format
from lmjax.precision.quantizer import parse_quantizer
from lmjax.precision.sites import Layout


class RoundedTo(NamedTuple):
    """The format of a value's numbers, and whether they were rounded to it within the site."""

    format: str
    here: bool


@dataclass(eq=False)
class _Frame:
    """One call of a jaxpr: what made each of its variables, and what its arguments are."""

    path: str
    made: dict[Any, Equation] = field(default_factory=dict)
    given: dict[Any, tuple[_Frame, Any]] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Equation:
    """An equation in a call of its jaxpr.

    Attributes:
      eqn: JAX's.
      frame: the call.
      scope: its site or part of a step.
      words: names of scopes inside that.
      inner: for a call of a function or a loop, that call and its results; None for those that a
        loop carries.
      times: how often it runs.
      name: JAX's full name of it.
      constant: whether it depends on nothing that the program is given.
    """

    eqn: Any
    frame: _Frame
    scope: Scope | None
    words: tuple[str, ...]
    inner: tuple[_Frame, Sequence[Any]] | None
    times: int
    name: str
    constant: bool

    def dtype(self, var: Any) -> str:
        """The format of one of its operands or results."""
        return dtype_name(var.aval.dtype) if hasattr(var.aval, "dtype") else ""

    def origin(self, operand: int, site: str) -> RoundedTo | None:
        """Where an operand comes from within a site; None for constants."""
        return _origin(self.frame, self.eqn.invars[operand], site)

    def changes_nothing(self, site: str) -> bool:
        """Whether it is a cast of numbers that were rounded to fit it before, within a site."""
        origin = self.origin(0, site)
        return origin is not None and origin.here and _fits(origin.format, self.result)

    @property
    def result(self) -> str:
        """The format of its first result."""
        return self.dtype(self.eqn.outvars[0])


class TracedProgram:
    """A traced program.

    Attributes:
      equations: all of them, nested ones after the one that holds them.
      outputs: where the numbers of each result come from; None for constants.
    """

    def __init__(self, jaxpr: core.ClosedJaxpr, layout: Layout, parts: Collection[str]):
        self._layout, self._parts = layout, parts
        self._top = _Frame("")
        self.jaxpr = jaxpr.jaxpr
        self.equations = list(self._walk(self._top, self.jaxpr, 1))

        self.facts: list[tuple[Equation, Fact]] = [
            (equation, fact) for equation in self.equations for fact in _facts(equation)
        ]

    def output(self, index: int, site: str) -> RoundedTo | None:
        """Where a result of the program comes from within a site or part."""
        return _origin(self._top, self.jaxpr.outvars[index], site)

    def roundings(self) -> Iterator[tuple[Scope | None, str, str]]:
        """Yields where something is rounded to a format that is emulated: site, role, format."""
        found = dict.fromkeys((equation.scope, equation.words) for equation in self.equations)
        for scope, words in found:
            rounding = rounding_of(words)
            if rounding and "measuring" not in words:
                yield scope, next((word for word in words if word in ROLES), ""), rounding

    def handed_on(self) -> Iterator[tuple[Scope, RoundedTo]]:
        """Yields what sites read of other sites in the forward pass: whose, and its format."""
        for equation in self.equations:
            reader = equation.scope
            if reader is None or reader.backward:
                continue
            for var in equation.eqn.invars:
                maker = _maker(equation.frame, var)
                if maker is None or maker[0].path == reader.path or maker[0].backward:
                    continue
                scope, frame, made = maker
                if is_float(dtype_name(made.aval.dtype)):
                    origin = _origin(frame, made, scope.path)
                    if origin is not None:
                        yield scope, origin

    def _walk(self, frame: _Frame, jaxpr: Any, times: int) -> Iterator[Equation]:
        for eqn in jaxpr.eqns:
            stack, name = str(eqn.source_info.name_stack), eqn.primitive.name
            path = "/".join(filter(None, (frame.path, stack)))
            scope, words = located(f"{path}/{name}", self._layout, self._parts)
            inner = None if name in LEAVES or FUSED in name else list(_inner(eqn))
            called = None
            below = []
            for body, runs in inner or ():
                child = _Frame(_entered(path, eqn))
                below.append((child, body, times * runs))
                child.given = _given(frame, eqn, body)
                if name in CALLS and len(body.outvars) == len(eqn.outvars):
                    called = child, body.outvars
                elif name == "scan":
                    _, carried = scan_counts(eqn.params)
                    called = child, [*[None] * carried, *body.outvars[carried:]]
            constant = all(_constant(frame, var) for var in eqn.invars)
            equation = Equation(
                eqn, frame, scope, words[:-1], called, times, f"{path}/{name}", constant
            )
            frame.made |= dict.fromkeys(eqn.outvars, equation)
            if not below:
                yield equation
            for child, body, runs in below:
                yield from self._walk(child, body, runs)


def scan_counts(params: Mapping[str, Any]) -> tuple[int, int]:
    """How many constants a `scan` has, and how many values it carries, by its parameters.

    Up to jax 0.10 they are named; in 0.12 the structure of the arguments is given instead.
    """
    if "num_consts" in params:
        return params["num_consts"], params["num_carry"]
    constants, carried, _ = params["ft_in"].unpack()
    return len(constants), len(carried)


def _given(frame: _Frame, eqn: Any, body: Any) -> dict[Any, tuple[_Frame, Any]]:
    """What the arguments of a loop or a branch are; what a loop carries is of its own making."""
    name, params = eqn.primitive.name, eqn.params
    inner, outer = list(body.invars), list(eqn.invars)
    if name == "scan":
        first, carried = scan_counts(params)
        del inner[first : first + carried], outer[first : first + carried]
    elif name == "while":
        first = params["cond_nconsts"]
        count = params["body_nconsts"] if body is params["body_jaxpr"].jaxpr else 0
        inner, outer = inner[:count], outer[first : first + count]
    elif name == "cond":
        outer = outer[1:]
    if name not in CALLS | LOOPS or len(inner) != len(outer):
        return {}
    return {var: (frame, given) for var, given in zip(inner, outer, strict=True)}


def _maker(frame: _Frame, var: Any) -> tuple[Scope, _Frame, Any] | None:
    """The site that made a value, through moves that belong to none; None if it was given."""
    while not isinstance(var, core.Literal):
        if var in frame.given:
            frame, var = frame.given[var]
            continue
        made = frame.made.get(var)
        if made is None:
            return None
        if made.scope is not None:
            return made.scope, frame, var
        if made.inner is not None:
            child, results = made.inner
            frame, var = child, results[made.eqn.outvars.index(var)]
            if var is None:
                return None
        elif made.eqn.primitive.name in MOVES:
            var = made.eqn.invars[0]
        else:
            return None
    return None


def _constant(frame: _Frame, var: Any) -> bool:
    while var not in frame.made if not isinstance(var, core.Literal) else False:
        if var not in frame.given:
            return False
        frame, var = frame.given[var]
        if isinstance(var, core.Literal):
            return True
    return isinstance(var, core.Literal) or frame.made[var].constant


def _entered(path: str, eqn: Any) -> str:
    called = eqn.params.get("name")
    return f"{path}/jit({called})" if isinstance(called, str) and path else path


def _inner(eqn: Any) -> Iterator[tuple[Any, int]]:
    """The jaxprs that an equation runs, and how often each of them."""
    times = eqn.params.get("length", 1) if eqn.primitive.name == "scan" else 1
    for value in eqn.params.values():
        for one in value if isinstance(value, (tuple, list)) else (value,):
            if isinstance(one, core.ClosedJaxpr):
                yield one.jaxpr, times
            elif isinstance(one, core.Jaxpr):
                yield one, times


def _origin(frame: _Frame, var: Any, site: str, depth: int = 0) -> RoundedTo | None:
    while True:
        if isinstance(var, core.Literal):
            return None
        if var in frame.given:
            frame, var = frame.given[var]
            continue
        own = dtype_name(var.aval.dtype)
        made = frame.made.get(var)
        if made is None:
            return RoundedTo(own, here=False)
        if made.constant:
            return None
        if made.inner is not None:
            child, results = made.inner
            result = results[made.eqn.outvars.index(var)]
            if result is not None and not rounding_of(made.words):
                frame, var = child, result
                continue
        if made.scope is None and made.eqn.primitive.name in MOVES:
            frame, var = made.frame, made.eqn.invars[0]
            continue
        if made.scope is None or made.scope.path != site:
            return RoundedTo(own, here=False)
        if rounding := rounding_of(made.words):
            return RoundedTo(rounding, here=True)
        name = made.eqn.primitive.name
        if name in MOVES:
            frame, var = made.frame, made.eqn.invars[0]
            continue
        if name in JOINS and depth < _DEEPEST:
            return _joined(made, own, site, depth)
        if name == "convert_element_type":
            return _converted(made, own, site, depth)
        return RoundedTo(own, here=True)


_DEEPEST: Final = 8


def _joined(made: Equation, own: str, site: str, depth: int) -> RoundedTo | None:
    found = [
        _origin(made.frame, var, site, depth + 1)
        for var in made.eqn.invars
        if made.dtype(var) == own
    ]
    known = [origin for origin in found if origin is not None]
    if not known:
        return None
    widest = known[0]
    for one in known[1:]:
        widest = one if narrower(widest.format, one.format) else widest
    return widest


def _converted(made: Equation, own: str, site: str, depth: int) -> RoundedTo | None:
    (operand,) = made.eqn.invars
    before = made.dtype(operand)
    if not is_float(before):
        return RoundedTo(own, here=True)
    origin = _origin(made.frame, operand, site, depth)
    if origin is None or origin.format == own or _fits(origin.format, own):
        return origin
    if narrower(before, own):
        return origin
    return RoundedTo(own, here=True)


def _fits(rounded_to: str, dtype: str) -> bool:
    """Whether a cast to a dtype leaves numbers that were rounded to something as they are."""
    try:
        elements = parse_quantizer(rounded_to).format
    except ValueError:
        return False
    held = parse_format(dtype)
    return held == elements or held.contains(elements)


def _facts(equation: Equation) -> Iterator[Fact]:
    eqn, name = equation.eqn, equation.eqn.primitive.name
    result = equation.result if eqn.outvars else ""
    kind = kind_of(name)
    if kind is None or not is_float(result):
        return
    operands = tuple(dtype for var in eqn.invars if is_float(dtype := equation.dtype(var)))
    if kind is OperationKind.CAST and operands in ((), (result,)):
        return
    yield Fact(
        kind, name, equation.scope, equation.words, operands, result,
        shape=tuple(eqn.outvars[0].aval.shape),
        precision=_precision(eqn) if kind is OperationKind.PRODUCT else "",
        flops=equation.times * _flops(equation, kind),
        key=key_of(equation.name),
        weak=_weak(equation),
        origin=eqn.source_info,
    )  # fmt: skip


def _weak(equation: Equation) -> bool:
    """Whether an array of a weak type takes the dtype of what it meets."""
    if equation.eqn.primitive.name != "convert_element_type":
        return False
    (operand,) = equation.eqn.invars
    weak = getattr(operand.aval, "weak_type", False) and not isinstance(operand, core.Literal)
    return weak and is_float(equation.dtype(operand))


def _precision(eqn: Any) -> str:
    """`HIGHEST`, `DEFAULT` or the name of an algorithm."""
    asked = eqn.params.get("precision")
    if asked is None:
        return "DEFAULT"
    if isinstance(asked, (tuple, list)):
        names = {str(getattr(one, "name", one)) for one in asked}
        return names.pop() if len(names) == 1 else "DEFAULT"
    return str(getattr(asked, "name", asked))


def _flops(equation: Equation, kind: OperationKind) -> float:
    eqn = equation.eqn
    size = float(math.prod(eqn.outvars[0].aval.shape))
    if kind is OperationKind.PRODUCT and "dimension_numbers" in eqn.params:
        try:
            (summed, _), _ = eqn.params["dimension_numbers"]
        except (TypeError, ValueError):  # convolutions count in the compiled program
            return size
        return 2 * size * math.prod(eqn.invars[0].aval.shape[axis] for axis in summed)
    if kind is OperationKind.SUM:
        return float(math.prod(eqn.invars[0].aval.shape))
    return 0.0 if kind is OperationKind.CAST else size
