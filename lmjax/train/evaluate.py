"""The held-out loss of a set of parameters."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from lmjax.data import TokenizedCorpus, validation_batches
from lmjax.parallel import sharding
from lmjax.runs.config import Config


def held_out_loss(
    eval_step: Callable[[Any, Any], Any],
    params: Any,
    corpus: TokenizedCorpus,
    config: Config,
    mesh: sharding.Mesh,
    *,
    batches: int = 0,
) -> float:
    """Mean cross entropy in nats per token over the validation split.

    Batches that do not divide evenly among the devices are padded with rows of weight 0, so the
    number of devices changes the loss only by rounding; with `deterministic_reductions`, not at
    all.

    Args:
      eval_step: from `make_eval_step`.
      params: the parameters.
      corpus: the tokens.
      config: resolved; sets context and batch rows.
      mesh: where to compute.
      batches: number of batches, spread evenly over the split; 0: the whole split, each token once.
    """
    nats = tokens = np.zeros((), np.float64)
    share, shares = sharding.batch_share(mesh)
    for rows in validation_batches(
        corpus,
        length=config.context,
        batch_size=config.evaluation.batch_size,
        max_batches=batches,
        multiple=config.reductions.multiple(mesh),
        document_mask=config.data.document_mask,
        process_index=share,
        process_count=shares,
    ):
        batch = sharding.global_batch(mesh, rows, shares)
        batch_nats, batch_tokens = eval_step(params, batch)
        # Summed in f64: f32 would lose the small terms of a long sum.
        nats = nats + np.asarray(batch_nats, np.float64)
        tokens = tokens + np.asarray(batch_tokens, np.float64)
    return float(nats / tokens)
