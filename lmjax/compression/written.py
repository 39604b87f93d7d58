"""Writes a run directory that holds parameters to be read, and nothing to train them with.

Knows run directories and checkpoints.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from lmjax import strict_json
from lmjax.console import stages
from lmjax.errors import InputError, StorageFailed
from lmjax.files.publishing import published_directory
from lmjax.inference import TrainedModel
from lmjax.runs.checkpoint import Checkpoints
from lmjax.runs.metrics import replace_text
from lmjax.runs.run_directory import BESIDE, environment, parameters_sha256, write_config
from lmjax.runs.state import params_alone


def refuse_taken(target: Path) -> None:
    """Rejects a place for a new run directory where there is something already.

    Raises:
      InputError: there is.
    """
    if target.exists():
        raise InputError(f"{target} exists; name a new directory with --to")


def write_run(
    target: Path,
    model: TrainedModel,
    finish: Callable[[Path], None] = lambda folder: None,
    source: Path | None = None,
) -> None:
    """Writes a model as a run directory, which appears when it is complete.

    Args:
      target: where; nothing may be there.
      model: config, parameters and tokenizer.
      finish: writes what else belongs into the directory that it is given.
      source: the run that it was made of, whose files for export are copied.

    Raises:
      InputError: the place is taken.
      StorageFailed: it cannot be written.
    """
    refuse_taken(target)
    try:
        with stages.stage("writing the run directory"), published_directory(target) as folder:
            write_config(folder, model.config)
            write_json(folder / "environment.json", environment())
            model.tokenizer.save(folder / "tokenizer.json")
            if source is not None and (source / BESIDE).is_dir():
                shutil.copytree(source / BESIDE, folder / BESIDE)
            params, scaling = jax.tree.map(jnp.asarray, (model.params, model.scaling))
            with Checkpoints(folder / "checkpoints", keep=1) as checkpoints:
                progress = {"train_seconds": 0.0, "corpus": "", "rewinds": []}
                state = params_alone(params, model.step, scaling)
                checkpoints.save(model.step, state, {}, progress)
            finish(folder)
    except OSError as error:
        raise StorageFailed(
            f"{error.filename or target}: {error.strerror or error}; nothing was written"
        ) from error


def write_result(
    folder: Path,
    model: TrainedModel,
    loss: float | None,
    accuracy: float | None,
    labels: Sequence[str],
) -> None:
    """Writes `result.json`, as a run has it that is done: held-out scores, and names of classes."""
    config = model.config
    if loss is not None:
        result = {
            "steps": config.steps,
            "eval_loss": loss,
            "tokens": config.steps * config.batch_size * config.context,
            "train_seconds": 0.0,
            "parameters_sha256": parameters_sha256(model.params),
        }
        if accuracy is not None:
            result |= {"accuracy": accuracy, "error_rate": 1 - accuracy, "labels": [*labels]}
        write_json(folder / "result.json", result)


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Writes one JSON file."""
    replace_text(path, strict_json.dumps(content, indent=2) + "\n")


def size_on_disk(run: Path) -> int:
    """Bytes of the checkpoints of a run."""
    return sum(p.stat().st_size for p in (run / "checkpoints").rglob("*") if p.is_file())
