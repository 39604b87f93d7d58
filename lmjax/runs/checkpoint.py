"""Checkpoints: the only file that knows Orbax.

A checkpoint holds the train state, the data position and the progress of the run:

    checkpoints/500/state/            the arrays, as Orbax writes them
                    data.json         state of the data iterator
                    progress.json     counters of the run
                    manifest.sha256   a digest of every file above
    checkpoints/damaged/500/          a damaged checkpoint: set aside, never read, never removed

It is written in the background into a hidden folder. Once complete, that folder gets its manifest,
is flushed to disk and only then renamed, so a folder named by a step is complete, whenever the
process is killed. A manifest proves bytes, not that they can be restored, so restoring is tried
before older checkpoints are removed. A folder is renamed before it is removed, so none is ever
incomplete under its own name.

Orbax globs paths and reads `gs:/` as a URL, so it gets plain ones (see files/filenames.py).
"""

from __future__ import annotations

import contextlib
import logging
import shutil
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from lmjax import strict_json
from lmjax.errors import CheckpointError, StorageFailed
from lmjax.files import manifest
from lmjax.files.filenames import plain
from lmjax.parallel.agreement import from_first, is_first
from lmjax.precision import paths
from lmjax.runs.checkpoint_files import (
    compared,
    held_of,
    is_unsealed,
    metadata_tree,
    one_line,
    read_json,
    system_error,
)
from lmjax.runs.proof import Proof
from lmjax.runs.state import TrainState

CLOCK_MAY_JUMP = ocp.AsyncOptions(
    timeout_secs=10 * 365 * 24 * 3600, create_directories_asynchronously=False
)
"""Orbax measures its time limits by the wall clock: this disables the first, and the second does
not apply if no folders are made in the background."""


class Restored(NamedTuple):
    """The content of a checkpoint: train state, data iterator state and run counters."""

    state: TrainState
    data: dict[str, Any]
    progress: dict[str, Any]


