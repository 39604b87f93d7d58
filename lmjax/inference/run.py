"""Opening a run directory to use what it has learned."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax

from lmjax.console import stages
from lmjax.console.progress import say
from lmjax.data import Tokenizer, load_tokenizer
from lmjax.model import Params, Sites, apply
from lmjax.parallel import sharding
from lmjax.precision import exact
from lmjax.runs.checkpoint import Checkpoints
from lmjax.runs.store.remote import fetched
from lmjax.train import Config, InputError, abstract_state, read_config


@dataclass(frozen=True)
class TrainedModel:
    """A run's newest parameters with all that is needed to call them.

    Attributes:
      config: the run's resolved config; its policy decides the formats here as in training. Of a
        policy that changes with the step, it is the phase that the parameters are in.
      params: the parameters, in their stored formats.
      step: the training step they come from.
      tokenizer: the run's own copy.
    """

    config: Config
    params: Any
    step: int
    tokenizer: Tokenizer

    @property
    def sites(self) -> Sites:
        """The formats of every site."""
        return self.config.sites

    def logits_function(self) -> Any:
        """The compiled `(params, tokens, document_starts) -> logits [B, T, V]`.

        Tokens are `int32[B, T]`. Where documents start, `int32[B, T]` as
        `lmjax.data.document_starts` gives it, matters to a model with a document mask whose rows
        hold several; left out, each row is one document.
        """
        config, sites = self.config.model, self.sites

        def logits(params: Params, tokens: jax.Array, starts: jax.Array | None = None) -> jax.Array:
            return apply(params, tokens, config=config, sites=sites, document_starts=starts)

        return exact.jit(logits)


def load_model(workdir: str | Path, *, precision: str | None = None) -> TrainedModel:
    """The model of a run directory, from its newest intact checkpoint.

    Nothing is written or moved there: another process may be training.

    Args:
      workdir: the run directory, or a string such as `s3://BUCKET/RUN`.
      precision: a policy to compute with instead of the run's; parameters stay as stored.

    Raises:
      InputError: there is no run, or it has no checkpoint yet.
      CheckpointError: it has checkpoints, but none is intact.
    """
    with stages.stage("loading the model"), fetched(workdir) as directory:
        return _load_model(directory, precision)


def _load_model(workdir: Path, precision: str | None) -> TrainedModel:
    config = read_config(workdir)
    folder = workdir / "checkpoints"
    if not folder.is_dir():
        raise InputError(f"{workdir} has no checkpoint yet; train it first")
    checkpoints = Checkpoints(folder, note=say)
    try:
        step = checkpoints.newest_intact()
        if step is None:
            raise InputError(f"{workdir} has no complete checkpoint yet; train it further")
        mesh = sharding.make_mesh(sharding.MeshConfig())
        config = config.after(step)
        params = checkpoints.restore(step, abstract_state(config, mesh)).state.params
    finally:
        checkpoints.close()
    if precision is not None:
        try:
            config = dataclasses.replace(config, precision=precision).after(step)
        except ValueError as error:
            raise InputError(str(error)) from error
    return TrainedModel(
        config, jax.device_get(params), step, load_tokenizer(workdir / "tokenizer.json")
    )
