"""Using a trained run: generate, score, evaluate."""

from lmjax.inference.evaluate import Evaluation, evaluate
from lmjax.inference.generate import generate
from lmjax.inference.run import TrainedModel, load_model
from lmjax.inference.score import Score, score

__all__ = ["Evaluation", "Score", "TrainedModel", "evaluate", "generate", "load_model", "score"]
