"""The base runs of claims: a small one for two cores and two for accelerators.

A claim changes fields of these with `dataclasses.replace`, so that all other fields agree between
claims and controls are shared.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from experiments import gpt2_124m, llama_1b
from lmjax.ablation.evidence import Margin
from lmjax.model import ModelConfig
from lmjax.optim.optimizer import OptimizerConfig
from lmjax.telemetry.rows import TelemetryConfig
from lmjax.train import CheckpointConfig, Config, EvaluationConfig

PARITY = Margin.within(
    0.005,
    "it is 0.22% of a loss of 2.26, and so below the 0.25% that DeepSeek-V3 asked of its own fp8",
)
NOT_BETTER = Margin(
    -0.005,
    math.inf,
    "rounding is not expected to help; below zero it reaches as far as parity does",
)


def small(**changes: Any) -> Config:
    """0.44 million parameters on bytes of Shakespeare, 512 tokens a step, 400 steps, in f32.

    Two blocks of width 128; Adam without weight decay; weights' gradients and updates of steps 200
    and 400 are counted. A run takes about a quarter of a minute on one core. Differences of runs
    that are paired by seed have a standard deviation of about 0.001 nats where formats do not
    matter, against 0.02 from seed to seed.
    """
    config = Config(
        precision="f32",
        steps=400,
        context=64,
        batch_size=8,
        log_every=20,
        model=ModelConfig(
            vocab_size=256, max_positions=64, width=128, layers=2, heads=4, bias=False, unroll=2
        ),
        optimizer=OptimizerConfig(learning_rate=1e-3, warmup_steps=40, b2=0.99, weight_decay=0.0),
        evaluation=EvaluationConfig(every=0, batch_size=64),
        checkpoint=CheckpointConfig(every=1000, keep=1),
        telemetry=TelemetryConfig(every=200, tensors="**/dw"),
    )
    return change(config, **changes)


def gpt2_small(**changes: Any) -> Config:
    """GPT-2 small on English Wikipedia, 10 billion tokens: `experiments.gpt2_124m` in f32."""
    return change(gpt2_124m.config(), **{"precision": "f32"} | changes)


def llama_small(**changes: Any) -> Config:
    """Llama's shape, 1.2 billion parameters, 21 billion tokens: `experiments.llama_1b` in f32."""
    return change(llama_1b.config(), **{"precision": "f32"} | changes)


def change(config: Config, **changes: Any) -> Config:
    """`dataclasses.replace`; a dict changes the fields of a part, as `optimizer={"b2": 0.999}`."""
    parts = {
        name: dataclasses.replace(getattr(config, name), **fields)
        for name, fields in changes.items()
        if isinstance(fields, dict)
    }
    return dataclasses.replace(config, **(changes | parts))
