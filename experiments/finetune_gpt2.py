"""GPT-2 from a folder of Hugging Face, fine-tuned on your own text in f16 with loss scaling.

Command:   python -m experiments.finetune_gpt2 --init-from DIR
               --data.dataset text_files --data.files 'notes/*.txt'
Hardware:  2 CPU cores, or one GPU
Time:      not measured; a step is 0.8 TFLOP, 200 of them 150 TFLOP
Expected:  not measured: GPT-2's weights were not at hand

DIR is what `save_pretrained(DIR)` of a model and of its tokenizer wrote, or a clone of the model's
repository; docs/interop.md lists what it may hold. The run takes over model and tokenizer. Its
parameters are kept in f32 and everything else is computed in f16, whose range is too small for most
gradients: the loss scale lifts them. --precision tries another policy; without --data.files, the
text is Shakespeare.
"""

from lmjax.cli import run_experiment
from lmjax.data import DataConfig
from lmjax.model import gpt2
from lmjax.optim.loss_scale import LossScaleConfig
from lmjax.optim.optimizer import OptimizerConfig
from lmjax.train import CheckpointConfig, Config, EvaluationConfig


def config() -> Config:
    """GPT-2 small, 200 steps of 4 x 256 tokens; the rate of a fine-tuning, with a short warm-up."""
    return Config(
        precision="p=f32,c=f16,o=f32",
        steps=200,
        context=256,
        batch_size=4,
        init_from="gpt2",
        model=gpt2(dropout=0.1),
        data=DataConfig(tokenizer="gpt2"),
        optimizer=OptimizerConfig(learning_rate=5e-5, warmup_steps=20, weight_decay=0.01),
        loss_scale=LossScaleConfig(growth_interval=50),
        evaluation=EvaluationConfig(every=50, batches=20),
        checkpoint=CheckpointConfig(every=100),
    )


if __name__ == "__main__":
    run_experiment(config)
