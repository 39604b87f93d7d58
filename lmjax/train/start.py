"""From a config to a run ready to step: validation, and what is found and restored.

Knows data, meshes, checkpoints and states, not how steps are computed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax

from lmjax.console import stages
from lmjax.data import (
    CacheFailed,
    TokenizedCorpus,
    Tokenizer,
    tokenized_corpus,
    train_iterator,
)
from lmjax.errors import InputError, StorageFailed
from lmjax.files.filenames import expanded, printable
from lmjax.interop import origin
from lmjax.model import objective_of
from lmjax.parallel import sharding
from lmjax.parallel.agreement import failing_together, is_first, refuse_unequal
from lmjax.runs.checkpoint import Checkpoints
from lmjax.runs.config import Config, by_name
from lmjax.runs.resolved import Resolved, resolve
from lmjax.runs.run_directory import is_untrained, own_data, record_changes, refuse_unusable
from lmjax.runs.sinks import refuse_missing
from lmjax.runs.state import (
    TrainState,
    abstract_params,
    abstract_state,
    adopt,
    create_state,
    refuse_stored,
)
from lmjax.train.log import Clock
from lmjax.train.positions import Positions


@dataclass
class Run:
    """What the functions of a run share: its fixed parts and its changing state.

    Attributes:
      resolved: its config and the phases of its policy.
      corpus: the training data.
      mesh: where it is computed.
      workdir: the run directory.
      checkpoints: of that directory.
      note: shows a line to the user.
      data: the iterator of training batches.
      state: the train state.
      clock: seconds of training.
      positions: data positions of the last batches.
      rewinds: the steps that it was rewound to, in order.
    """

    resolved: Resolved
    corpus: TokenizedCorpus
    mesh: sharding.Mesh
    workdir: Path
    checkpoints: Checkpoints
    note: Callable[[str], None]
    data: Any
    state: TrainState
    clock: Clock
    positions: Positions
    rewinds: list[int]

    @property
    def config(self) -> Config:
        """The whole run's, resolved."""
        return self.resolved.config

    @property
    def step(self) -> int:
        """The last completed step."""
        return int(self.state.step)


def checked_input(
    config: Config, progress: bool, workdir: Path | None = None
) -> tuple[Resolved, TokenizedCorpus, sharding.Mesh]:
    """The resolved run, its corpus and its mesh; rejects parts that do not fit together.

    Cheap checks come first: the config, the run directory if it is local, the mesh.

    Among several processes, an error in one is raised in all, and so is a difference between what
    they are about to compute.
    """
    with failing_together():
        resolved, corpus, mesh = _checked_here(config, progress, workdir)
    # Each process may choose its own cache.
    refuse_unequal("flags", repr(by_name(resolved.config) | {"data.cache_dir": ""}))
    refuse_unequal("text", corpus.fingerprint)
    return resolved, corpus, mesh


def _checked_here(
    config: Config, progress: bool, workdir: Path | None
) -> tuple[Resolved, TokenizedCorpus, sharding.Mesh]:
    try:
        resolved = resolve(config)
        config = resolved.config
        refuse_missing(config.metrics)
        if workdir is not None and is_first():
            # Check before tokenizing, which may take hours.
            refuse_unusable(workdir, config)
        _refuse_f64_without_x64(resolved)
        for phase in resolved.phases:
            refuse_stored(phase)
        with stages.stage("starting JAX"):
            mesh = sharding.make_mesh(config.mesh)
        sharding.batch_share(mesh)
        _refuse_uneven_batches(config, mesh)
        config.reductions.refuse_mesh(mesh)
        _refuse_offloading(config, mesh)
        data = config.data
        if workdir is not None and data.tokenizer_path and not expanded(data.tokenizer).exists():
            data = own_data(workdir, data)
        with stages.stage("reading the text"):
            corpus = tokenized_corpus(data, window=config.context + 1, progress=progress)
    except ValueError as error:
        raise InputError(str(error)) from error
    except CacheFailed as error:
        raise StorageFailed(str(error)) from error
    if corpus.tokenizer.vocab_size > config.model.vocab_size:
        raise InputError(
            f"the tokenizer {corpus.tokenizer.name} has {corpus.tokenizer.vocab_size} tokens, but "
            f"the model embeds {config.model.vocab_size}; raise --model.vocab-size"
        )
    refuse_running_text(config, corpus.tokenizer)
    if len(corpus.classes) > config.model.classes:
        raise InputError(
            f"the text has {len(corpus.classes)} classes, but the model tells "
            f"{config.model.classes} apart; set --model.family encoder and --model.classes "
            f"{len(corpus.classes)}"
        )
    if config.init_from and (workdir is None or is_untrained(workdir)):
        with stages.stage(f"looking at {printable(config.init_from)}"):
            origin.refuse_unfit(config.init_from, config.model, corpus.tokenizer)
    return resolved, corpus, mesh


