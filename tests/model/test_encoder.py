"""The encoder: what it sees, what it is asked, and what it learns."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmjax.data import ByteTokenizer, DataConfig
from lmjax.errors import InputError
from lmjax.inference.run import TrainedModel, refuse_encoder
from lmjax.model import ANYWHERE, ModelConfig, assembled, objective_of, structure, weights
from lmjax.model.sites import QUIET
from lmjax.optim.optimizer import OptimizerConfig
from lmjax.parallel import sharding
from lmjax.precision import paths
from lmjax.runs.resolved import phase_of
from lmjax.train import Config
from lmjax.train.start import refuse_running_text
from lmjax.train.step import evaluation, make_scaled_loss, train_step

SHAPE: dict[str, Any] = {
    "family": "encoder", "vocab_size": 16, "max_positions": 8, "width": 16, "layers": 2, "heads": 2,
    "activation": "gelu_erf", "token_types": 2,
}  # fmt: skip


def encoder(precision: str = "f32", **model: Any) -> Config:
    """A run of a small one."""
    settings = OptimizerConfig(learning_rate=2e-2, warmup_steps=5)
    return Config(
        precision=precision, steps=100, context=8, batch_size=12, optimizer=settings,
        model=ModelConfig(**SHAPE | model),
    ).resolved()  # fmt: skip


def texts() -> dict[str, np.ndarray]:
    """Texts whose class is that of their second token, padded."""
    generator = np.random.default_rng(0)
    inputs = generator.integers(0, 15, (12, 8)).astype(np.int32)
    lengths = generator.integers(2, 8, 12).astype(np.int32)
    return {"inputs": inputs, "lengths": lengths, "classes": (inputs[:, 1] % 3).astype(np.int32)}


@pytest.mark.parametrize("precision", ["f16", "f16; **/softmax: c=f16"], ids=["blocks", "whole"])
def test_a_row_of_padding_alone_gives_no_nan(precision, draw_params, compile_fast):
    """Loss and every gradient are finite, and no other row feels it."""
    config = encoder(precision, classes=3)
    phase = phase_of(config)
    params, batch = draw_params(phase, 0.3), texts()
    loss = make_scaled_loss(phase, sharding.make_mesh(config.mesh, jax.devices()[:1]))
    key, scale = jax.random.key(0), jnp.ones(())
    run = compile_fast(
        lambda p, b: (
            jax.grad(loss, has_aux=True)(p, b, key, scale),
            assembled(p, config.model).trunk(
                b, sites=phase.sites, context=QUIET, cotangent_scales=None,
                constrain=ANYWHERE,
            ),
        )
    )  # fmt: skip
    (_, _), whole = run(params, batch)
    empty = batch | {"lengths": np.where(np.arange(12) == 3, 0, batch["lengths"]).astype(np.int32)}
    (gradients, value), found = run(params, empty)
    assert np.isfinite(value)
    assert all(
        np.isfinite(np.asarray(leaf, np.float32)).all() for leaf in jax.tree.leaves(gradients)
    )
    assert np.isfinite(np.asarray(found, np.float32)).all()
    others = np.arange(12) != 3
    assert (np.asarray(found)[others] == np.asarray(whole)[others]).all()


def test_masks_are_those_of_bert_and_follow_from_the_key():
    config = ModelConfig(**SHAPE | {"vocab_size": 1000, "max_positions": 512, "mask_token": 7})
    tokens = np.random.default_rng(0).integers(10, 1000, (64, 512)).astype(np.int32)
    posed = jax.jit(objective_of(config).posed)
    found = {k: np.asarray(v) for k, v in posed({"inputs": tokens}, jax.random.key(1)).items()}
    chosen = found["chosen"]
    assert chosen.shape == (64, round(0.15 * 512))
    assert all(len(set(row)) == row.size for row in chosen)
    original = np.take_along_axis(tokens, chosen, 1)
    assert (found["targets"] == original).all()
    shown = np.take_along_axis(found["inputs"], chosen, 1)
    shares = [(shown == 7).mean(), ((shown != 7) & (shown != original)).mean()]
    assert shares == pytest.approx([0.8, 0.1], abs=0.02)
    untouched = np.ones_like(tokens, bool)
    np.put_along_axis(untouched, chosen, False, 1)
    assert (found["inputs"] == tokens)[untouched].all()
    again, other = (posed({"inputs": tokens}, jax.random.key(n)) for n in (1, 2))
    assert (again["inputs"] == found["inputs"]).all()
    assert (other["chosen"] != chosen).any()


def test_held_out_text_has_the_same_masks_in_any_batch():
    config = ModelConfig(**SHAPE | {"max_positions": 64, "mask_rate": 0.25})
    tokens = np.random.default_rng(0).integers(0, 15, (4, 64)).astype(np.int32)
    weights = (np.arange(64) < np.array([[64], [10], [0], [64]])).astype(np.float32)
    posed = jax.jit(objective_of(config).posed, static_argnums=1)
    whole = posed({"inputs": tokens, "weights": weights}, None)
    part = posed({"inputs": tokens[1:2], "weights": weights[1:2]}, None)
    assert (whole["inputs"][1:2] == part["inputs"]).all()
    assert whole["weights"].sum(1).tolist() == [16, 2, 0, 16]
    assert (np.asarray(whole["chosen"])[1, :2] < 10).all(), "padding is not predicted"


@pytest.mark.long
def test_it_learns_masked_tokens_in_f16(draw_state, compile_fast):
    """Each token of a row is that of any other position."""
    config = encoder("mixed_f16", mask_rate=0.2)
    phase, mesh = phase_of(config), sharding.make_mesh(config.mesh, jax.devices()[:1])
    step, state = compile_fast(train_step(phase, mesh)), draw_state(config)
    rows = np.repeat(np.arange(12, dtype=np.int32)[:, None], 8, axis=1)
    batch = {"inputs": rows, "targets": rows}
    losses = []
    for _ in range(100):
        state, metrics = step(state, batch)
        losses.append(float(metrics["loss"]))
    assert losses[0] > 2.5
    assert np.mean(losses[-5:]) < 1.2
    evaluate = compile_fast(evaluation(phase, mesh))
    nats, count = evaluate(state.params, batch | {"weights": np.ones((12, 8), np.float32)})
    assert count == 24
    assert nats / count < 1.2


def test_settings_of_one_family_are_refused_in_the_other():
    with pytest.raises(ValueError, match="token_types is 2, which a decoder does not have"):
        ModelConfig(**SHAPE | {"family": "decoder"})
    with pytest.raises(ValueError, match="mask_token is 16, but model"):
        ModelConfig(**SHAPE | {"mask_token": 16})


def test_what_cannot_be_trained_or_read_is_refused():
    tokenizer = ByteTokenizer()
    with pytest.raises(InputError, match="needs classes, which dataset shakespeare does not have"):
        refuse_running_text(encoder(classes=2), tokenizer)
    full = encoder(vocab_size=tokenizer.vocab_size)
    with pytest.raises(InputError, match="none is left for masked ones"):
        refuse_running_text(full, tokenizer)
    refuse_running_text(encoder(vocab_size=tokenizer.vocab_size + 1), tokenizer)
    masked = dataclasses.replace(encoder(), data=DataConfig(document_mask=True))
    with pytest.raises(InputError, match="an encoder reads whole windows"):
        refuse_running_text(masked, tokenizer)
    model = TrainedModel(phase_of(full), {}, 0, tokenizer)
    with pytest.raises(InputError, match="does not predict the next token"):
        refuse_encoder(model)


def test_a_tied_head_is_a_weight_and_one_of_classes_is_not():
    for classes, table in ((0, True), (3, False)):
        phase = phase_of(encoder(classes=classes))
        found = weights(phase.config.model, phase.sites)
        assert ("embed/table" in found) == table
        assert ("head/kernel" in paths.flatten(structure(phase.config.model)[1])) != table
