"""GPT-2 small on English Wikipedia: the configuration of the paper, in bf16.

Command:   tfds build wiki40b/en --file_format=array_record
           python -m experiments.gpt2_124m
Hardware:  8 GPUs of 80 GB, or any number of accelerators whose count divides 480 rows
Time:      not measured here as a whole; a step of 32 rows takes 71 ms on one H200
           (docs/speed.md), at which 10 billion tokens take 6 hours, or 45 minutes on 8
Expected:  not measured here

Prepare the data first, because nothing is downloaded automatically: TFDS builds this dataset with
Apache Beam, where tensorflow and apache-beam are installed, into $TFDS_DATA_DIR. GPT-2's vocabulary
comes from the extra `lmjax[corpora]`. Batches of 480 sequences of 1024 tokens, AdamW with betas 0.9
and 0.95, weight decay 0.1 and a peak learning rate of 6e-4 are nanoGPT's settings for this size.
"""

from lmjax.cli import run_experiment
from lmjax.data import DataConfig
from lmjax.model import gpt2
from lmjax.optim.optimizer import OptimizerConfig
from lmjax.train import CheckpointConfig, Config, EvaluationConfig


def config() -> Config:
    """124,439,808 parameters; about 10 billion tokens."""
    return Config(
        precision="p=f32,c=bf16,o=f32",
        steps=20000,
        context=1024,
        batch_size=480,
        model=gpt2(unroll=12),  # faster than a loop, which copies what the backward pass reads
        data=DataConfig(dataset="tfds:wiki40b/en", tokenizer="gpt2", validation_fraction=0.005),
        optimizer=OptimizerConfig(
            learning_rate=6e-4, warmup_steps=700, final_fraction=0.1, b2=0.95, weight_decay=0.1
        ),
        evaluation=EvaluationConfig(every=1000, batches=20),
        checkpoint=CheckpointConfig(every=1000, keep=3),
    )


if __name__ == "__main__":
    run_experiment(config)
