"""Keeps compiled programs for later processes, in JAX's persistent compilation cache.

The cache is in the user's cache directory and shared by all runs of a machine: a program that was
compiled once is read in a fraction of the time, with the same bits. JAX locks it, so any number of
processes may use it, and evicts what was used longest ago.

Knows how JAX lays out its cache.
"""

from __future__ import annotations

import contextlib
import os
import platform
from pathlib import Path

import filelock
import jax

from lmjax.files.filenames import expanded, user_cache

MAX_BYTES = 2**32
"""Size at which JAX evicts programs from the cache."""


def keep_programs() -> None:
    """Points JAX to the cache, unless it is already told where to keep programs.

    LMJAX_COMPILED names another directory; `off` keeps none. Without a directory that can be
    written, programs are compiled as before.
    """
    chosen = os.environ.get("LMJAX_COMPILED", "")
    if chosen == "off" or jax.config.values["jax_compilation_cache_dir"] is not None:
        return
    cache = os.environ.get("LMJAX_CACHE", "")
    home = expanded(cache) if cache else user_cache()
    if not chosen and home is None:
        return
    # Executables are those of one kind of machine, and home directories are shared.
    folder = expanded(chosen) if chosen else Path(home or "", "compiled", platform.node())
    with contextlib.suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)
        _remove_torn(folder)
        jax.config.update("jax_compilation_cache_dir", str(folder.absolute()))
        jax.config.update("jax_compilation_cache_max_size", MAX_BYTES)
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
        # Else a program may come back with the scopes of another one that computes the same, and
        # profiles and audits would attribute its operations to the wrong sites.
        jax.config.update("jax_compilation_cache_include_metadata_in_key", True)


def _remove_torn(folder: Path) -> None:
    """Removes programs whose writer was killed: their time of use, written last, is missing.

    JAX would not write them again, and fail to read them in every process.
    """
    with contextlib.suppress(filelock.Timeout), filelock.FileLock(folder / ".lockfile", timeout=1):
        for program in folder.glob("*-cache"):
            if not program.with_name(program.name.removesuffix("-cache") + "-atime").exists():
                program.unlink()
