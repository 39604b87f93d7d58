"""BERT as read here, next to Hugging Face's transformers: random weights, odd sizes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from run_helpers import home

from lmjax import strict_json
from lmjax.errors import InputError
from lmjax.interop import export_run, import_run, pretrained
from lmjax.model import ANYWHERE, assembled, resolve_sites
from lmjax.model.sites import QUIET
from lmjax.parallel import sharding
from lmjax.precision.grammar import parse_policy

__all__ = ["home"]

transformers = pytest.importorskip("transformers")
torch = pytest.importorskip("torch")

SIZES = {
    "vocab_size": 1031, "max_position_embeddings": 48, "hidden_size": 60, "num_hidden_layers": 3,
    "num_attention_heads": 6, "intermediate_size": 100, "num_labels": 3,
}  # fmt: skip
TOKENS = np.random.default_rng(0).integers(0, 1031, (3, 40)).astype(np.int32)
LENGTHS = np.array([40, 17, 1], np.int32)
TYPES = (np.arange(40) >= np.array([[20], [9], [0]])).astype(np.int32)


@pytest.mark.parametrize(
    ("name", "tied"),
    [("MaskedLM", True), ("MaskedLM", False), ("SequenceClassification", True)],
    ids=str,
)
def test_logits_of_padded_texts_are_theirs_and_it_leaves_as_it_came(
    name: str, tied: bool, tmp_path: Path, home: Path
):
    torch.manual_seed(0)
    config = transformers.BertConfig(**SIZES, tie_word_embeddings=tied)
    theirs = getattr(transformers, f"BertFor{name}")(config).float().eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
        seen = np.arange(40) < LENGTHS[:, None]
        given: dict[str, Any] = {
            "input_ids": TOKENS,
            "attention_mask": seen,
            "token_type_ids": TYPES,
        }
        given = {k: torch.tensor(v.astype(np.int64)) for k, v in given.items()}
        wanted = theirs(**given).logits.numpy()
    theirs.save_pretrained(tmp_path / "theirs")
    with pretrained(tmp_path / "theirs") as found:
        params = found.parameters(sharding.make_mesh(sharding.MeshConfig(), jax.devices()[:1]))
    sites = resolve_sites(found.model, parse_policy("f32"))

    def logits(params: Any, batch: Any) -> jax.Array:
        model = assembled(params, found.model)
        x = model.trunk(
            batch, sites=sites, context=QUIET, cotangent_scales=None, constrain=ANYWHERE
        )
        return model.logits(x, sites, QUIET)

    batch = {"inputs": TOKENS, "lengths": LENGTHS, "token_types": TYPES}
    ours = np.asarray(jax.jit(logits)(params, jax.tree.map(jnp.asarray, batch)))
    if name == "MaskedLM":
        ours, wanted = ours[seen], wanted[seen]
    np.testing.assert_allclose(
        ours.reshape(wanted.shape), wanted, rtol=0, atol=2e-5 * np.abs(wanted).max()
    )

    import_run(tmp_path / "theirs", tmp_path / "run")
    export_run(tmp_path / "run", tmp_path / "ours")
    again = getattr(transformers, f"BertFor{name}").from_pretrained(tmp_path / "ours").eval()
    with torch.no_grad():
        assert (again(**given).logits == theirs(**given).logits).all()


def test_other_berts_are_refused(tmp_path: Path):
    values = {"model_type": "bert", "architectures": ["BertModel"], "vocab_size": 8}
    values |= {"hidden_size": 4, "num_hidden_layers": 1, "num_attention_heads": 1}
    values |= {"intermediate_size": 4, "position_embedding_type": "relative_key"}
    (tmp_path / "config.json").write_text(strict_json.dumps(values))
    refused = pytest.raises(InputError, match=r"relative_key.*BertForSequenceClassification")
    with refused, pretrained(tmp_path):
        pass