class Checkpoints:
    """The checkpoints of a run directory: the newest `keep` of them, or read-only without `keep`.

    `mirror` receives the steps to keep once another checkpoint is complete, before older ones are
    removed. It is part of writing: the next checkpoint waits for it and raises its failure.

    A writer also removes what a killed process left unfinished, and sets damaged checkpoints aside.
    A reader changes nothing: another process may be training.

    With several processes, all make the same calls; the first writes everything but arrays, and all
    restore the checkpoint that it finds intact.
    """

    def __init__(
        self,
        directory: Path,
        keep: int | None = None,
        note: Callable[[str], None] | None = None,
        mirror: Callable[[Sequence[int]], None] | None = None,
    ):
        # Orbax logs every save through absl; a run reports its own saves and failures.
        logging.getLogger("absl").setLevel(logging.CRITICAL)
        self._directory = directory.absolute()
        self._keep = keep
        self._note = note or (lambda text: None)
        self._mirror = mirror or (lambda steps: None)
        self._checked: set[int] = set()
        self._proved = False
        self._arrays = ocp.StandardCheckpointer(async_options=CLOCK_MAY_JUMP)
        self._background = ThreadPoolExecutor(1, "checkpoint")
        self._pending: Future[None] | None = None
        if keep is not None and is_first():
            self._directory.mkdir(parents=True, exist_ok=True)
            self._remove_leftovers()

    def steps(self) -> list[int]:
        """Steps of the complete checkpoints, damaged or not, ascending."""
        if not self._directory.is_dir():
            return []
        return sorted(int(path.name) for path in self._directory.iterdir() if path.name.isdecimal())

    def latest(self) -> int | None:
        """Step of the newest complete checkpoint, damaged or not."""
        return max(self.steps(), default=None)

    def newest_intact(self, before: int | None = None) -> int | None:
        """Step of the newest checkpoint whose files are unchanged since it was written.

        Reports newer, damaged ones and, unless this is a reader, moves them into `damaged`.

        Args:
          before: only consider steps less than this.

        Returns:
          The step; None if there was never a checkpoint.

        Raises:
          CheckpointError: there are checkpoints, but none is intact.
        """
        found, why = -1, ""
        if is_first():
            found, why = self._search(before)
        found = from_first(found)
        if found >= 0:
            self._checked.add(found)
            return found
        damaged = self._directory / "damaged"
        if before is None and (why or (damaged.is_dir() and any(damaged.iterdir()))):
            raise CheckpointError(
                f"no checkpoint in {self._directory} is intact{why}; put a copy of one back there, "
                f"or delete {self._directory} to start again from step 0"
            )
        return None

    def _search(self, before: int | None) -> tuple[int, str]:
        """The newest intact step or -1, and what was wrong with the last damaged one."""
        why = ""
        for step in reversed(self.steps()):
            if before is not None and step >= before:
                continue
            try:
                self._check(step)
                return step, ""
            except manifest.Damaged as error:
                if not self._folder(step).exists():
                    continue  # the training process removed it meanwhile
                why = f" (of {step}, {error})"
                moved = "" if self._keep is None else f"; moved to {self._set_aside(step)}"
                self._note(f"checkpoint {step} is damaged: {error}{moved}")
        return -1, why

    def _check(self, step: int) -> None:
        if step in self._checked:
            return
        folder = self._folder(step)
        if not is_unsealed(folder):
            manifest.check(folder)

    def save(
        self,
        step: int,
        state: TrainState,
        data: dict[str, Any],
        progress: dict[str, Any],
        *,
        prune: bool = True,
    ) -> None:
        """Starts writing a checkpoint; returns once the arrays are copied, not once it is on disk.

        Saving the same step twice writes it once: the state of a step is unique. With `prune` the
        oldest checkpoints beyond `keep` are removed once this one is complete.

        Raises:
          StorageFailed: this checkpoint or the one before could not be written or mirrored. Earlier
            complete ones stay intact.
        """
        self.wait()
        if from_first(step in self.steps()):
            return
        folder = self._directory / f".{step}.partial"
        with self._writing(step, folder):
            if is_first():
                folder.mkdir()
            self._arrays.save(plain(self._directory) / folder.name / "state", state)
        texts = {"data.json": strict_json.dumps(data), "progress.json": strict_json.dumps(progress)}
        # Read everything back for the first one, then only the descriptions of arrays.
        proof = Proof.of(state, content=not self._proved)
        self._proved = True
        self._pending = self._background.submit(self._complete, step, folder, texts, proof, prune)

    def _complete(
        self, step: int, folder: Path, texts: dict[str, str], proof: Proof, prune: bool
    ) -> None:
        with self._writing(step, folder):
            self._arrays.wait_until_finished()
            if is_first():
                for name, text in texts.items():
                    (folder / name).write_text(text, encoding="utf-8")
                manifest.seal(folder)
                folder.rename(self._folder(step))
                manifest.sync_directory(self._directory)
                self._prove(step, proof)
                steps = self.steps()
                kept = steps[-self._keep :] if self._keep and prune else steps
                self._mirror(kept)
                for old in steps[: -len(kept)]:
                    self._remove(old)

    def _prove(self, step: int, proof: Proof) -> None:
        """Checks that the checkpoint can be restored; else sets it aside and keeps older ones."""
        state = plain(self._directory) / str(step) / "state"
        # Other processes are training and take no part in this.
        alone = ocp.options.MultiprocessingOptions(
            primary_host=jax.process_index(),
            active_processes={jax.process_index()},
            barrier_sync_key_prefix="proof",
        )
        handler = ocp.PyTreeCheckpointHandler(multiprocessing_options=alone)
        try:
            with ocp.Checkpointer(handler, multiprocessing_options=alone) as reader:
                proof.compare_descriptions(metadata_tree(reader.metadata(state)))
                for target in proof.templates(ocp.PLACEHOLDER) if proof.content else ():
                    kinds = jax.tree.map(lambda _: ocp.RestoreArgs(np.ndarray), target)
                    args = ocp.args.PyTreeRestore(target, restore_args=kinds)
                    proof.compare_content(reader.restore(state, args=args), ocp.PLACEHOLDER)
        # Whatever a library raises here, the next start would raise too.
        except Exception as error:
            aside = self._set_aside(step)
            latest = self.latest()
            left = "no checkpoint is left" if latest is None else f"that of step {latest} is kept"
            raise CheckpointError(
                f"the checkpoint of step {step} was written but cannot be restored "
                f"({one_line(error)}); it was moved to {aside}, and {left}"
            ) from error

    @contextlib.contextmanager
    def _writing(self, step: int, folder: Path) -> Iterator[None]:
        """A block that writes a checkpoint; a failure leaves nothing of it behind."""
        try:
            yield
        except CheckpointError:
            raise
        except Exception as error:
            shutil.rmtree(folder, ignore_errors=True)
            reason = system_error(error)
            if reason is None:
                raise
            latest = self.latest()
            left = "none is complete" if latest is None else f"that of step {latest} is complete"
            raise StorageFailed(
                f"the checkpoint of step {step} could not be written: {reason}; {left}. Once that "
                "is mended, the same command resumes from there"
            ) from error

    def restore(self, step: int, target: TrainState, *, allow_cast: bool = False) -> Restored:
        """Reads a checkpoint onto the devices of `target`.

        Args:
          step: of the checkpoint.
          target: shapes, dtypes and shardings, as returned by `abstract_state`.
          allow_cast: round arrays stored in another floating dtype to the target's, and report
            which. Shapes and integers never change.

        Raises:
          CheckpointError: the checkpoint is missing or damaged, or stores an array in another shape
            or dtype than the target's. Orbax would cast that silently.
        """
        folder = self._folder(step)
        with self._reading(step) as arrays:
            stored = paths.flatten(metadata_tree(self._arrays.metadata(arrays)))
            casts = compared(step, stored, paths.flatten(target), allow_cast)
            if casts:
                self._note(f"checkpoint {step} is cast while it is read: {', '.join(casts)}")
            state = self._arrays.restore(arrays, target)
            return Restored(state, read_json(folder, "data"), read_json(folder, "progress"))

    def restore_params(self, step: int, target: Any) -> Any:
        """Reads the parameters of a checkpoint alone, onto the devices of `target`.

        Args:
          step: of the checkpoint.
          target: shapes, dtypes and shardings, as returned by `abstract_params`.

        Raises:
          CheckpointError: as for `restore`.
        """
        return self._restore_part(step, "params", target)

    def restore_scaling(self, step: int, target: Any) -> Any:
        """Reads what a checkpoint has of the state of scale factors, alone.

        Args and errors are as for `restore_params`; `target` comes from `abstract_scaling`.
        """
        with self._reading(step) as arrays:
            stored = metadata_tree(self._arrays.metadata(arrays)).get("scaling") or {}
        held = held_of(target, stored)
        return self._restore_part(step, "scaling", held) if held else {}

    def holds_params_alone(self, step: int) -> bool:
        """Whether a checkpoint has no state of an optimizer: it was written, not trained."""
        with self._reading(step) as arrays:
            return not jax.tree.leaves(
                metadata_tree(self._arrays.metadata(arrays)).get("opt_state")
            )

    def _restore_part(self, step: int, part: str, target: Any) -> Any:
        with self._reading(step) as arrays:
            found = paths.flatten(metadata_tree(self._arrays.metadata(arrays))[part])
            compared(step, found, paths.flatten(target), allow_cast=False)
            handler = ocp.PyTreeCheckpointHandler()
            with ocp.Checkpointer(handler) as reader:
                args = ocp.args.PyTreeRestore(
                    {part: target},
                    restore_args={part: ocp.checkpoint_utils.construct_restore_args(target)},
                    partial_restore=True,
                )
                return reader.restore(arrays, args=args)[part]

    @contextlib.contextmanager
    def _reading(self, step: int) -> Iterator[Path]:
        """The folder of the arrays of an intact checkpoint; errors of reading are explained."""
        folder = self._folder(step)
        if not folder.is_dir():
            raise CheckpointError(f"there is no checkpoint of step {step} in {self._directory}")
        try:
            self._check(step)
        except manifest.Damaged as error:
            raise CheckpointError(f"checkpoint {step} is damaged: {error}") from error
        try:
            yield plain(self._directory) / str(step) / "state"
        except (OSError, ValueError, KeyError, AttributeError) as error:
            unsealed = ", which an earlier version of lmjax wrote without digests,"
            raise CheckpointError(
                f"checkpoint {step}{unsealed if is_unsealed(folder) else ' has intact files but'} "
                f"cannot be read ({one_line(error)}); move {folder} away to resume from the one "
                "before"
            ) from error

    def wait(self) -> None:
        """Waits until every checkpoint is on disk; raises errors of writing."""
        pending, self._pending = self._pending, None
        if pending is None:
            return
        pending.result()
        if jax.process_count() > 1:
            multihost_utils.sync_global_devices("checkpoint is complete")

    def __enter__(self) -> Checkpoints:
        """The checkpoints themselves."""
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        """Closes them; a failing process does not wait for others, which may be lost."""
        if error is None or jax.process_count() == 1:
            self.close()

    def close(self) -> None:
        """Waits, then stops the background threads."""
        try:
            self.wait()
        finally:
            self._background.shutdown()
            self._arrays.close()

    def abandon_after(self, step: int) -> None:
        """Moves checkpoints newer than a step into `rewound`, as the run takes another path."""
        self.wait()
        for newer in self.steps():
            if newer > step and is_first():
                self._set_aside(newer, "rewound")

    def _folder(self, step: int) -> Path:
        return self._directory / str(step)

    def _set_aside(self, step: int, where: str = "damaged") -> Path:
        """Moves a checkpoint out of the way, beside those moved before."""
        self._checked.discard(step)
        place = self._directory / where
        place.mkdir(exist_ok=True)
        names = (str(step), *(f"{step}.{number}" for number in range(1, 10**6)))
        aside = next(place / name for name in names if not (place / name).exists())
        return self._folder(step).rename(aside)

    def _remove(self, step: int) -> None:
        self._checked.discard(step)
        shutil.rmtree(self._folder(step).rename(self._directory / f".{step}.removed"))

    def _remove_leftovers(self) -> None:
        """Folders that a killed process was writing or removing, including older versions'."""
        for pattern in (".*.partial", ".*.removed", "*.orbax-checkpoint-tmp*"):
            for folder in self._directory.glob(pattern):
                shutil.rmtree(folder)
