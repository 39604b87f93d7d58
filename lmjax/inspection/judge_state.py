"""Compares what is stored between steps with the policy: parameters, moments, keys and values.

Read off the arguments of a program, traced and compiled, whose names JAX gives.

Knows policies and how JAX names arguments.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any, Final, NamedTuple

from lmjax.hlo.module import Module, shapes
from lmjax.inspection.asked import same, stores
from lmjax.inspection.facts import dtype_name, format_name, is_float
from lmjax.inspection.judge_traced import TracedJudge
from lmjax.inspection.rows import TRACED
from lmjax.inspection.traced import TracedProgram
from lmjax.precision.formats import Format, parse_format
from lmjax.precision.policy import NATIVE, SitePolicy, carrier
from lmjax.precision.quantizer import Quantizer

_KEYS: Final = r"((?:\['[^']*'\]|\[\d+\])+)"
_STORED: Final = re.compile(rf"params{_KEYS}$|\.(mu|nu){_KEYS}(?:\.(\w+))?$")
_CACHED: Final = re.compile(r"cache\[(\d+)\]\.(keys|values)(?:\.(\w+))?$")
_F32: Final = parse_format("f32")


class StoredTensor(NamedTuple):
    """An array that is kept between steps.

    Attributes:
      site: path of its site, as policies have it; of blocks the first.
      tensor: what it is.
      asked: how the policy stores it.
      format: of these numbers, be they elements or factors.
      nan: whether its dtype must have a NaN.
    """

    site: str
    tensor: str
    asked: str
    format: Format
    nan: bool


def read_state(judge: TracedJudge, program: TracedProgram) -> None:
    """Adds rows for what the arguments of a traced program are stored in."""
    names = program.jaxpr.debug_info.arg_names or ()
    for name, var in zip(names, program.jaxpr.invars, strict=False):
        stored = _stored(judge, str(name))
        dtype = dtype_name(var.aval.dtype)
        if getattr(var.aval, "weak_type", False) and is_float(dtype):
            row = judge.table.row("arguments", "", str(name))
            row.note("weak-type promotion", f"{name} has a weak type", TRACED)
        if stored is not None:
            _compare(judge, stored, dtype, TRACED)
    _roundings(judge, program)


def read_compiled_state(judge: TracedJudge, module: Module, target: str) -> None:
    """Adds the column of a target to these rows."""
    for one in module.computations[module.entry].values():
        if one.op == "parameter":
            stored = _stored(judge, one.source.replace("\\'", "'"))
            if stored is not None:
                _compare(judge, stored, format_name(shapes(one.type)[0][0]), target)


def _compare(judge: TracedJudge, stored: StoredTensor, dtype: str, column: str) -> None:
    row = judge.table.row(stored.site, "", stored.tensor)
    row.asked = stored.asked
    before = row.traced if column == TRACED else row.compiled.get(column, "")
    held = "; ".join(dict.fromkeys(filter(None, (*before.split("; "), dtype))))
    if column == TRACED:
        row.traced = held
    else:
        row.compiled[column] = held
    if not stores(dtype, stored.format, nan=stored.nan):
        row.note("stored otherwise", f"held in {dtype} where {stored.asked} was asked", column)


def _stored(judge: TracedJudge, name: str) -> StoredTensor | None:
    cached = _CACHED.search(name)
    if cached:
        return _of_cache(judge, int(cached[1]), cached[2], cached[3] or "")
    found = _STORED.search(name)
    if found is None:
        return None
    path = "/".join(re.findall(r"\['([^']*)'\]", found[1] or found[3]))
    index = re.search(r"\[(\d+)\]", found[1] or "")
    try:
        place = judge.layout.place_of_parameter(path)
    except KeyError:
        return None
    member = place.paths[int(index[1]) if index else 0]
    site = judge.sites[member]
    label = str(place) if not index else member
    if found[1]:
        if index:  # while decoding, cast once to what they are read in
            return None
        asked = parse_format(dtype_name(carrier(site.params)))
        return StoredTensor(label, "parameters", site.params.name, asked, nan=False)
    quantizer: Quantizer = getattr(site, found[2])
    return _of_quantizer(label, found[2], quantizer, found[4] or "")


def _of_quantizer(site: str, tensor: str, quantizer: Quantizer, part: str) -> StoredTensor:
    formats = {"scale": quantizer.scale, "tensor_scale": _F32}
    tensor = f"{tensor}, {part}" if part in formats or part == "zero_point" else tensor
    chosen = formats.get(part, quantizer.format)
    nan = quantizer.groups == "none"
    return StoredTensor(site, tensor, str(quantizer), chosen, nan=nan)


def _of_cache(judge: TracedJudge, index: int, tensor: str, part: str) -> StoredTensor | None:
    names = {"keys": "scores", "values": "combine"}
    for place in judge.layout.named(names[tensor]):
        member = place.paths[index]
        site: SitePolicy = judge.sites[member]
        if site.cache is not None:
            return _of_quantizer(member, f"cached {tensor}", site.cache, part)
        held = parse_format(dtype_name(carrier(site.compute)))
        return StoredTensor(member, f"cached {tensor}", site.compute.name, held, nan=False)
    return None


def _roundings(judge: TracedJudge, program: TracedProgram) -> None:
    """Parameters in formats that no dtype has must leave the program rounded to them."""
    for index, name in _results(program):
        stored = _stored(judge, name)
        if stored is None or stored.tensor != "parameters":
            continue
        if stored.asked in NATIVE:
            continue
        origin = program.output(index, "optimizer")
        if origin is None or not origin.here or not same(origin.format, stored.asked):
            row = judge.table.row(stored.site, "", stored.tensor)
            what = "as they came" if origin is None else origin.format
            row.note("missing rounding", f"leaves as {what}, not {stored.asked}", TRACED)


def _results(program: TracedProgram) -> Iterator[tuple[int, str]]:
    paths: Sequence[Any] = program.jaxpr.debug_info.result_paths or ()
    for index, path in enumerate(paths):
        yield index, str(path)
