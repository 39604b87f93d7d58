"""Another family of models, as one would write it: an encoder that classifies texts.

Its norms stand after the branches, its attention sees both ways and no padding, and it is trained
for something else than the next token. It is a class and a row of `FAMILIES`, and nothing that
derives from a model (policy, state, train step, evaluation) is told of it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmjax.model import ModelConfig, families, layout, resolve_sites, structure, token_losses
from lmjax.model.assembly import Assembly, Batch, Objective
from lmjax.model.block import Block
from lmjax.model.head import Backward
from lmjax.model.layers import ANYWHERE, Constrain, Dense, Embedding
from lmjax.model.layout import block_places, stack_of
from lmjax.model.mask import Bidirectional, Padded
from lmjax.model.parametrisation import Parametrisation, parametrisation_of
from lmjax.model.sites import QUIET, Context, Sites, within
from lmjax.model.stack import scan_blocks, stacked
from lmjax.optim.optimizer import OptimizerConfig
from lmjax.parallel import sharding
from lmjax.precision import parse_policy
from lmjax.precision.sites import Layout, Place, Source, site_at
from lmjax.runs.resolved import phase_of
from lmjax.train import Config, abstract_state
from lmjax.train.step import evaluation, train_step

SHAPE: dict[str, Any] = {
    "vocab_size": 16, "max_positions": 8, "width": 16, "layers": 2, "heads": 2
}  # fmt: skip
CLASSES = 3


@dataclass(frozen=True)
class EncoderConfig(ModelConfig):
    family: Literal["texts"] = "texts"  # type: ignore[assignment]


class Encoder(Assembly):
    def __init__(self, key: jax.Array, config: ModelConfig):
        self.config, self.scales = config, parametrisation_of(config)
        keys = jax.random.split(key, 4)
        width, std = config.width, self.scales.weight_std
        table = lambda key, rows, name: Embedding(
            key, rows, width, axes=(name, "embed"), std=std, scales=self.scales
        )
        self.embed = table(keys[0], config.vocab_size, "vocab")
        self.positions = table(keys[1], config.max_positions, "positions")
        block = lambda key: Block(key, config, norm_position="after")
        self.blocks = stacked(block, jax.random.split(keys[2], config.layers))
        self.head = Dense(
            keys[3], width, CLASSES, axes=("embed", "classes"), std=std, bias=True,
            scales=self.scales,
        )  # fmt: skip

    @staticmethod
    def layout(config: ModelConfig) -> Layout:
        place = lambda path, source=None: Place(path, site_at(path), None, source)
        before = [place(name, Source(name, "params")) for name in ("embed", "positions")]
        after = place("head"), place("loss", Source("head"))
        return Layout((*before, *block_places(config), *after), stack_of(config))

    @staticmethod
    def objective(config: ModelConfig) -> Classification:
        return Classification(parametrisation_of(config))

    def trunk(
        self,
        batch: Batch,
        *,
        sites: Sites,
        context: Context,
        cotangent_scales: jax.Array | None,
        constrain: Constrain,
    ) -> jax.Array:
        positions = jnp.arange(batch["inputs"].shape[1], dtype=jnp.int32)
        x = self.embed(batch["inputs"], sites["embed"], context.at("embed"))
        rows = self.positions(positions, sites["positions"], context.at("positions"))
        with sites["embed"].scope:
            x = self.scales.sum_of_embeddings(x, sites["embed"].to_output(rows))
        return scan_blocks(
            self.blocks,
            x,
            config=self.config,
            sites=sites,
            context=context.at("blocks"),
            mask=Padded(batch["lengths"]),
            positions=positions,
            cotangent_scales=cotangent_scales,
            constrain=constrain,
        )

    def logits(self, x: jax.Array, sites: Sites, context: Context) -> jax.Array:
        return self.head(x[:, :1], sites["head"], context.at("head"))


@dataclass(frozen=True)
class Classification(Objective):
    """Cross entropy of the class of each text, read at its first token."""

    scales: Parametrisation

    def loss(
        self,
        x: jax.Array,
        model: Assembly,
        batch: Batch,
        sites: Sites,
        context: Context,
        backward: Backward,
    ) -> jax.Array:
        logits, probe = model.logits(x, sites, context), context.at("loss").probe
        weight = backward.multiplier / batch["classes"].size
        losses = token_losses(
            logits, batch["classes"], sites["loss"], probe, scales=self.scales, weight=weight
        )
        return jnp.mean(losses.cross_entropy)

    def evaluate(
        self,
        x: jax.Array,
        model: Assembly,
        batch: Batch,
        sites: Sites,
        context: Context,
        constrain: Constrain = ANYWHERE,
    ) -> tuple[jax.Array, jax.Array]:
        losses = token_losses(model.logits(x, sites, context), batch["classes"], sites["loss"])
        return jnp.sum(losses.cross_entropy), jnp.sum(batch["weights"])


@pytest.fixture
def encoder(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Config]:
    """`encoder(**model)`: the config of a run of one."""
    monkeypatch.setitem(families.FAMILIES, "texts", Encoder)

    def config(**model: Any) -> Config:
        settings = OptimizerConfig(learning_rate=2e-2, warmup_steps=5)
        model = EncoderConfig(**SHAPE | model)
        options = {"context": 8, "batch_size": 12, "precision": "mixed_bf16"}
        return Config(steps=60, model=model, optimizer=settings, **options).resolved()

    return config


def texts() -> dict[str, np.ndarray]:
    """Texts whose class is that of their last token before the padding."""
    generator = np.random.default_rng(0)
    inputs = generator.integers(0, 16, (12, 8), np.int32)
    lengths = generator.integers(2, 8, 12).astype(np.int32)
    classes = inputs[np.arange(12), lengths - 1] % CLASSES
    return {"inputs": inputs, "lengths": lengths, "classes": classes[:, None]}


def test_a_family_is_a_class_and_a_row(encoder, draw_state, compile_fast):
    config = encoder()
    assert "norm" not in layout(config.model).paths, "no norm but those of the blocks"
    axes = structure(config.model)[2]
    assert axes["blocks"]["attention"]["norm"]["scale"] == ("layers", "norm")
    mesh = sharding.make_mesh(config.mesh, jax.devices()[:1])
    state, batch = draw_state(config), texts()
    step = compile_fast(train_step(phase_of(config), mesh))
    losses = []
    for _ in range(60):
        state, metrics = step(state, batch)
        losses.append(float(metrics["loss"]))
    assert losses[0] > 0.9
    assert losses[-1] < 0.5 * losses[0]

    evaluate = compile_fast(evaluation(phase_of(config), mesh))
    weights = {"weights": np.ones((12, 1), np.float32)}
    nats, count = evaluate(state.params, batch | weights)
    assert count == 12
    padded = np.arange(8) >= batch["lengths"][:, None]
    other = {"inputs": np.where(padded, 5, batch["inputs"]).astype(np.int32)}
    assert evaluate(state.params, batch | weights | other)[0] == nats, "padding is not seen"
    shorter = {"lengths": np.maximum(batch["lengths"] - 1, 1)}
    assert evaluate(state.params, batch | weights | shorter)[0] != nats, "later tokens are"


def test_it_takes_the_parametrisation_of_its_config(encoder):
    """Traced on a mesh, with telemetry, which asks for every site."""
    config = encoder(parametrisation="unit")
    mesh = sharding.abstract_mesh(sharding.MeshConfig(data=2), 2)
    state = abstract_state(config, mesh)
    out, metrics = jax.eval_shape(
        train_step(phase_of(config), mesh, telemetry=True), state, texts()
    )
    assert jax.tree.structure(out) == jax.tree.structure(state)
    assert {"head/g", "blocks/attention/norm/dx"} <= metrics["telemetry"].keys()


def test_norms_after_the_branches_are_those_of_the_first_transformer(compile_fast):
    """Against numpy in f64: norm(x + f(x)), twice."""
    config = ModelConfig(**SHAPE | {"heads": 1})
    sites = within(resolve_sites(config, parse_policy("f32")), "blocks/0")
    block = Block(jax.random.key(0), config, norm_position="after")
    generator = np.random.default_rng(0)
    for norm in (block.attention.norm, block.mlp.norm):
        norm.scale[...] = jnp.asarray(generator.normal(1, 0.3, 16), jnp.float32)
    x = generator.normal(3, 2, (2, 5, 16)).astype(np.float32)
    found = compile_fast(lambda x: block(x, sites, None, QUIET, Bidirectional())[0])(x)

    value = lambda leaf: np.asarray(leaf[...], np.float64)
    dense = lambda layer, x: x @ value(layer.kernel)

    def norm(layer: Any, x: np.ndarray) -> np.ndarray:
        centred = x - x.mean(-1, keepdims=True)
        return centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5) * value(layer.scale)

    def attention(part: Any, x: np.ndarray) -> np.ndarray:
        q, k, v = (dense(layer, x) for layer in (part.query, part.key, part.value))
        weights = np.exp(q @ k.swapaxes(1, 2) / 4)
        return dense(part.out, weights / weights.sum(-1, keepdims=True) @ v)

    def mlp(part: Any, x: np.ndarray) -> np.ndarray:
        y = dense(part.up, x)
        y = 0.5 * y * (1 + np.tanh(np.sqrt(2 / np.pi) * (y + 0.044715 * y**3)))
        return dense(part.down, y)

    y = np.asarray(x, np.float64)
    y = norm(block.attention.norm, y + attention(block.attention, y))
    y = norm(block.mlp.norm, y + mlp(block.mlp, y))
    np.testing.assert_allclose(found, y, atol=2e-5)


def test_masks_that_see_both_ways():
    queries, keys = jnp.arange(2), jnp.arange(3)
    assert np.asarray(Bidirectional().visible(queries, keys)).tolist() == [[True] * 3] * 2
    seen = np.asarray(Padded(jnp.asarray([1, 3])).visible(queries, keys))
    assert seen.shape == (2, 1, 1, 2, 3)
    assert seen[:, 0, 0].tolist() == [[[True, False, False]] * 2, [[True] * 3] * 2]
