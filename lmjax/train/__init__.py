"""Training: config, state, step, loop. Start with `make_train_step` and `train`."""

from lmjax.errors import InputError, TrainingFailed
from lmjax.runs.config import (
    CheckpointConfig,
    Config,
    EvaluationConfig,
    FaultsConfig,
    RestoreConfig,
    refuse_no_seed,
)
from lmjax.runs.resolved import Phase, Resolved, phase_of, resolve
from lmjax.runs.run_directory import read_config
from lmjax.runs.state import (
    TrainState,
    abstract_params,
    abstract_scaling,
    abstract_state,
    create_state,
    seed_key,
)
from lmjax.train.loop import Outcome, train
from lmjax.train.step import evaluated, make_eval_step, make_train_step, scaling_within

__all__ = [
    "CheckpointConfig",
    "Config",
    "EvaluationConfig",
    "FaultsConfig",
    "InputError",
    "Outcome",
    "Phase",
    "Resolved",
    "RestoreConfig",
    "TrainState",
    "TrainingFailed",
    "abstract_params",
    "abstract_scaling",
    "abstract_state",
    "create_state",
    "evaluated",
    "make_eval_step",
    "make_train_step",
    "phase_of",
    "read_config",
    "refuse_no_seed",
    "resolve",
    "scaling_within",
    "seed_key",
    "train",
]
