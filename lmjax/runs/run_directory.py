"""The files of a run directory other than metrics and checkpoints.

config.json       the fully resolved config: what the run computes
history.jsonl     which fields of it a later launch changed, and at which step
environment.json  versions, devices, XLA flags, git revision, native products: where and how it was
                  computed
result.json       once the planned steps are done
tokenizer.json    a copy, so that the run can generate text by itself
huggingface/      of an imported run: what export writes again
checkpoints/      see checkpoint.py
metrics.jsonl, tensorboard/, curves.png   see metrics.py
rewound/          see rewind.py
.lock             held by the process that trains
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import hashlib
import importlib.metadata
import os
import platform
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np

from lmjax import strict_json
from lmjax.data import DataConfig
from lmjax.errors import InputError
from lmjax.files.filenames import plain
from lmjax.files.locks import LocksUnavailable, holder, lock
from lmjax.parallel.agreement import failing_together, is_first, whole
from lmjax.precision import paths
from lmjax.precision.exact import COMPILER_OPTIONS
from lmjax.precision.native import summary
from lmjax.runs.config import (
    VERSION,
    Config,
    all_differences,
    differences,
    from_json,
    to_json,
    unextended,
)
from lmjax.runs.metrics import partial, replace_text
from lmjax.runs.resolved import Resolved

PACKAGES = ("jax", "jaxlib", "flax", "optax", "jmp", "orbax-checkpoint", "grain", "numpy", "lmjax")
LOCK = ".lock"
HISTORY = "history.jsonl"
RESULT = "result.json"
BESIDE = "huggingface"
"""What a run was imported with: the config, and the files of the tokenizer."""

CASTABLE = ("precision", "loss_scale.kind", "loss_scale.format")
"""Fields in which a run may differ from its directory if casting is allowed: the policy, and what
is derived from it."""


@contextlib.contextmanager
def hold_run(workdir: Path, config: Config, note: Callable[[str], None]) -> Iterator[None]:
    """`open_run` for the length of a block during which no other process may train there.

    With several processes, the first one locks and writes for all.

    Args:
      workdir: the run directory.
      config: what to compute.
      note: receives a warning if other processes cannot be kept out.

    Raises:
      InputError: as `open_run`, or another process is training there; raised in all processes.
    """
    with contextlib.ExitStack() as stack:
        with failing_together():
            if is_first():
                locked = _lock_run(workdir, config, note, stack)
                open_run(workdir, config, may_take_over=locked)
        with failing_together():
            if not (workdir / "config.json").exists():
                raise InputError(
                    f"{workdir} is not what process 0 has written; choose a --workdir on a file "
                    "system that all processes share"
                )
            _refuse_unfit(workdir, config)
        yield


def refuse_unusable(workdir: Path, config: Config) -> None:
    """Rejects a directory that holds something else or appears not to be writable.

    Raises:
      InputError: it cannot be used; nothing was written.
    """
    with _unwritable_is_bad_input(workdir):
        _refuse_unfit(workdir, config)
        place = next(path for path in (workdir, *workdir.absolute().parents) if path.exists())
        if not place.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
        if not os.access(place, os.W_OK | os.X_OK):
            read_only = os.name == "posix" and os.statvfs(place).f_flag & os.ST_RDONLY
            number = errno.EROFS if read_only else errno.EACCES
            raise OSError(number, os.strerror(number))
        plain(workdir)


def _lock_run(
    workdir: Path, config: Config, note: Callable[[str], None], stack: contextlib.ExitStack
) -> bool:
    """Locks the directory until the stack is closed; False if locks are unavailable."""
    with _unwritable_is_bad_input(workdir):
        _refuse_unfit(workdir, config)
        workdir.mkdir(parents=True, exist_ok=True)
        try:
            mine = stack.enter_context(lock(workdir / LOCK, wait=False))
        except LocksUnavailable as error:
            note(f"warning: {error}: make sure that nothing else trains in {workdir}")
            return False
        if not mine:
            raise InputError(
                f"{holder(workdir / LOCK)} is training in {workdir}; stop that one or wait for it, "
                "or choose another --workdir"
            )
        return True


def open_run(workdir: Path, config: Config, *, may_take_over: bool = True) -> None:
    """Creates a directory for this run and records its config, or opens that of an earlier start.

    A directory without any completed step may be taken over: the run that it was created for failed
    early.

    Args:
      workdir: the run directory.
      config: resolved.
      may_take_over: whether no other process can be about to take the first step there.

    Raises:
      InputError: it cannot be written, or holds another run; nothing was written.
    """
    with _unwritable_is_bad_input(workdir):
        _refuse_unfit(workdir, config, may_take_over=may_take_over)
        workdir.mkdir(parents=True, exist_ok=True)
        if not (workdir / "config.json").exists() or (
            differences(read_config(workdir), config) and is_untrained(workdir)
        ):
            write_config(workdir, config)


def record_changes(workdir: Path, config: Config, step: int) -> None:
    """Records the fields in which a launch differs from the one before, after this many steps.

    `config.json` holds the newest config, `history.jsonl` the previous value of each field. If the
    run was cast to another precision, the whole previous config is kept.
    """
    if not is_first():
        return
    path, old = workdir / "config.json", read_config(workdir)
    if not (changed := all_differences(old, config)):
        return
    if differences(old, config):
        replace_text(workdir / f"config.until-{step}.json", path.read_text(encoding="utf-8"))
    if finished_result(workdir, old) is not None:
        (workdir / RESULT).rename(workdir / f"result.until-{step}.json")
    fields = {name: {"was": was, "is": now} for name, (was, now) in changed.items()}
    history = workdir / HISTORY
    rows = history.read_text(encoding="utf-8") if history.exists() else ""
    row = strict_json.dumps({"step": step, "changed": fields})
    replace_text(history, f"{rows}{row}\n")
    write_config(workdir, config)


def write_config(workdir: Path, config: Config) -> None:
    """Writes `config.json`."""
    values = {"version": VERSION, **to_json(config)}
    replace_text(workdir / "config.json", strict_json.dumps(values, indent=2) + "\n")


@contextlib.contextmanager
def _unwritable_is_bad_input(workdir: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise InputError(
            f"cannot write the run directory {workdir}: {error.strerror or error}; choose another "
            "--workdir"
        ) from error


def read_config(workdir: Path) -> Config:
    """Reads the resolved config of a run directory.

    Raises:
      InputError: it is missing or cannot be read.
    """
    path = workdir / "config.json"
    try:
        return from_json(strict_json.read(path))
    except (OSError, NotADirectoryError) as error:
        raise InputError(
            f"{workdir} is not a run directory: {path.name} cannot be read ({error.strerror})"
        ) from error
    except (ValueError, TypeError) as error:
        raise InputError(f"{path} is damaged or of another version: {error}") from error


def finished_result(workdir: Path, config: Config) -> dict[str, Any] | None:
    """The result of a run; None if it is not finished, or was prolonged since."""
    path = workdir / RESULT
    result = strict_json.read(path) if path.exists() else None
    return result if result is not None and result["steps"] == config.steps else None


def class_names(workdir: Path, config: Config) -> tuple[str, ...]:
    """The classes that a run tells apart, by number; those of its texts are known once it is done.

    Empty if they have no names, or there are none.
    """
    result = finished_result(workdir, config) or {}
    return config.data.labels or tuple(result.get("labels", ()))


def is_untrained(workdir: Path) -> bool:
    """Whether a run directory has no output of a step: no checkpoint and no row."""
    checkpoints, metrics = workdir / "checkpoints", workdir / "metrics.jsonl"
    kept = checkpoints.is_dir() and any(not p.name.startswith(".") for p in checkpoints.iterdir())
    return not kept and not (metrics.exists() and metrics.stat().st_size)


def _refuse_unfit(workdir: Path, config: Config, *, may_take_over: bool = True) -> None:
    """Rejects a directory that holds something other than this run; writes nothing."""
    path = workdir / "config.json"
    if path.exists():
        if may_take_over and is_untrained(workdir):
            read_config(workdir)  # raises if damaged
            return
        _refuse_another_run(workdir, read_config(workdir), config)
    elif workdir.is_dir() and set(workdir.iterdir()) - {partial(path), workdir / LOCK}:
        raise InputError(
            f"{workdir} is not empty and holds no run; choose another --workdir or empty it"
        )


def _refuse_another_run(workdir: Path, old: Config, new: Config) -> None:
    changed = differences(old, new)
    if new.optimizer.extensions and not differences(old, unextended(new)):
        if finished_result(workdir, old) is None:
            raise InputError(
                f"{workdir} is not finished, so it cannot be prolonged; resume it without "
                "--extend-steps first"
            )
        return
    castable = bool(changed) and set(changed) <= set(CASTABLE)
    if castable and new.restore.allow_cast:
        return
    if changed:
        fields = "; ".join(
            f"{name} is {was!r} there, {now!r} now" for name, (was, now) in changed.items()
        )
        advice = ", --restore.allow-cast to round what is stored to the new one" if castable else ""
        raise InputError(
            f"{workdir} holds another run ({fields}); choose another --workdir, repeat the old "
            f"values to resume that run{advice}, or delete the directory"
        )


def own_data(workdir: Path, data: DataConfig) -> DataConfig:
    """Settings of data that name a run's own copy of its tokenizer instead of the file it is from.

    Those that name a tokenizer by word, or a run without a copy, stay as they are.
    """
    own = workdir / "tokenizer.json"
    use = data.tokenizer_path and own.is_file()
    return dataclasses.replace(data, tokenizer=str(own), end_of_document="") if use else data


def record_environment(workdir: Path, run: Resolved) -> None:
    """Writes `environment.json`: where the remaining steps are computed."""
    sites = [site for phase in run.phases for site in phase.products().values()]
    recorded = environment() | {"products": summary(sites)}
    replace_text(workdir / "environment.json", strict_json.dumps(recorded, indent=2) + "\n")


def environment() -> dict[str, Any]:
    """Versions, devices, XLA flags and git revision of this process."""
    return {
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in PACKAGES},
        "backend": jax.default_backend(),
        "devices": [device.device_kind for device in jax.devices()],
        "processes": jax.process_count(),
        "machine": platform.machine(),
        "processor": _processor(),
        "cpu_count": os.cpu_count(),
        "xla_flags": os.environ.get("XLA_FLAGS", ""),
        "compiler_options": COMPILER_OPTIONS,
        "jax_enable_x64": jax.config.read("jax_enable_x64"),
        "git_revision": _git_revision(),
    }


def _processor() -> str:
    """The name of the CPU; empty if the system does not report it."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor()


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _git_revision() -> str | None:
    """The revision of lmjax's source tree, with `+` appended if it has local changes."""
    source = Path(__file__).resolve().parent

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", "-C", str(source), *arguments], capture_output=True, text=True, check=True
        ).stdout.strip()

    try:
        return git("rev-parse", "HEAD") + ("+" if git("status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def parameters_sha256(params: Any) -> str:
    """A digest of path, dtype, shape and bytes of every parameter, in path order.

    It depends only on the values, not on their sharding. All processes must call it.
    """
    digest = hashlib.sha256()
    for path, leaf in paths.flatten(params).items():
        array = whole(leaf)
        digest.update(f"{path} {array.dtype.name} {list(array.shape)}\n".encode())
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()
