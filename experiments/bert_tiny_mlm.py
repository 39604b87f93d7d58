"""A small BERT, pretrained from scratch on Shakespeare by predicting masked tokens.

Command:   python -m experiments.bert_tiny_mlm
Hardware:  2 CPU cores
Time:      not measured to the end; the first 60 steps take 87 s of training on a busy machine
Expected:  not measured to the end; about 5.8 nats per masked token after `--steps 60`

Of each window of 128 tokens 19 are chosen, 15%; of these 80% are masked, 10% replaced and 10% left
as they are (Devlin et al. 2019). Masks follow from the key of the step, and on held-out text from
the text, so every policy is evaluated on the same ones. The last row of the vocabulary, 1024,
stands for a masked token. Choose formats with --precision, also by layer.
"""

from lmjax.cli import run_experiment
from lmjax.data import DataConfig
from lmjax.model import ModelConfig
from lmjax.optim.optimizer import OptimizerConfig
from lmjax.train import CheckpointConfig, Config, EvaluationConfig


def config() -> Config:
    """Four blocks of width 128, a context of 128 tokens, in bf16."""
    return Config(
        precision="mixed_bf16",
        steps=1500,
        context=128,
        batch_size=32,
        model=ModelConfig(
            family="encoder",
            vocab_size=1025,
            max_positions=128,
            width=128,
            layers=4,
            heads=4,
            norm_epsilon=1e-12,
            activation="gelu_erf",
            unroll=4,
        ),
        data=DataConfig(dataset="shakespeare", tokenizer="bpe", vocab_size=1024),
        optimizer=OptimizerConfig(learning_rate=1e-3, warmup_steps=100),
        evaluation=EvaluationConfig(every=500),
        checkpoint=CheckpointConfig(every=500),
    )


if __name__ == "__main__":
    run_experiment(config)
