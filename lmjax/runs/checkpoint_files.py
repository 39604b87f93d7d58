"""The files of a checkpoint beside its arrays, and what errors of reading and writing say."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from lmjax import strict_json
from lmjax.errors import CheckpointError
from lmjax.runs.proof import described, in_words


def system_error(error: BaseException) -> str | None:
    """The operating system's error, through Python or TensorStore; None if there is none."""
    if isinstance(error, OSError) and error.errno is not None:
        return error.strerror or str(error)
    code = re.search(r"os_error_code='(\d+)'", str(error))
    return os.strerror(int(code[1])) if code else None


def is_unsealed(folder: Path) -> bool:
    """Whether it has the layout of versions without manifests."""
    return (folder / "data" / "metadata").is_file()


def read_json(folder: Path, name: str) -> dict[str, Any]:
    """The content of one of the files beside the arrays."""
    path = folder / name / "metadata" if is_unsealed(folder) else folder / f"{name}.json"
    return strict_json.read(path)


def _floating(dtype: np.dtype) -> bool:
    return jnp.issubdtype(dtype, jnp.floating)


def one_line(error: Exception) -> str:
    """An error of a library, cut to a line."""
    return " ".join(str(error).split())[:300] or type(error).__name__


def compared(
    step: int, stored: Mapping[str, Any], wanted: Mapping[str, Any], allow_cast: bool
) -> list[str]:
    """Rejects arrays that differ from the target, unless a permitted cast fixes them.

    Args:
      step: of the checkpoint.
      stored, wanted: arrays or their descriptions, by path.
      allow_cast: whether another floating dtype is rounded.

    Returns:
      The casts, in words.

    Raises:
      CheckpointError: an array is missing, or has another shape or dtype.
    """
    casts = []
    for path in sorted(stored.keys() | wanted.keys()):
        old, new = described(stored.get(path)), described(wanted.get(path))
        if old == new:
            continue
        castable = old and new and old[0] == new[0] and _floating(old[1]) and _floating(new[1])
        if not castable or not allow_cast:
            advice = "; --restore.allow-cast rounds it" if castable else ""
            raise CheckpointError(
                f"checkpoint {step} stores {path} as {in_words(old)}, but the run needs "
                f"{in_words(new)}; nothing is cast without being asked{advice}"
            )
        casts.append(f"{path} from {in_words(old)} to {in_words(new)}")
    return casts


def held_of(target: Any, stored: Any) -> Any:
    """The part of nested dicts that is stored."""
    if not isinstance(target, dict):
        return target
    return {name: held_of(part, stored[name]) for name, part in target.items() if name in stored}


def metadata_tree(metadata: Any) -> Any:
    """Orbax's metadata of the arrays in a folder, as a tree."""
    if metadata.item_metadata is None:
        raise ValueError("Orbax finds no arrays in it")
    return metadata.item_metadata.tree
