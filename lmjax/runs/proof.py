"""What a checkpoint must give back when read, compared before an older one is removed.

Knows arrays and digests, not how checkpoints are read.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from lmjax.precision import paths

Description = tuple[tuple[int, ...], np.dtype]
"""Shape and dtype of an array."""


_PART = 1 << 26
"""Bytes that are read back at a time, if no array is larger."""


class NotRestorable(ValueError):
    """A checkpoint does not give back what was written."""


@dataclass(frozen=True)
class Proof:
    """The arrays of a state, as they must be restored.

    Attributes:
      arrays: shape and dtype of each array, as a pytree like the state.
      content: path, slices and CRC-32 of each array part on this process's devices; None if
        content is not compared.
    """

    arrays: Any
    content: list[tuple[str, tuple[slice, ...], int]] | None

    @classmethod
    def of(cls, state: Any, *, content: bool) -> Proof:
        """The proof required for a state.

        Args:
          state: the arrays, which may be donated as soon as this returns.
          content: also compute digests, which copies every array to the host once.
        """
        arrays = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), state)
        if not content:
            return cls(arrays, None)
        digests = [
            (path, shard.index, _digest(np.asarray(shard.data)))
            for path, leaf in paths.flatten(state).items()
            for shard in leaf.addressable_shards
            if shard.replica_id == 0
        ]
        return cls(arrays, digests)

    def templates(self, skipped: Any) -> Iterator[Any]:
        """Restore targets of parts of the state, host arrays that allocate no memory.

        A part is one array or several small ones, so that little is in memory beside what trains.

        Args:
          skipped: stands for arrays that are not of a part.
        """
        leaves, tree = jax.tree.flatten(self.arrays)
        sizes = np.cumsum([leaf.size * leaf.dtype.itemsize for leaf in leaves])
        parts = [int(end - 1) // _PART for end in sizes]
        target = lambda leaf: np.broadcast_to(np.zeros((), leaf.dtype), leaf.shape)
        for part in dict.fromkeys(parts):
            own = [
                target(x) if of == part else skipped for x, of in zip(leaves, parts, strict=True)
            ]
            yield jax.tree.unflatten(tree, own)

    def compare_descriptions(self, stored: Any) -> None:
        """Raises `NotRestorable` unless a tree has the same paths, shapes and dtypes."""
        wanted, found = paths.flatten(self.arrays), paths.flatten(stored)
        for path in sorted(wanted.keys() | found.keys()):
            old, new = described(wanted.get(path)), described(found.get(path))
            if old != new:
                raise NotRestorable(f"{path} was {in_words(old)} and is {in_words(new)}")

    def compare_content(self, restored: Any, skipped: Any) -> None:
        """Raises `NotRestorable` unless restored arrays are bit-identical to those written.

        Args:
          restored: a part of the state; see `templates`.
          skipped: what stands for the others.
        """
        found = paths.flatten(restored)
        for path, index, digest in self.content or ():
            if found[path] is not skipped and _digest(np.asarray(found[path])[index]) != digest:
                raise NotRestorable(f"{path} comes back with other values than were written")


def described(leaf: Any) -> Description | None:
    """Shape and dtype of an array, or of an array description."""
    return None if leaf is None else (tuple(leaf.shape), np.dtype(leaf.dtype))


def in_words(array: Description | None) -> str:
    """An array's dtype and shape, such as `float32[2, 3]`."""
    return "nothing" if array is None else f"{array[1].name}{list(array[0])}"


def _digest(array: np.ndarray) -> int:
    return zlib.crc32(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
