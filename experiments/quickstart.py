"""First contact: a small language model on Shakespeare, in f16 with dynamic loss scaling.

Command:   python -m experiments.quickstart
Hardware:  2 CPU cores
Time:      3.5 minutes, 198 s of them training
Expected:  3.72 nats per token on held-out text (seed 0)

Parameters are stored in f32 and everything else is computed in f16, whose range is too small for
most gradients: the progress bar shows the loss scale that compensates, as it grows and backs off.
The tokenizer has 1024 byte-pair tokens, trained on the text itself.
"""

from lmjax.cli import run_experiment
from lmjax.data import DataConfig
from lmjax.model import ModelConfig
from lmjax.optim.loss_scale import LossScaleConfig
from lmjax.optim.optimizer import OptimizerConfig
from lmjax.train import CheckpointConfig, Config, EvaluationConfig


def config() -> Config:
    """Four blocks of width 128, a context of 128 tokens: 0.95 million parameters."""
    return Config(
        precision="p=f32,c=f16,o=f32",
        steps=800,
        context=128,
        batch_size=16,
        model=ModelConfig(
            vocab_size=1024, max_positions=128, width=128, layers=4, heads=4, unroll=4
        ),
        data=DataConfig(dataset="shakespeare", tokenizer="bpe", vocab_size=1024),
        optimizer=OptimizerConfig(learning_rate=2e-3, warmup_steps=50),
        loss_scale=LossScaleConfig(growth_interval=50),
        evaluation=EvaluationConfig(every=200),
        checkpoint=CheckpointConfig(every=200),
    )


if __name__ == "__main__":
    run_experiment(config)