def refuse_running_text(config: Config, tokenizer: Tokenizer) -> None:
    """Rejects models that running text neither trains nor evaluates.

    Raises:
      InputError: it lacks classes, or no token stands for masked ones.
    """
    model, given = config.model, config.data.batch_shapes(1, 1)
    if model.headless:
        raise InputError(
            "the model has no head, so it predicts nothing; start from it with --init-from and "
            "--model.classes N, or train it on masked tokens with --model.no-headless"
        )
    missing = [name for name in objective_of(model).reads if name not in given]
    if missing:
        what = f"dataset {config.data.dataset} does not have"
        raise InputError(
            f"the model needs {' and '.join(missing)}, which {what}; choose --data.dataset "
            "movie_reviews or labelled_files for classes, text for anything else, and set "
            "--model.classes 0 to train an encoder on masked tokens"
        )
    if config.data.document_mask and model.family == "encoder":
        raise InputError(
            "data.document_mask keeps decoders within their documents, but an encoder reads whole "
            "windows; turn it off"
        )
    masks = model.family == "encoder" and not model.classes
    if masks and not model.mask_token and tokenizer.vocab_size >= model.vocab_size:
        raise InputError(
            f"all {model.vocab_size} rows of the embedding belong to tokens of the tokenizer "
            f"{tokenizer.name}, and none is left for masked ones; raise --model.vocab-size, or "
            "name the token that stands for them with --model.mask-token"
        )


def _refuse_uneven_batches(config: Config, mesh: sharding.Mesh) -> None:
    """Rejects batches that devices cannot divide; evaluation batches are padded instead."""
    rows, parts = config.batch_size // config.micro_batches, sharding.batch_parts(mesh)
    if rows % parts:
        raise ValueError(
            f"batch_size {config.batch_size} in {config.micro_batches} micro-batches makes {rows} "
            f"rows at a time, which cannot be divided among {parts} devices (mesh.data x "
            f"mesh.fsdp); choose --batch-size and --micro-batches so that they are a multiple of "
            f"{parts}, or divide less with --mesh.data and --mesh.fsdp"
        )


def _refuse_f64_without_x64(resolved: Resolved) -> None:
    sites = [site for phase in resolved.phases for site in phase.sites.values()]
    formats = {f.name for site in sites for f in (site.params, site.compute, site.output)}
    if "f64" in formats and not jax.config.read("jax_enable_x64"):
        raise ValueError("f64 needs 64-bit JAX; set JAX_ENABLE_X64=1 in the environment")


def start_run(
    resolved: Resolved,
    corpus: TokenizedCorpus,
    mesh: sharding.Mesh,
    workdir: Path,
    checkpoints: Checkpoints,
    note: Callable[[str], None],
) -> Run:
    """The run at its newest intact checkpoint, or at step 0."""
    config = resolved.config
    share, shares = sharding.batch_share(mesh)
    data = train_iterator(
        corpus,
        length=config.context,
        batch_size=config.batch_size,
        seed=config.seed,
        document_mask=config.data.document_mask,
        process_index=share,
        process_count=shares,
    )
    run = partial(Run, resolved, corpus, mesh, workdir, checkpoints, note, data)
    latest = checkpoints.newest_intact()
    if latest is None:
        record_changes(workdir, config, 0)
        with stages.stage("making the initial parameters"):
            state = _first_state(resolved, mesh, workdir, note)
        return run(state, Clock(0.0), Positions(config), [])
    if checkpoints.holds_params_alone(latest):
        if latest:
            raise InputError(
                f"{workdir} holds parameters alone, to be read and not trained further; start "
                f"another run from it, with --init-from {workdir} and another --workdir"
            )
        state = restored(checkpoints, latest, resolved, mesh)
        return run(state, Clock(0.0), Positions(config), [])
    with stages.stage(f"restoring the checkpoint of step {latest}"):
        state, position, counters = checkpoints.restore(
            latest,
            abstract_state(resolved.after(latest), mesh),
            allow_cast=config.restore.allow_cast,
        )
    if counters["corpus"] != corpus.fingerprint:
        raise InputError(
            f"{workdir} was trained on another text: the files or the tokenizer behind "
            f"{config.data.dataset} have changed; restore them or choose another --workdir"
        )
    if latest < config.steps:
        record_changes(workdir, config, latest)
    data.set_state(position)
    seconds, rewinds = counters["train_seconds"], counters.get("rewinds", [])
    return run(state, Clock(seconds), Positions(config), rewinds)


def restored(
    checkpoints: Checkpoints, step: int, resolved: Resolved, mesh: sharding.Mesh
) -> TrainState:
    """The state of a checkpoint, with a fresh optimizer if it holds parameters alone."""
    phase = resolved.after(step)
    if checkpoints.holds_params_alone(step):
        params = checkpoints.restore_params(step, abstract_params(phase, mesh))
        return adopt(params, phase.param_sites, phase, mesh)
    return checkpoints.restore(step, abstract_state(phase, mesh)).state


def _first_state(
    resolved: Resolved, mesh: sharding.Mesh, workdir: Path, note: Callable[[str], None]
) -> TrainState:
    name, phase = resolved.config.init_from, resolved.at(0)
    if name:
        return origin.started_from(name, phase, mesh, workdir, note)
    return create_state(phase, mesh)


def _refuse_offloading(config: Config, mesh: sharding.Mesh) -> None:
    """Raises `ValueError` where the memory of the host is that of the devices."""
    if config.model.remat == "offload" and sharding.backend_of(mesh).platform == "cpu":
        raise ValueError(
            "model.remat offload keeps activations in the memory of the host, where a CPU has them "
            "anyway; choose full, or attention, or run on a GPU or TPU"
        )
