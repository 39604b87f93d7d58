"""Using a trained run: generate, score, evaluate."""

from lmjax.inference.evaluate import Evaluation, evaluate
from lmjax.inference.finite import NonFiniteError
from lmjax.inference.generate import Continuation, generate, stream
from lmjax.inference.run import TrainedModel, load_model
from lmjax.inference.score import Piece, Score, score

__all__ = [
    "Continuation",
    "Evaluation",
    "NonFiniteError",
    "Piece",
    "Score",
    "TrainedModel",
    "evaluate",
    "generate",
    "load_model",
    "score",
    "stream",
]
