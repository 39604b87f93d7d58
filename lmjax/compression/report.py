"""What compressing a run did: size, loss and speed before and after, and the error of each layer.

Knows loaded models and how they are evaluated.
"""

from __future__ import annotations

import contextlib
import math
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

TOKENS = 32
"""Tokens over which decoding is timed."""


@dataclass(frozen=True)
class Measured:
    """A model, before or after.

    Attributes:
      policy: what every tensor has.
      bytes: of the parameters in memory.
      disk: bytes of the newest checkpoint, which before holds the optimizer's state too.
      loss: nats per token of the run's held-out text; None if there is no such text here.
      perplexity: exp(loss).
      seconds_per_token: of decoding one token after another, the median of 32.
    """

    policy: str
    bytes: int
    disk: int
    loss: float | None
    perplexity: float | None
    seconds_per_token: float


def size_in_memory(params: Any) -> int:
    """Bytes of parameters."""
    return sum(np.asarray(leaf).nbytes for leaf in jax.tree.leaves(params))


def measured(model: TrainedModel, run: Path | None) -> Measured:
    """Measures a model; `run` is its directory on this machine, if it has one."""
    loss = None
    with contextlib.suppress(DataError, InputError):  # its text may be missing here
        loss = evaluate(model, progress=False).eval_loss
    return Measured(
        model.config.precision,
        size_in_memory(model.params),
        size_on_disk(run) if run is not None else 0,
        loss,
        None if loss is None else math.exp(loss) if loss < 709 else math.inf,
        _seconds_per_token(model),
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
