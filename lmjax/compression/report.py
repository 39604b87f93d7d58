"""What compressing a run did: size, loss and speed before and after, and the error of each layer.

Knows loaded models and how they are evaluated.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np

from lmjax.compression.quantize import Layer
from lmjax.compression.request import QuantizeConfig
from lmjax.compression.written import size_on_disk
from lmjax.console import stages
from lmjax.data import DataError
from lmjax.errors import InputError
from lmjax.inference import Generation, TrainedModel, evaluate
from lmjax.inference.growing import Growing
from lmjax.inference.sampling import Sampler
from lmjax.model import ANYWHERE, QUIET, Params, assembled
from lmjax.precision import exact

TOKENS = 32
"""Tokens over which decoding is timed."""

ROWS = 8
"""Times that an encoder reads a row, to be timed."""


@dataclass(frozen=True)
class Measured:
    """A model, before or after.

    Attributes:
      policy: what every tensor has.
      bytes: of the parameters in memory.
      disk: bytes of the newest checkpoint, which before holds the optimizer's state too.
      loss: nats per token of the run's held-out text, or per text for classes; None if there is no
        such text here.
      perplexity: exp(loss); None for classes.
      accuracy: the share of held-out texts whose class is found; None without classes.
      seconds_per_token: of decoding one token after another, the median of 32; of an encoder, which
        decodes nothing, of a row as long as the context, by its tokens.
    """

    policy: str
    bytes: int
    disk: int
    loss: float | None
    perplexity: float | None
    accuracy: float | None
    seconds_per_token: float


def size_in_memory(params: Any) -> int:
    """Bytes of parameters."""
    return sum(np.asarray(leaf).nbytes for leaf in jax.tree.leaves(params))


def measured(model: TrainedModel, run: Path | None) -> Measured:
    """Measures a model; `run` is its directory on this machine, if it has one."""
    loss = perplexity = accuracy = None
    with contextlib.suppress(DataError, InputError):  # its text may be missing here
        found = evaluate(model, progress=False)
        loss, accuracy = found.eval_loss, found.accuracy
        perplexity = None if model.config.model.classes else found.perplexity
    decodes = model.config.model.family == "decoder"
    return Measured(
        model.config.precision,
        size_in_memory(model.params),
        size_on_disk(run) if run is not None else 0,
        loss,
        perplexity,
        accuracy,
        _seconds_per_token(model) if decodes else _seconds_of_a_row(model) / model.config.context,
    )


def _seconds_per_token(model: TrainedModel) -> float:
    """The time of one token, once its program is compiled."""
    how = Generation(tokens=min(TOKENS, model.config.context - 2) + 1, temperature=0.0, window=1)
    start = [model.tokenizer.start_of_document]
    sampler = Sampler(model.tokenizer.vocab_size, how, how.seed)
    times: list[float] = []
    with stages.stage("timing decoding"):
        while len(times) < max(how.tokens, 2):
            growing = Growing(model, [start], [sampler], how)
            while growing.unfinished:
                begin = time.perf_counter()
                growing.drawn()
                times.append(time.perf_counter() - begin)
    return float(np.median(times[1:]))


def _seconds_of_a_row(model: TrainedModel) -> float:
    """The time in which an encoder reads one row, once its program is compiled."""
    config, sites = model.config.model, model.sites

    def predicted(params: Params, rows: jax.Array) -> jax.Array:
        """The logits of every position of the rows, or of the pooled one."""
        own = assembled(params, config)
        given: dict[str, Any] = {"cotangent_scales": None, "constrain": ANYWHERE}
        x = own.trunk({"inputs": rows}, sites=sites, context=QUIET, **given)
        return own.logits(x, sites, QUIET)

    read, times = exact.jit(predicted), []
    params = jax.device_put(model.params)
    rows = np.full((1, model.config.context), model.tokenizer.start_of_document, np.int32)
    with stages.stage("timing a row"):
        for _ in range(ROWS + 1):
            begin = time.perf_counter()
            jax.block_until_ready(read(params, rows))
            times.append(time.perf_counter() - begin)
    return float(np.median(times[1:]))


def as_json(
    config: QuantizeConfig, runs: Mapping[str, Measured], layers: Sequence[Layer]
) -> dict[str, Any]:
    """The content of `quantization.json`; the first run is that before, the second that after."""
    before, after = runs.values()
    return {
        "method": config.method,
        "observer": config.observer,
        "before": asdict(before),
        "after": asdict(after),
        "layers": [asdict(layer) for layer in layers],
    }
