"""The Transformer: the only room that knows Flax, which it uses to build and name parameters."""

from lmjax.model.config import ModelConfig, gpt2, llama_1b
from lmjax.model.decoder import (
    Params,
    apply,
    block_groups,
    initial_params,
    learning_rate_factors,
    param_sites,
    parameter_count,
    resolve_sites,
    site_tree,
    structure,
)
from lmjax.model.decoding import Cache, decoding_params, extend, initial_cache
from lmjax.model.layers import Constrain
from lmjax.model.layout import layout
from lmjax.model.loss import log_probabilities, token_losses
from lmjax.model.sites import Context, Sites

__all__ = [
    "Cache",
    "Constrain",
    "Context",
    "ModelConfig",
    "Params",
    "Sites",
    "apply",
    "block_groups",
    "decoding_params",
    "extend",
    "gpt2",
    "initial_cache",
    "initial_params",
    "layout",
    "learning_rate_factors",
    "llama_1b",
    "log_probabilities",
    "param_sites",
    "parameter_count",
    "resolve_sites",
    "site_tree",
    "structure",
    "token_losses",
]
