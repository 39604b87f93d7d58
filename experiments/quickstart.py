"""First contact: a small language model on Shakespeare, in mixed precision.

    python -m experiments.quickstart
"""

from lmjax.cli import run_experiment
from lmjax.model import ModelConfig
from lmjax.optimizer import OptimizerConfig
from lmjax.train import CheckpointConfig, Config, EvaluationConfig


def config() -> Config:
    """Four blocks of width 128 on bytes: parameters in f32, everything else in bf16."""
    return Config(
        precision="p=f32,c=bf16,o=f32",
        steps=600,
        context=128,
        batch_size=16,
        model=ModelConfig(vocab_size=256, max_positions=128, width=128, layers=4, heads=4),
        optimizer=OptimizerConfig(learning_rate=2e-3, warmup_steps=50),
        evaluation=EvaluationConfig(every=200),
        checkpoint=CheckpointConfig(every=200),
    )


if __name__ == "__main__":
    run_experiment(__spec__.name, config)
