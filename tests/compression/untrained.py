"""What tests of compression share: models with weights as if they were a run's, and verbs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from run_helpers import tiny

from lmjax.cli import verbs
from lmjax.data import tokenized_corpus
from lmjax.inference import TrainedModel
from lmjax.model import structure
from lmjax.train import phase_of


def untrained(home: Path, **changes: Any) -> TrainedModel:
    """A model whose weights have outliers."""
    config = tiny(home, "mixed_bf16", **changes)
    generator = np.random.default_rng(0)
    draw = lambda leaf: jnp.asarray(0.3 * generator.standard_t(4, leaf.shape), jnp.float32)
    params = jax.tree.map(draw, structure(config.model)[1])
    corpus = tokenized_corpus(config.data, window=17, progress=False)
    return TrainedModel(phase_of(config), params, 7, corpus.tokenizer)


def verb(*arguments: object) -> int:
    """The exit code of `python -m lmjax` with these arguments, in this process."""
    with pytest.raises(SystemExit) as ended:
        verbs.main([str(argument) for argument in arguments])
    code = ended.value.code
    return code if isinstance(code, int) else 0
