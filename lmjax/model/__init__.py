"""The Transformer: the only room that knows Flax, which it uses to build and name parameters."""

from lmjax.model.assembly import Batch
from lmjax.model.attention_form import Form
from lmjax.model.config import ModelConfig, RopeScaling, gpt2, llama_1b
from lmjax.model.decoding import Cache, decoding_params, extend, initial_cache
from lmjax.model.families import (
    Params,
    Store,
    Weight,
    apply,
    assembled,
    attention_forms,
    block_matrices,
    dense_weights,
    initial_params,
    layout,
    learning_rate_factors,
    objective_of,
    param_sites,
    parameter_count,
    product_sums,
    resolve_sites,
    site_tree,
    stored_to_nearest,
    stored_weights,
    structure,
    weights,
)
from lmjax.model.layers import ANYWHERE, Constrain
from lmjax.model.layout import is_of_objective
from lmjax.model.loss import log_probabilities, token_losses
from lmjax.model.parametrisation import parametrisation_of
from lmjax.model.sites import QUIET, Calibrated, Context, Sites, in_evaluation
from lmjax.model.stack import block_groups

__all__ = [
    "ANYWHERE",
    "QUIET",
    "Batch",
    "Cache",
    "Calibrated",
    "Constrain",
    "Context",
    "Form",
    "ModelConfig",
    "Params",
    "RopeScaling",
    "Sites",
    "Store",
    "Weight",
    "apply",
    "assembled",
    "attention_forms",
    "block_groups",
    "block_matrices",
    "decoding_params",
    "dense_weights",
    "extend",
    "gpt2",
    "in_evaluation",
    "initial_cache",
    "initial_params",
    "is_of_objective",
    "layout",
    "learning_rate_factors",
    "llama_1b",
    "log_probabilities",
    "objective_of",
    "param_sites",
    "parameter_count",
    "parametrisation_of",
    "product_sums",
    "resolve_sites",
    "site_tree",
    "stored_to_nearest",
    "stored_weights",
    "structure",
    "token_losses",
    "weights",
]
