"""Parses the groups of devices of a collective from HLO text.

    {{0,1},{2,3}}                                         lists; {} is all devices
    [4,2]<=[2,2,2]T(2,1,0)                                iota: devices 0, 1, ... as an array of one
                                                          shape, transposed, read as 4 groups of 2
    mesh['a'=2,'b'=4], device_ids=([2,4]T(1,0)) {'a'}     along axes of a mesh, over such an array
    mesh['a'=8] {'a':(2)4}                                or along a part of an axis: 4, 2 before it

Knows only numpy.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping

import numpy as np

Group = tuple[int, ...]

_IOTA = re.compile(r"\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?")
_MESH = re.compile(
    r"mesh\[([^\]]*)\](?:, device_ids=\((?:\[([\d,]+)\](?:T\(([\d,]+)\))?)\))? \{([^}]*)\}"
)


def devices_of(attributes: str, mesh: Mapping[str, int]) -> Group:
    """Returns the group of device 0, or the first group, of an instruction with these attributes.

    Raises:
      ValueError: the groups are in an unknown notation.
    """
    devices = math.prod(mesh.values())
    start = attributes.find("replica_groups=")
    text = attributes[start + len("replica_groups=") :] if start >= 0 else "{}"
    if text.startswith("{{"):
        return _numbers(text[2 : text.index("}")])
    if text.startswith("{}"):
        return tuple(range(devices))
    if iota := _IOTA.match(text):
        groups = _array(iota[2], iota[3]).reshape(_numbers(iota[1]))
        return tuple(int(device) for device in groups[0])
    if named := _MESH.match(text):
        return _along(named, devices)
    raise ValueError(f"cannot read the groups of devices {text[:60]!r}")


def spanned(group: Group, mesh: Mapping[str, int]) -> tuple[str, ...]:
    """The mesh axes along which the devices of a group differ."""
    places = np.stack(np.unravel_index(np.asarray(group), tuple(mesh.values())))
    return tuple(
        name for name, where in zip(mesh, places, strict=True) if len(np.unique(where)) > 1
    )


def _along(named: re.Match[str], devices: int) -> Group:
    sizes = [int(size) for size in re.findall(r"=(\d+)", named[1])]
    names = re.findall(r"'([^']+)'=", named[1])
    numbered = _array(named[2] or str(devices), named[3]).reshape(sizes)
    index: list[np.ndarray] = [np.zeros(1, int) for _ in sizes]
    for axis, before, part in re.findall(r"'([^']+)'(?::\((\d+)\)(\d+))?", named[4]):
        size = sizes[names.index(axis)]
        stride = size // (int(before) * int(part)) if part else 1
        index[names.index(axis)] = np.arange(int(part or size)) * stride
    return tuple(int(device) for device in numbered[np.ix_(*index)].ravel())


def _array(shape: str, permutation: str | None) -> np.ndarray:
    sizes = _numbers(shape)
    array = np.arange(math.prod(sizes)).reshape(sizes)
    return array.transpose(_numbers(permutation)) if permutation else array


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(number) for number in text.split(","))
