"""Tensors in safetensors files, single or sharded: the only file that knows the format.

Headers are read first, so that a folder is checked before a number is; then slices, one at a time.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Final, NamedTuple

import ml_dtypes
import numpy as np

from lmjax import strict_json
from lmjax.errors import InputError

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
DTYPES: Final[Mapping[str, Any]] = {
    "F32": np.dtype(np.float32),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F16": np.dtype(np.float16),
}
"""The dtypes of parameters, by their tag."""
_ROWS = 4096


class Header(NamedTuple):
    """What a file says about one of its tensors."""

    shape: tuple[int, ...]
    tag: str


class TensorFiles:
    """The tensors of a folder, which stay on disk until they are asked for.

    Attributes:
      headers: of every tensor, by name.
    """

    def __init__(self, folder: Path):
        """Opens the files of a folder.

        Raises:
          InputError: a file is missing, damaged, or not what the index says.
        """
        self.headers: dict[str, Header] = {}
        self._stack, self._handles = ExitStack(), {}
        listed = _listed(folder)
        with ExitStack() as stack:
            for path in sorted(set(listed.values()) or {folder / SINGLE}):
                file = stack.enter_context(_opened(path))
                for name in file.keys():  # noqa: SIM118 - no mapping
                    if listed and listed.get(name) != path:
                        raise InputError(f"{path.name} holds {name}, but {INDEX} has it elsewhere")
                    tensor = file.get_slice(name)
                    self.headers[name] = Header(tuple(tensor.get_shape()), tensor.get_dtype())
                    self._handles[name] = file
            if missing := sorted(listed.keys() - self._handles.keys()):
                raise InputError(f"{INDEX} lists {few(missing)}, which its files do not hold")
            self._stack = stack.pop_all()

    def read(self, name: str, index: tuple[slice, ...]) -> np.ndarray:
        """A slice of a tensor, in its own dtype."""
        return self._handles[name].get_slice(name)[index]

    def are_equal(self, first: str, second: str) -> bool:
        """Whether two tensors hold the same numbers; compared a few rows at a time."""
        if self.headers.get(first) != self.headers.get(second):
            return False
        rows = self.headers[first].shape[0]
        blocks = [(slice(start, min(start + _ROWS, rows)),) for start in range(0, rows, _ROWS)]
        return all(np.array_equal(self.read(first, b), self.read(second, b)) for b in blocks)

    def close(self) -> None:
        """Closes the files."""
        self._stack.close()


def write(tensors: Iterable[tuple[str, np.ndarray]], sizes: int, folder: Path, limit: int) -> None:
    """Writes tensors to `model.safetensors`, or to shards with an index.

    At most one shard is in memory at a time, and at least one tensor.

    Args:
      tensors: by name, in the order of the files.
      sizes: bytes of all of them together.
      folder: where to.
      limit: bytes of a shard.
    """
    shards = list(_shards(tensors, limit, folder))
    placed: dict[str, str] = {}
    for number, (path, names) in enumerate(shards, 1):
        name = f"model-{number:05}-of-{len(shards):05}.safetensors" if len(shards) > 1 else SINGLE
        path.rename(folder / name)
        placed |= dict.fromkeys(names, name)
    if len(shards) > 1:
        index = {"metadata": {"total_size": sizes}, "weight_map": placed}
        (folder / INDEX).write_text(strict_json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _shards(
    tensors: Iterable[tuple[str, np.ndarray]], limit: int, folder: Path
) -> Iterator[tuple[Path, list[str]]]:
    """Writes the shards under temporary names; yields their tensors."""
    safetensors = _library()
    held: dict[str, np.ndarray] = {}
    count = 0

    def flushed() -> tuple[Path, list[str]]:
        nonlocal count
        count += 1
        path = folder / f"shard-{count}"
        safetensors.numpy.save_file(held, path, metadata={"format": "pt"})
        names = list(held)
        held.clear()
        return path, names

    for name, tensor in tensors:
        if held and tensor.nbytes + sum(t.nbytes for t in held.values()) > limit:
            yield flushed()
        held[name] = np.ascontiguousarray(tensor)
    yield flushed()


def _listed(folder: Path) -> dict[str, Path]:
    """The file of every tensor, as the index of a sharded model says; empty without one."""
    if (folder / SINGLE).exists() or not (folder / INDEX).exists():
        return {}
    try:
        placed = strict_json.read_object(folder / INDEX).get("weight_map")
    except OSError as error:
        raise InputError(f"cannot read {folder / INDEX}: {error.strerror}") from error
    except ValueError as error:
        raise InputError(f"{folder / INDEX} is damaged: {error}") from error
    if not isinstance(placed, dict) or not all(isinstance(f, str) for f in placed.values()):
        raise InputError(f"{folder / INDEX} is damaged: weight_map does not name files of tensors")
    names = {name: folder / Path(file).name for name, file in placed.items()}
    if not names:
        raise InputError(f"{folder / INDEX} lists no tensors")
    return names


def _opened(path: Path) -> Any:
    if not path.is_file():
        others = sorted(p.name for p in path.parent.glob("*") if p.suffix in (".bin", ".pt", ".h5"))
        found = f"; {few(others)} must be converted first" if others else ""
        raise InputError(f"{path} does not exist{found}")
    try:
        return _library().safe_open(path, framework="np", backend="pread")
    except (OSError, Exception) as error:  # the library raises its own class, below Exception
        if isinstance(error, InputError):
            raise
        raise InputError(f"{path} is damaged: {error}") from error


def _library() -> Any:
    try:
        import safetensors
        import safetensors.numpy
    except ImportError as error:
        raise InputError("safetensors is not installed: pip install 'lmjax[hf]'") from error
    return safetensors


def few(names: list[str], most: int = 4) -> str:
    """The first of some names, and how many more there are."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
