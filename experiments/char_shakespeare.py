"""nanoGPT's CPU recipe: a byte-level model on Shakespeare, small enough for a laptop.

Command:   python -m experiments.char_shakespeare
Hardware:  2 CPU cores
Time:      104 to 117 s of training, and 20 s around it
Expected:  1.793 nats per byte on held-out text; at most 1.90 in any of the three compute formats

The recipe is that of nanoGPT's README for a computer without a GPU: 4 layers, 4 heads, width 128,
context 64, batch 12, 2000 steps, no dropout. Its README reports 1.88 on its own Shakespeare text.
Compare formats with --precision p=f32,c=bf16,o=f32 or c=f16; give each run its own --workdir.
"""

from lmjax.cli import run_experiment
from lmjax.model import ModelConfig
from lmjax.optim.optimizer import OptimizerConfig
from lmjax.train import CheckpointConfig, Config, EvaluationConfig


def config() -> Config:
    """The recipe, in f32."""
    return Config(
        precision="f32",
        steps=2000,
        context=64,
        batch_size=12,
        model=ModelConfig(
            vocab_size=256, max_positions=64, width=128, layers=4, heads=4, bias=False, unroll=4
        ),
        optimizer=OptimizerConfig(learning_rate=1e-3, warmup_steps=100, b2=0.99, weight_decay=0.1),
        evaluation=EvaluationConfig(every=500, batches=20, batch_size=60),
        checkpoint=CheckpointConfig(every=1000),
    )


if __name__ == "__main__":
    run_experiment(config)
