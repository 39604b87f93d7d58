"""Checkpoints: the only file that knows Orbax.

One checkpoint holds the train state, the position in the data, and how far the run has come. Orbax
writes it in the background into a temporary folder and renames that when it is complete, so a
killed process leaves no half checkpoint behind that anybody would read.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import orbax.checkpoint as ocp

from lmjax.precision import paths
from lmjax.train.state import TrainState


class CheckpointError(RuntimeError):
    """A checkpoint does not hold what the run asks for."""


class Restored(NamedTuple):
    """What a checkpoint held: the state, the data iterator's state, and counters of the run."""

    state: TrainState
    data: dict[str, Any]
    progress: dict[str, Any]


class Checkpoints:
    """The checkpoints of one run directory, newest `keep` of them; without `keep`, only to read.

    The one that writes also removes what a killed process left unfinished. A reader touches
    nothing: another process may be training.
    """

    def __init__(self, directory: Path, keep: int | None = None):
        # Orbax logs every save through absl at INFO; a run reports its saves itself.
        logging.getLogger("absl").setLevel(logging.WARNING)
        options = ocp.CheckpointManagerOptions(
            max_to_keep=keep,
            create=keep is not None,
            cleanup_tmp_directories=keep is not None,
            enable_async_checkpointing=True,
        )
        handlers = {
            "state": ocp.StandardCheckpointHandler(),
            "data": ocp.JsonCheckpointHandler(),
            "progress": ocp.JsonCheckpointHandler(),
        }
        self._manager = ocp.CheckpointManager(
            directory.absolute(), item_handlers=handlers, options=options
        )

    def latest(self) -> int | None:
        """Step of the newest complete checkpoint."""
        return self._manager.latest_step()

    def save(self, step: int, state: TrainState, data: dict[str, Any], progress: dict) -> None:
        """Starts writing a checkpoint; returns when the arrays are copied, not when it is on disk.

        Saving the same step twice writes it once: the state of a step is unique.
        """
        if step == self.latest():
            return
        items = ocp.args.Composite(
            state=ocp.args.StandardSave(state),
            data=ocp.args.JsonSave(data),
            progress=ocp.args.JsonSave(progress),
        )
        self._manager.save(step, args=items, force=True)

    def restore(self, step: int, target: TrainState) -> Restored:
        """Reads a checkpoint onto the devices that `target` names.

        Args:
          step: which checkpoint.
          target: shapes, dtypes and shardings, as `abstract_state` gives them.

        Raises:
          CheckpointError: an array is stored in another shape or dtype than the target's. Orbax
            would cast it silently.
        """
        self._refuse_casts(step, target)
        items = ocp.args.Composite(
            state=ocp.args.StandardRestore(target),
            data=ocp.args.JsonRestore(),
            progress=ocp.args.JsonRestore(),
        )
        restored = self._manager.restore(step, args=items)
        return Restored(restored["state"], restored["data"], restored["progress"])

    def wait(self) -> None:
        """Returns when every checkpoint is on disk; raises what went wrong while writing."""
        self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits, then gives up the background threads."""
        self._manager.close()

    def _refuse_casts(self, step: int, target: TrainState) -> None:
        stored = {
            path: (tuple(leaf.shape), np.dtype(leaf.dtype))
            for path, leaf in paths.flatten(self._stored_arrays(step)).items()
        }
        wanted = {
            path: (tuple(leaf.shape), np.dtype(leaf.dtype))
            for path, leaf in paths.flatten(target).items()
        }
        for path in sorted(stored.keys() | wanted.keys()):
            if stored.get(path) != wanted.get(path):
                raise CheckpointError(
                    f"checkpoint {step} stores {path} as {_described(stored.get(path))}, but the "
                    f"run needs {_described(wanted.get(path))}; nothing is cast unasked"
                )

    def _stored_arrays(self, step: int) -> Any:
        metadata = self._manager.item_metadata(step)["state"]
        return getattr(metadata, "tree", metadata)


def _described(array: tuple[tuple[int, ...], np.dtype] | None) -> str:
    return "nothing" if array is None else f"{array[1].name}{list(array[0])}"
