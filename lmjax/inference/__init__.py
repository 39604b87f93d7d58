"""Using a trained run: generate, score, evaluate."""

from lmjax.inference.evaluate import Evaluation, evaluate
from lmjax.inference.finite import NonFiniteError
from lmjax.inference.generate import Stream, generate, stream
from lmjax.inference.run import TrainedModel, load_model
from lmjax.inference.score import Piece, Score, score

__all__ = [
    "Evaluation",
    "NonFiniteError",
    "Piece",
    "Score",
    "Stream",
    "TrainedModel",
    "evaluate",
    "generate",
    "load_model",
    "score",
    "stream",
]
