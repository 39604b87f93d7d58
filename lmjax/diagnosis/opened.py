"""A recorded run, opened at a checkpoint to be looked at: nothing of it is changed.

Knows run directories, checkpoints and data, not what is then computed.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax

from lmjax.console import stages
from lmjax.console.progress import say
from lmjax.data import TokenizedCorpus, tokenized_corpus, train_iterator
from lmjax.errors import InputError
from lmjax.files.filenames import expanded
from lmjax.interop import origin
from lmjax.parallel import sharding
from lmjax.runs.checkpoint import Checkpoints
from lmjax.runs.config import Config
from lmjax.runs.resolved import Phase, Resolved, resolve
from lmjax.runs.run_directory import own_data, parameters_sha256, read_config
from lmjax.runs.state import TrainState, abstract_state, adopt, create_state
from lmjax.runs.store.remote import fetched
from lmjax.train.start import restored


@dataclass
class OpenRun:
    """A run between two steps.

    Attributes:
      workdir: its directory.
      phases: its recorded config, resolved.
      mesh: the config's, on the devices here.
      state: after `step` steps.
      step: the number of steps done.
      data: the iterator of training batches; the next batch is that of step `step + 1`.
      corpus: the text.
    """

    workdir: Path
    phases: Resolved
    mesh: sharding.Mesh
    state: TrainState
    step: int
    data: Any
    corpus: Any

    @property
    def config(self) -> Config:
        """Its recorded config."""
        return self.phases.config

    @property
    def phase(self) -> Phase:
        """That of the next step."""
        return self.phases.at(self.step)

    def next_batch(self) -> dict[str, jax.Array]:
        """The batch of the next step."""
        return sharding.global_batch(self.mesh, next(self.data), 1)


def open_run(workdir: str | Path, *, before: int | None = None, initial: bool = False) -> OpenRun:
    """Opens a run at its newest intact checkpoint.

    Args:
      workdir: the run directory, or a string such as `s3://BUCKET/RUN`.
      before: only consider checkpoints of steps less than this.
      initial: whether a run without such a checkpoint is opened at step 0, with parameters drawn
        again from its seed.

    Raises:
      InputError: there is no run or no such checkpoint, or the text or the devices are not those
        that the run needs.
      CheckpointError: there are checkpoints, but none is intact.
    """
    with fetched(workdir) as directory:
        return _open(directory, before, initial)


def _open(workdir: Path, before: int | None, initial: bool) -> OpenRun:
    phases = resolve(read_config(workdir))
    config = phases.config
    if jax.process_count() > 1:
        raise InputError("a run is looked at by one process; start a single one")
    mesh, corpus = _mesh_and_corpus(config, workdir)
    opened = partial(OpenRun, workdir, phases, mesh)
    folder = workdir / "checkpoints"
    checkpoints = Checkpoints(folder, note=say)
    try:
        step = checkpoints.newest_intact(before) if folder.is_dir() else None
        if step is None:
            if not initial:
                raise InputError(f"{workdir} has no complete checkpoint yet; train it first")
            return opened(_initial(phases, mesh), 0, _data(config, corpus), corpus)
        if checkpoints.holds_params_alone(step):
            state = restored(checkpoints, step, phases, mesh)
            return opened(state, step, _data(config, corpus), corpus)
        with stages.stage(f"restoring the checkpoint of step {step}"):
            target = abstract_state(phases.after(step), mesh)
            state, position, counters = checkpoints.restore(step, target)
    finally:
        checkpoints.close()
    if counters["corpus"] != corpus.fingerprint:
        raise InputError(
            f"{workdir} was trained on another text: the files or the tokenizer behind "
            f"{config.data.dataset} have changed; restore them"
        )
    data = _data(config, corpus)
    data.set_state(position)
    return opened(state, step, data, corpus)


def fresh_run(config: Config) -> OpenRun:
    """A run at step 0 without a directory, to be trained in memory.

    Raises:
      InputError: the text or the devices do not fit the config.
    """
    phases = resolve(config)
    mesh, corpus = _mesh_and_corpus(phases.config)
    state = _initial(phases, mesh)
    return OpenRun(Path(), phases, mesh, state, 0, _data(phases.config, corpus), corpus)


def _initial(phases: Resolved, mesh: sharding.Mesh) -> TrainState:
    """The state that a run started with; unlike the run, it records nothing."""
    phase = phases.at(0)
    if not phases.config.init_from:
        return create_state(phase, mesh)
    with origin.opened(phases.config.init_from) as found:
        return adopt(found.parameters(mesh), found.stored, phase, mesh)


def _mesh_and_corpus(
    config: Config, workdir: Path | None = None
) -> tuple[sharding.Mesh, TokenizedCorpus]:
    data = config.data
    if workdir is not None and data.tokenizer_path and not expanded(data.tokenizer).exists():
        data = own_data(workdir, data)
    try:
        mesh = sharding.make_mesh(config.mesh)
        with stages.stage("reading the text"):
            return mesh, tokenized_corpus(data, window=config.context + 1, progress=False)
    except ValueError as error:
        raise InputError(str(error)) from error


def checkpoints_after(run: OpenRun, last: int) -> dict[int, str]:
    """The digests of the parameters in a run's later checkpoints, up to a step."""
    checkpoints, found = Checkpoints(run.workdir / "checkpoints"), {}
    try:
        for step in checkpoints.steps():
            if run.step < step <= last:
                target = abstract_state(run.phases.after(step), run.mesh)
                found[step] = parameters_sha256(checkpoints.restore(step, target).state.params)
    finally:
        checkpoints.close()
    return found


def _data(config: Config, corpus: TokenizedCorpus) -> Any:
    return train_iterator(
        corpus,
        length=config.context,
        batch_size=config.batch_size,
        seed=config.seed,
        document_mask=config.data.document_mask,
    )
