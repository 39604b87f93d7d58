"""Loads the trained model of a run directory."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax

from lmjax.console import stages
from lmjax.console.progress import say
from lmjax.data import Tokenizer, load_tokenizer
from lmjax.model import Calibrated, Params, Sites, apply, in_evaluation
from lmjax.parallel import sharding
from lmjax.precision import exact
from lmjax.runs.checkpoint import Checkpoints
from lmjax.runs.run_directory import own_data
from lmjax.runs.store.remote import fetched
from lmjax.train import (
    Config,
    InputError,
    Phase,
    abstract_params,
    abstract_scaling,
    evaluated,
    read_config,
    resolve,
    scaling_within,
)


@dataclass(frozen=True)
class TrainedModel:
    """A run's newest parameters and everything needed to apply them.

    Attributes:
      phase: the phase of the parameters; its policy decides the formats, as in training.
      params: the parameters, in their stored formats.
      step: the training step of the parameters.
      tokenizer: the run's own copy.
      scaling: the state of observed and learned scale factors, as `TrainState` has it; operands
        that are not in it are scaled by themselves.
    """

    phase: Phase
    params: Any
    step: int
    tokenizer: Tokenizer
    scaling: dict[str, Any] = field(default_factory=dict)

    @property
    def config(self) -> Config:
        """The run's resolved config, with the policy of the phase."""
        return self.phase.config

    @property
    def sites(self) -> Sites:
        """The formats of every site."""
        return self.phase.sites

    @property
    def evaluated(self) -> Params | Calibrated:
        """The parameters, together with the factors that were learned or observed with them."""
        return evaluated(self.params, self.scaling, self.phase)

    def within(self, phase: Phase) -> TrainedModel:
        """The same parameters in another phase, with the factors that are valid there."""
        scaling = scaling_within(self.scaling, self.phase, phase)
        return dataclasses.replace(self, phase=phase, scaling=scaling)

    def under(self, precision: str) -> TrainedModel:
        """The same parameters, to be computed with under another policy.

        Factors that were learned or observed count where a tensor keeps its quantizer.

        Raises:
          InputError: the policy is not one, or does not suit the model.
        """
        try:
            own = dataclasses.replace(self.phase.config, precision=precision)
            return self.within(resolve(own).after(self.step))
        except ValueError as error:
            raise InputError(str(error)) from error

    def logits_function(self) -> Any:
        """The compiled `(params, tokens, document_starts) -> logits [B, T, V]`.

        `params` is `evaluated`. Tokens are `int32[B, T]`. `document_starts` is `int32[B, T]`, from
        `lmjax.data.document_starts`, for models with a document mask whose rows hold several
        documents; without it, each row is one document.
        """
        config, sites = self.config.model, self.sites

        def logits(params: Any, tokens: jax.Array, starts: jax.Array | None = None) -> jax.Array:
            own, context = in_evaluation(params)
            given: dict[str, Any] = {"config": config, "sites": sites, "document_starts": starts}
            return apply(own, tokens, context=context, **given)

        return exact.jit(logits)


def refuse_encoder(model: TrainedModel) -> None:
    """Rejects models that do not predict the next token.

    Raises:
      InputError: the model is an encoder.
    """
    if model.config.model.family == "encoder":
        raise InputError(
            "the model is an encoder, which does not predict the next token; use python -m lmjax "
            "evaluate, or train a decoder"
        )


def load_model(workdir: str | Path, *, precision: str | None = None) -> TrainedModel:
    """Loads the model of a run directory from its newest intact checkpoint.

    Writes and moves nothing: another process may be training there.

    Args:
      workdir: the run directory, or a string such as `s3://BUCKET/RUN`.
      precision: a policy to compute with instead of the run's; parameters stay as stored.

    Raises:
      InputError: there is no run, or the run has no checkpoint yet.
      CheckpointError: the run has checkpoints, but none is intact.
    """
    with stages.stage("loading the model"), fetched(workdir) as directory:
        return _load_model(directory, precision)


def _load_model(workdir: Path, precision: str | None) -> TrainedModel:
    config = read_config(workdir)
    config = dataclasses.replace(config, data=own_data(workdir, config.data))
    folder = workdir / "checkpoints"
    if not folder.is_dir():
        raise InputError(f"{workdir} has no checkpoint yet; train it first")
    checkpoints = Checkpoints(folder, note=say)
    try:
        step = checkpoints.newest_intact()
        if step is None:
            raise InputError(f"{workdir} has no complete checkpoint yet; train it further")
        mesh = sharding.make_mesh(sharding.MeshConfig())
        phase = resolve(config).after(step)
        params = checkpoints.restore_params(step, abstract_params(phase, mesh))
        scaling = checkpoints.restore_scaling(step, abstract_scaling(phase, mesh))
    finally:
        checkpoints.close()
    tokenizer = load_tokenizer(workdir / "tokenizer.json")
    params, scaling = jax.device_get((params, scaling))
    model = TrainedModel(phase, params, step, tokenizer, scaling)
    return model if precision is None else model.under(precision)
