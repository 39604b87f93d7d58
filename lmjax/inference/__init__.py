"""Using a trained run: generate, score, compare, evaluate, embed."""

from lmjax.inference.embedding import sentence_embeddings
from lmjax.inference.evaluate import Evaluation, evaluate
from lmjax.inference.finite import NonFiniteError
from lmjax.inference.generate import (
    Continuation,
    Continuations,
    generate,
    generate_batch,
    stream,
    stream_batch,
)
from lmjax.inference.growing import Generation
from lmjax.inference.parity import Parity, parity
from lmjax.inference.run import TrainedModel, load_model
from lmjax.inference.sampling import Sampling
from lmjax.inference.score import Perplexity, Piece, Score, perplexity, score

__all__ = [
    "Continuation",
    "Continuations",
    "Evaluation",
    "Generation",
    "NonFiniteError",
    "Parity",
    "Perplexity",
    "Piece",
    "Sampling",
    "Score",
    "TrainedModel",
    "evaluate",
    "generate",
    "generate_batch",
    "load_model",
    "parity",
    "perplexity",
    "score",
    "sentence_embeddings",
    "stream",
    "stream_batch",
]
