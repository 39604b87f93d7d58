"""A Llama of 1.2 billion parameters on English Wikipedia, sharded over all devices.

Command:   tfds build wiki40b/en --file_format=array_record
           python -m experiments.llama_1b
Hardware:  8 GPUs of 80 GB or a TPU slice; --mesh.fsdp and --mesh.tensor divide the model
Time:      not measured here; 21 billion tokens at 6 x 1.24B FLOP each are 1.6e20 FLOP plus
           attention, about a day on 8 H100 at 35% of 790 TFLOP/s each
Expected:  not measured here

The shape is that of Llama 3.2 1B: 16 layers, width 2048, 32 query and 8 key/value heads, SwiGLU of
8192, RoPE with base 500000, tied embeddings of 128256 rows. Text is tokenized with GPT-2's
vocabulary, from the extra `lmjax[corpora]`; it fills 50257 of those rows. TFDS builds the dataset
with Apache Beam, where tensorflow and apache-beam are installed.
Parameters and optimizer state are divided over all devices (FSDP).
"""

from lmjax.cli import run_experiment
from lmjax.data import DataConfig
from lmjax.model import llama_1b
from lmjax.optim.optimizer import OptimizerConfig
from lmjax.parallel.sharding import MeshConfig
from lmjax.train import CheckpointConfig, Config, EvaluationConfig


def config() -> Config:
    """1,235,814,400 parameters; about 21 billion tokens."""
    return Config(
        precision="p=f32,c=bf16,o=f32",
        steps=20000,
        context=2048,
        batch_size=512,
        micro_batches=4,
        model=llama_1b(z_loss=1e-4, remat="full"),
        data=DataConfig(dataset="tfds:wiki40b/en", tokenizer="gpt2", validation_fraction=0.005),
        optimizer=OptimizerConfig(
            learning_rate=3e-4,
            schedule="wsd",
            warmup_steps=1000,
            final_fraction=0.0,
            b2=0.95,
            weight_decay=0.1,
        ),
        evaluation=EvaluationConfig(every=1000, batches=10),
        checkpoint=CheckpointConfig(every=500, keep=3),
        mesh=MeshConfig(data=1, fsdp=-1),
    )


if __name__ == "__main__":
    run_experiment(config)
