"""One experiment as one frozen dataclass tree: everything that decides what a run computes.

Each part is defined beside the code that reads it; this file joins the parts and resolves what
depends on several. Two runs with equal resolved configs compute the same numbers; the mesh and
other fields marked `housekeeping` are in the tree for convenience, not part of a run's identity.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from lmjax import checks
from lmjax.checks import at_least, housekeeping, power_of_two, validate
from lmjax.data import DataConfig
from lmjax.model import (
    ModelConfig,
    Sites,
    block_matrices,
    layout,
    parametrisation_of,
    resolve_sites,
)
from lmjax.optim.loss_scale import LossScaleConfig, ScaleKind, narrowest, resolve_kind
from lmjax.optim.optimizer import Extension, OptimizerConfig, extensions
from lmjax.optim.pruning import PruningConfig, refuse_unfit
from lmjax.parallel.reduction import Reductions, reductions
from lmjax.parallel.sharding import MeshConfig
from lmjax.precision.formats import Format
from lmjax.precision.grammar import parse_policy
from lmjax.precision.policy import Policy, SitePolicy
from lmjax.runs.profile import ProfileConfig
from lmjax.runs.sinks import MetricsConfig
from lmjax.telemetry.rows import TelemetryConfig, refuse_no_tensor

Count = Annotated[int, at_least(1)]

SEEDS = 2**64
"""The number of seeds: a threefry key has two words of 32 bits, so a larger seed would repeat the
stream of a smaller one."""

Seed = Annotated[int, at_least(0, SEEDS - 1)]

VERSION = 1
"""Version of `config.json`. A new field's default means what runs did before the field existed, so
a file without it, or without a version, keeps its meaning; a field that changes its name or meaning
raises the version."""


@dataclass(frozen=True)
class EvaluationConfig:
    """When, and on how much held-out text, a run is evaluated."""

    every: Annotated[int, at_least(0), housekeeping("evaluation only reads the parameters")] = 250
    """Steps between evaluations; 0: only at the end."""
    batches: Annotated[int, at_least(0), housekeeping("of numbers that are only logged")] = 0
    """Batches of an evaluation during training, spread over the split; 0: the whole split."""
    batch_size: Annotated[
        int, at_least(0), housekeeping("it rounds the held-out loss alone, not the parameters")
    ] = 0
    """Rows of an evaluation batch; 0: as in training."""

    def __post_init__(self) -> None:
        """Rejects values out of range."""
        validate(self, "evaluation")


@dataclass(frozen=True)
class CheckpointConfig:
    """When checkpoints are written and how many are kept."""

    every: Annotated[
        int,
        at_least(1),
        housekeeping("a resumed run is the uninterrupted one, saved wherever"),
    ] = 500
    """Steps between checkpoints; one more is written at the end and when the run is stopped."""
    keep: Annotated[int, at_least(1), housekeeping("a run reads only its newest checkpoint")] = 2
    """Number of newest checkpoints to keep."""

    def __post_init__(self) -> None:
        """Rejects values out of range."""
        validate(self, "checkpoint")


@dataclass(frozen=True)
class FaultsConfig:
    """What to do when gradients stay non-finite. A single such step is always skipped."""

    non_finite: Literal["stop", "skip", "rewind"] = "stop"
    """After loss_scale.max_consecutive_skips consecutive skips: stop with an error; keep skipping;
    or rewind to an earlier checkpoint and continue with the text that follows the failure."""
    max_rewinds: Annotated[int, at_least(0)] = 3
    """Number of rewinds after which a run stops instead."""

    def __post_init__(self) -> None:
        """Rejects values out of range."""
        validate(self, "faults")


@dataclass(frozen=True)
class RestoreConfig:
    """What a run may do to the checkpoint that it resumes from."""

    allow_cast: bool = False
    """Resume in another precision: round stored arrays of another floating format. Otherwise a
    change of precision makes it a different run."""

    def __post_init__(self) -> None:
        """Rejects values that are not booleans."""
        validate(self, "restore")


@dataclass(frozen=True)
class Config:
    """A training run."""

    precision: str = "p=f32,c=bf16,o=f32"
    """The policy: which number format every tensor has; see docs/policies.md."""
    steps: Count = 1000
    """Planned length in optimizer steps; it sets the learning-rate schedule."""
    seed: Seed = 0
    """Determines initial parameters, data order and dropout; from 0 to 2^64 - 1."""
    context: Count = 256
    """Context length in tokens for training."""
    batch_size: Count = 16
    """Sequences per step, over all devices and micro-batches."""
    micro_batches: Count = 1
    """Parts that a batch is cut into; their gradients are summed in f32."""
    deterministic_reductions: Annotated[int, power_of_two(also=(0,), hint="try 8")] = 0
    """Parts (2^n) of each micro-batch, summed in a fixed order: losses and parameters are then
    bit-identical on any number of devices (mesh.data x mesh.fsdp) that divides it. 0: they are the
    same up to rounding, and steps are faster."""
    log_every: Annotated[int, at_least(1), housekeeping("logging only reads metrics")] = 10
    """Steps between rows of metrics.jsonl."""
    loss_multiplier: Annotated[float, power_of_two(hint=f"2**-10, for example, is {2**-10}")] = 1.0
    """Factor of the gradients that is not divided out again: 2^-k stands in for a batch or a
    vocabulary 2^k times as large. Logged losses exclude it, as do the gradients of a unit-scaled
    model, whose constants cancel it along with the size of batch and vocabulary."""
    init_from: str = ""
    """Start from the parameters of another run, or of a model that Hugging Face's transformers
    saved: RUN or DIR. Unless flags say otherwise, the model and its tokenizer are those of the
    origin too. Empty: fresh parameters, drawn from the seed."""
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    pruning: PruningConfig = field(default_factory=PruningConfig)
    loss_scale: LossScaleConfig = field(default_factory=LossScaleConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    restore: Annotated[
        RestoreConfig,
        housekeeping("what it allows shows in the fields that then change"),
    ] = field(default_factory=RestoreConfig)
    faults: Annotated[
        FaultsConfig, housekeeping("it affects only a run that would otherwise fail")
    ] = field(default_factory=FaultsConfig)
    telemetry: Annotated[
        TelemetryConfig, housekeeping("a watched step differs at most in the rounding of sums")
    ] = field(default_factory=TelemetryConfig)
    profile: Annotated[
        ProfileConfig, housekeeping("a traced step computes what another one does")
    ] = field(default_factory=ProfileConfig)
    audit: Annotated[bool, housekeeping("what is read of a program does not change it")] = True
    """Writes audit.json: what the compiled step does with numbers, compared with the policy."""
    metrics: Annotated[
        MetricsConfig, housekeeping("where numbers are shown does not change them")
    ] = field(default_factory=MetricsConfig)
    mesh: Annotated[
        MeshConfig, housekeeping("where a run is computed changes the order of sums and no more")
    ] = field(default_factory=MeshConfig)

    def __post_init__(self) -> None:
        """Rejects parts that do not fit together."""
        validate(self)
        if self.model.positions == "learned" and self.context > self.model.max_positions:
            raise ValueError(
                f"context is {self.context}, but the model learns only {self.model.max_positions} "
                "positions; lower --context or raise --model.max-positions"
            )
        if self.batch_size % self.micro_batches:
            raise ValueError(
                f"batch_size {self.batch_size} cannot be cut into {self.micro_batches} "
                "micro-batches; choose numbers that divide"
            )
        if self.profile.range and self.profile.range[-1] > self.steps:
            raise ValueError(
                f"profile.steps is {self.profile.steps}, but the run ends after step {self.steps}; "
                "choose earlier steps or raise --steps"
            )
        if starts := [start for start, _ in extensions(self.optimizer) if start >= self.steps]:
            raise ValueError(
                f"optimizer.extensions prolongs a run of {starts[0]} steps, but steps is "
                f"{self.steps}; leave both to --extend-steps"
            )
        self._refuse_disorder()
        refuse_unfit(self.pruning, self.steps, block_matrices(self.model))
        refuse_no_tensor(self.telemetry, layout(self.model))
        for start in self.sites_by_phase:
            if start >= self.steps:
                raise ValueError(
                    f"the policy's phase from step {start} would never run, because the run ends "
                    f"after {self.steps} steps; start it earlier or raise --steps"
                )

    def _refuse_disorder(self) -> None:
        """Rejects configs whose sums cannot have the order that they ask for."""
        self.reductions.refuse_rows(self.batch_size // self.micro_batches)
        if self.reductions.in_order and self.optimizer.name == "muon":
            raise ValueError(
                "muon multiplies matrices that mesh.fsdp cuts, so their sums would depend on the "
                "mesh; with deterministic_reductions use --optimizer.name adamw or lion"
            )

    @functools.cached_property
    def reductions(self) -> Reductions:
        """How sums over devices are computed."""
        return reductions(self.deterministic_reductions)

    @functools.cached_property
    def policy(self) -> Policy:
        """What `precision` says."""
        return parse_policy(self.precision)

    @functools.cached_property
    def sites_by_phase(self) -> dict[int, Sites]:
        """The formats of every site of the model, by the first step of each phase of the policy.

        Before it is known how cotangents that overflow are treated: see `resolved.py`.
        """
        return {start: resolve_sites(self.model, one) for start, one in self.policy.phases}

    def is_watched(self, step: int) -> bool:
        """Whether telemetry counts the effects of rounding in a step."""
        return self.telemetry.every > 0 and step % self.telemetry.every == 0

    def is_logged(self, step: int) -> bool:
        """Whether a step has a row in `metrics.jsonl`."""
        return step % self.log_every == 0 or self.is_watched(step) or step == self.steps

    def is_evaluated(self, step: int) -> bool:
        """Whether an evaluation follows a step, not counting the one at the end."""
        every = self.evaluation.every
        return every > 0 and step % every == 0 and step < self.steps

    def is_saved(self, step: int) -> bool:
        """Whether a checkpoint follows a step even if the run neither ends nor stops."""
        return step % self.checkpoint.every == 0

    def _loss_scale_kind(self) -> ScaleKind:
        """The resolved kind of loss scaling under all phases of the policy.

        Unit scaling already places cotangents in the range of narrow formats: `auto` is none.
        """
        if self.loss_scale.kind != "auto":
            return self.loss_scale.kind
        if not parametrisation_of(self.model).auto_loss_scale:
            return "none"
        sites = self._sites_of_all_phases()
        formats = _of_cotangents(sites) + [site.params for site in sites]
        return resolve_kind("auto", min(f.exponent_bits for f in formats))

    def _sites_of_all_phases(self) -> list[SitePolicy]:
        return [site for sites in self.sites_by_phase.values() for site in sites.values()]

    def resolved(self) -> Config:
        """The same run with every derived field filled in, as recorded in `config.json`."""
        scale = dataclasses.replace(self.loss_scale, kind=self._loss_scale_kind())
        if scale.kind == "predictive" and scale.format == "auto":
            cotangents = _of_cotangents(self._sites_of_all_phases())
            scale = dataclasses.replace(scale, format=narrowest(cotangents).name)
        rows = self.evaluation.batch_size or self.batch_size // self.micro_batches
        derived: dict[str, Any] = {
            "precision": str(self.policy),
            "model": self.model.resolved(),
            "loss_scale": scale,
            "evaluation": dataclasses.replace(self.evaluation, batch_size=rows),
        }
        open_ = {name: value for name, value in derived.items() if value != getattr(self, name)}
        return dataclasses.replace(self, **open_) if open_ else self


def extended(config: Config, steps: int, how: Extension) -> Config:
    """A run prolonged by so many steps; what it computed before stays what it was."""
    own = config.optimizer
    own = dataclasses.replace(own, extensions=(*own.extensions, f"{config.steps}:{how}"))
    return dataclasses.replace(config, steps=config.steps + steps, optimizer=own)


def unextended(config: Config) -> Config:
    """The run before its last extension.

    Raises:
      ValueError: it has none.
    """
    *before, (steps, _) = extensions(config.optimizer)
    own = dataclasses.replace(
        config.optimizer, extensions=config.optimizer.extensions[: len(before)]
    )
    return dataclasses.replace(config, steps=steps, optimizer=own)


HOUSEKEEPING = checks.housekeeping_fields(Config)
"""The fields that a resumed run may change, by dotted name, and why they are not part of its
identity: where it runs, how it is watched and saved, and what is done when something fails. They
are recorded."""


def _of_cotangents(sites: Collection[SitePolicy]) -> list[Format]:
    """The formats that cotangents are rounded to without their own scale factor."""
    quantizers = [site.grads.quantizer for site in sites if site.grads is not None]
    raw = [quantizer.format for quantizer in quantizers if quantizer.groups == "none"]
    return [site.compute for site in sites] + raw


def to_json(config: Config) -> dict[str, Any]:
    """The config as nested dicts, lists, strings and numbers."""
    return dataclasses.asdict(config)


def from_json(values: dict[str, Any]) -> Config:
    """Parses a config written by `to_json`, with or without a `version` beside its fields.

    Raises:
      ValueError: the field or version is unknown; another version of lmjax wrote it.
    """
    if isinstance(values, dict):
        version = values.get("version", 0)
        if type(version) is not int or not 0 <= version <= VERSION:
            raise ValueError(
                f"its version is {version!r}, this lmjax reads up to {VERSION}; use the one that "
                "wrote it (environment.json names its git_revision)"
            )
        values = {name: value for name, value in values.items() if name != "version"}
    return _read(Config(), values, "")


def _read(default: Any, values: Any, prefix: str) -> Any:
    if not isinstance(values, dict):
        raise ValueError(f"{prefix.rstrip('.') or 'the config'} must be an object, not {values!r}")
    known = {f.name: getattr(default, f.name) for f in dataclasses.fields(default)}
    unknown = sorted(set(values) - set(known))
    if unknown:
        raise ValueError(
            "unknown config field "
            + ", ".join(prefix + name for name in unknown)
            + "; another version of lmjax wrote it (environment.json names its git_revision)"
        )
    read = {}
    for name, value in values.items():
        if dataclasses.is_dataclass(known[name]):
            value = _read(known[name], value, f"{prefix}{name}.")
        read[name] = tuple(value) if isinstance(value, list) else value
    return dataclasses.replace(default, **read)


def differences(old: Config, new: Config) -> dict[str, tuple[Any, Any]]:
    """The fields of identity in which two runs differ, by dotted name."""
    return _unequal(identity(old), identity(new))


def all_differences(old: Config, new: Config) -> dict[str, tuple[Any, Any]]:
    """The fields in which two configs differ, including housekeeping, by dotted name."""
    return _unequal(by_name(old), by_name(new))


def _unequal(old: dict[str, Any], new: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    return {name: (old[name], new[name]) for name in old if old[name] != new[name]}


def identity(config: Config) -> dict[str, Any]:
    """The fields that decide what a run computes, by dotted name: all but housekeeping."""
    return {name: value for name, value in by_name(config).items() if name not in HOUSEKEEPING}


def by_name(config: Config) -> dict[str, Any]:
    """All fields of a config by dotted name."""
    return _flat(to_json(config))


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = value
    return flat


def refuse_no_seed(name: str, seed: Any) -> None:
    """Validates a seed that is not a field: each integer in [0, 2**64) is a different stream.

    Raises:
      ValueError: it is anything else.
    """
    checks.validate_value(name, seed, Seed)
