"""Compares what is stored between steps with the policy: parameters, moments, keys and values.

Read off the arguments of a program, traced and compiled, whose names JAX gives.

Knows policies and how JAX names arguments.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import Any, Final, NamedTuple

from lmjax.hlo.module import Module, shapes
from lmjax.inspection.asked import same, stores
from lmjax.inspection.facts import dtype_name, format_name, is_float
from lmjax.inspection.judge_traced import TracedJudge
from lmjax.inspection.rows import TRACED
from lmjax.inspection.traced import TracedProgram
from lmjax.precision.formats import Format, parse_format
from lmjax.precision.packed import is_packed
from lmjax.precision.policy import NATIVE, SitePolicy, carrier
from lmjax.precision.quantizer import Quantizer
from lmjax.precision.sites import Kind as SiteKind
from lmjax.precision.sites import Place
from lmjax.precision.stored import holder

_KEYS: Final = r"((?:\['[^']*'\]|\[\d+\])+)"
_STORED: Final = re.compile(rf"params{_KEYS}$|\.(mu|nu){_KEYS}(?:\.(\w+))?$")
_ELEMENTS: Final = re.compile(rf"(?:params|weights){_KEYS}(?:\.runs\[(\d+)\])?\.(\w+)$")
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
      packed: whether elements share the bytes of integers.
    """

    site: str
    tensor: str
    asked: str
    format: Format
    nan: bool = False
    packed: bool = False

    def suits(self, dtype: str) -> bool:
        """Whether it may be held in a dtype."""
        if self.packed:
            return dtype == "uint8"
        held = dtype_name(holder(self.format, nan=self.nan))
        return dtype == held or stores(dtype, self.format, nan=self.nan)


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
                _compare(judge, stored, _dtype(shapes(one.type)[0][0]), target)


def _dtype(written: str) -> str:
    """A dtype of XLA's text as policies write it, `s8` as `int8`."""
    integer = re.fullmatch(r"([su])(\d+)", written)
    if integer is None:
        return format_name(written)
    return f"{'int' if integer[1] == 's' else 'uint'}{integer[2]}"


def _compare(judge: TracedJudge, stored: StoredTensor, dtype: str, column: str) -> None:
    row = judge.table.row(stored.site, "", stored.tensor)
    row.asked = stored.asked
    before = row.traced if column == TRACED else row.compiled.get(column, "")
    held = "; ".join(dict.fromkeys(filter(None, (*before.split("; "), dtype))))
    if column == TRACED:
        row.traced = held
    else:
        row.compiled[column] = held
    if not stored.suits(dtype):
        row.note("stored otherwise", f"held in {dtype} where {stored.asked} was asked", column)


def _stored(judge: TracedJudge, name: str) -> StoredTensor | None:
    cached = _CACHED.search(name)
    if cached:
        return _of_cache(judge, int(cached[1]), cached[2], cached[3] or "")
    elements = _ELEMENTS.search(name)
    if elements:
        return _of_elements(judge, elements[1], int(elements[2] or 0), elements[3])
    found = _STORED.search(name)
    if found is None:
        return None
    placed = _placed(judge, found[1] or found[3])
    if placed is None:
        return None
    place, index = placed
    member = place.paths[index or 0]
    site = judge.sites[member]
    label = str(place) if index is None else member
    if found[1]:
        if index is not None:  # while decoding, cast once to what they are read in
            return None
        asked = parse_format(dtype_name(carrier(site.params)))
        return StoredTensor(label, "parameters", site.params.name, asked)
    quantizer: Quantizer = getattr(site, found[2])
    return _of_quantizer(label, found[2], quantizer, found[4] or "")


def _placed(judge: TracedJudge, keys: str) -> tuple[Place, int | None] | None:
    """Where a parameter belongs, and of which member it is while decoding."""
    index = re.search(r"\[(\d+)\]", keys)
    try:
        path = "/".join(re.findall(r"\['([^']*)'\]", keys))
        return judge.layout.place_of_parameter(path), int(index[1]) if index else None
    except KeyError:
        return None


def _of_elements(judge: TracedJudge, keys: str, run: int, part: str) -> StoredTensor | None:
    """A part of a weight that is stored as elements and factors."""
    placed = _placed(judge, keys)
    if placed is None:
        return None
    place, index = placed
    # A table that embeds is a weight of the head, where it is stored as one.
    lookup = place.site.kind is SiteKind.LOOKUP
    members = (
        [one.path for one in judge.layout.places if one.site.logits] if lookup else place.paths
    )
    alike = [key for key, _ in groupby(judge.sites[path].stored_as for path in members)]
    if index is not None:
        alike, run = [judge.sites[members[index]].stored_as], 0
    stored = alike[run] if run < len(alike) else None
    if stored is None:
        return None
    quantizer, *_ = stored
    label = str(place) if index is None else members[index]
    if part == "codes":
        packed = is_packed(quantizer.format)
        asked = f"{quantizer}, packed" if packed else str(quantizer)
        return StoredTensor(label, "elements", asked, quantizer.format, packed=packed)
    if part == "inputs":
        return StoredTensor(label, "factor of activations", "f32", _F32)
    return _of_quantizer(label, "elements", quantizer, part)


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
        return StoredTensor(member, f"cached {tensor}", site.compute.name, held)
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
