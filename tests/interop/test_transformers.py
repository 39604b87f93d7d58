"""What an imported model computes, next to Hugging Face's transformers, and what they load of ours.

Random weights, odd sizes: groups of three heads, a vocabulary of 1031.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from run_helpers import home, tiny
from torch_steps import adamw, as_tensors, assert_gradients, their_adamw

from lmjax.data import tokenized_corpus
from lmjax.inference import evaluate
from lmjax.inference.reading import Reader
from lmjax.inference.run import load_model
from lmjax.interop import export_run, import_run, pretrained
from lmjax.interop.architectures import ARCHITECTURES
from lmjax.interop.reading import Pretrained
from lmjax.model import ModelConfig, Params, apply, resolve_sites
from lmjax.parallel import sharding
from lmjax.precision.grammar import parse_policy
from lmjax.runs.resolved import resolve
from lmjax.runs.state import adopt, optimizer_of
from lmjax.train import train
from lmjax.train.step import train_step

__all__ = ["home"]

transformers = pytest.importorskip("transformers")
torch = pytest.importorskip("torch")

GPT2 = {"vocab_size": 1031, "n_positions": 96, "n_embd": 60, "n_layer": 3, "n_head": 6}
RATES = dict.fromkeys(("embd_pdrop", "attn_pdrop", "resid_pdrop"), 0.0)
LLAMA = {
    "vocab_size": 1031,
    "hidden_size": 60,
    "intermediate_size": 140,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 96,
}
LLAMA_3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2": ("GPT2Config", GPT2 | RATES),
    "gpt2-erf": ("GPT2Config", GPT2 | RATES | {"activation_function": "gelu", "n_inner": 100}),
    "llama": ("LlamaConfig", LLAMA | {"rope_parameters": LLAMA_3}),
    "llama-biased": (
        "LlamaConfig",
        LLAMA
        | {"attention_bias": True, "mlp_bias": True, "head_dim": 12}
        | {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}},
    ),
    "qwen2": ("Qwen2Config", LLAMA),
    "qwen3": ("Qwen3Config", LLAMA | {"head_dim": 16}),
    "mistral": ("MistralConfig", LLAMA | {"sliding_window": None}),
}
TOKENS = np.random.default_rng(0).integers(0, 1031, (2, 65))


class Both(NamedTuple):
    """A model of theirs, and the same as read here."""

    theirs: Any
    folder: Path
    found: Pretrained
    params: Params


@pytest.fixture(
    scope="module", params=[(k, tied) for k in KINDS for tied in (True, False)], ids=str
)
def both(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    kind, tied = request.param
    name, fields = KINDS[kind]
    torch.manual_seed(0)
    config = getattr(transformers, name)(**fields, tie_word_embeddings=tied)
    theirs = transformers.AutoModelForCausalLM.from_config(config).float().eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    folder = tmp_path_factory.mktemp("theirs") / kind
    theirs.save_pretrained(folder, max_shard_size="150KB" if tied else "5GB")
    with pretrained(folder) as found:
        mesh = sharding.make_mesh(sharding.MeshConfig(), jax.devices()[:1])
        yield Both(theirs, folder, found, found.parameters(mesh))


def logits_of(params: Params, model: ModelConfig, tokens: np.ndarray) -> jax.Array:
    sites = resolve_sites(model, parse_policy("f32"))
    return apply(params, jnp.asarray(tokens, jnp.int32), config=model, sites=sites)


def loss_of(params: Params, model: ModelConfig) -> jax.Array:
    scores = jax.nn.log_softmax(logits_of(params, model, TOKENS[:, :-1]))
    return -jnp.take_along_axis(scores, jnp.asarray(TOKENS[:, 1:, None]), -1).mean()


def their_loss(model: Any) -> Any:
    logits = model(torch.tensor(TOKENS[:, :-1])).logits
    return torch.nn.functional.cross_entropy(
        logits.reshape(-1, 1031), torch.tensor(TOKENS[:, 1:]).reshape(-1)
    )


def test_logits_are_theirs(both: Both):
    with torch.no_grad():
        theirs = both.theirs(torch.tensor(TOKENS[:, :-1])).logits.numpy()
    ours = jax.jit(logits_of, static_argnums=1)(both.params, both.found.model, TOKENS[:, :-1])
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=2e-5 * np.abs(theirs).max())


@pytest.mark.long
def test_gradients_and_a_step_of_adamw_are_theirs(both: Both, compile_fast: Any):
    """Of AdamW with a large epsilon.

    Adam divides by the root of squared gradients: where they are rounding errors, as those of the
    biases of keys, so are the steps, hence an epsilon above them.
    """
    ours = jax.jit(jax.grad(loss_of), static_argnums=1)(both.params, both.found.model)
    both.theirs.zero_grad()
    their_loss(both.theirs).backward()
    largest = assert_gradients(as_tensors(both.found, ours), both.theirs)
    named = dict(both.theirs.named_parameters())
    before = {name: p.detach().clone() for name, p in named.items()}
    eps = 1e-3 * largest
    their_adamw(named.values(), eps).step()
    phase = resolve(adamw(both.found.model, eps, rows=2, context=64)).at(0)
    mesh = sharding.make_mesh(sharding.MeshConfig(), jax.devices()[:1])
    state = adopt(jax.tree.map(jnp.copy, both.params), phase.param_sites, phase, mesh)
    batch = {"inputs": TOKENS[:, :-1].astype(np.int32), "targets": TOKENS[:, 1:].astype(np.int32)}
    stepped, _ = compile_fast(train_step(phase, mesh))(state, batch)
    for name, after in as_tensors(both.found, stepped.params).items():
        np.testing.assert_allclose(after, named[name].detach(), rtol=0, atol=1e-6, err_msg=name)
    with torch.no_grad():
        for name, parameter in named.items():
            parameter.copy_(before[name])


@pytest.mark.long
@pytest.mark.parametrize("eps", [1e-8, 1e-6])
def test_a_step_of_adamw_is_theirs_to_the_usual_eps_given_their_gradients(
    both: Both, eps: float, tmp_path: Path
):
    """Their gradients, read here as a model, so that no rounding of gradients decides."""
    both.theirs.zero_grad()
    their_loss(both.theirs).backward()
    copy = type(both.theirs)(both.theirs.config)
    with torch.no_grad():
        for own, other in zip(copy.parameters(), both.theirs.parameters(), strict=True):
            own.copy_(other.grad)
    copy.save_pretrained(tmp_path / "gradients")
    mesh = sharding.make_mesh(sharding.MeshConfig(), jax.devices()[:1])
    with pretrained(tmp_path / "gradients") as found:
        gradients = found.parameters(mesh)
        optimizer = optimizer_of(resolve(adamw(found.model, eps, rows=2, context=64)).at(0))
    updates, _ = optimizer.update(gradients, optimizer.init(both.params), both.params)
    ours = as_tensors(both.found, jax.tree.map(jnp.add, both.params, updates))

    with torch.no_grad():
        for own, other in zip(copy.parameters(), both.theirs.parameters(), strict=True):
            own.grad = own.clone()
            own.copy_(other)
    their_adamw(copy.parameters(), eps).step()
    for name, parameter in copy.named_parameters():
        np.testing.assert_allclose(ours[name], parameter.detach(), rtol=0, atol=1e-6, err_msg=name)


@pytest.mark.long
def test_a_run_continues_as_they_do_and_leaves_as_it_came(both: Both, tmp_path: Path):
    """64 greedy tokens; after the export, every tensor is what it was, bit for bit."""
    import_run(both.folder, tmp_path / "run")
    model = load_model(tmp_path / "run")
    ours = theirs = [int(token) for token in TOKENS[0, :9]]
    reader = Reader(model, len(ours))
    with torch.no_grad():
        for _ in range(64):
            ours = [*ours, int(np.argmax(reader.logits(ours)))]
            logits = both.theirs(torch.tensor([theirs])).logits
            theirs = [*theirs, int(logits[0, -1].argmax())]
    assert ours == theirs

    export_run(tmp_path / "run", tmp_path / "out", limit=200_000)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert type(again) is type(both.theirs)
    assert again.config.lmjax["precision"] == "p=f32,c=f32,o=f32"
    saved = again.state_dict()
    assert saved.keys() == both.theirs.state_dict().keys()
    for name, tensor in both.theirs.state_dict().items():
        assert torch.equal(saved[name], tensor), name
    assert again.config.to_dict().keys() >= both.theirs.config.to_dict().keys()


def test_every_architecture_is_compared():
    in_test_bert = {"bert"}
    assert {kind.partition("-")[0] for kind in KINDS} == set(ARCHITECTURES) - in_test_bert


@pytest.mark.long
@pytest.mark.parametrize("tokenizer", ["bytes", "bpe"])
def test_held_out_text_of_a_model_trained_here_has_the_same_loss(
    home: Path, tmp_path: Path, tokenizer: str
):
    """Windows are cut as `evaluate` cuts them; the exported tokenizer gives the same ids."""
    config = tiny(home, data={"tokenizer": tokenizer, "vocab_size": 300}, model={"vocab_size": 300})
    train(config, tmp_path / "run", progress=False)
    export_run(tmp_path / "run", tmp_path / "out")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    corpus = tokenized_corpus(config.data, window=17, progress=False)
    stream = np.asarray(corpus.validation, np.int64)
    nats = 0.0
    with torch.no_grad():
        for start in range(0, len(stream) - 1, 16):
            window = torch.tensor(stream[start : start + 17])
            logits = model(window[None, :-1]).logits[0].double()
            nats += float(torch.nn.functional.cross_entropy(logits, window[1:], reduction="sum"))
    theirs = nats / (len(stream) - 1)
    assert evaluate(load_model(tmp_path / "run")).eval_loss == pytest.approx(theirs, abs=1e-5)
    saved = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    text = "Wither\u00ed \u4f60\u597d! ab  c\n"
    own = corpus.tokenizer.encode(text).tolist()
    assert saved(text)["input_ids"] == own
    assert saved.decode(own) == text
