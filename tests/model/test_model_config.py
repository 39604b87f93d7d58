"""Models that cannot be built are refused with the field that is wrong and a way out."""

from __future__ import annotations

import dataclasses

import pytest

from lmjax.model import ModelConfig


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"heads": 3}, "choose heads among 1, 2, 4"),
        ({"heads": 4, "kv_heads": 3}, "choose kv-heads among 1, 2, 4"),
        ({"width": 12, "heads": 4, "positions": "rope"}, "even"),
        ({"layers": 0}, "model.layers"),
        ({"vocab_size": 0}, "model.vocab_size"),
        ({"unroll": 0}, "model.unroll"),
        ({"dropout": 1.0}, "model.dropout"),
        ({"dropout": -0.1}, "model.dropout"),
        ({"z_loss": -1.0}, "model.z_loss"),
        ({"init_std": -1.0}, "model.init_std"),
        ({"kv_heads": -1}, "model.kv_heads"),
        ({"mlp_width": -8}, "model.mlp_width"),
        ({"head_width": -8}, "model.head_width"),
    ],
)
def test_impossible_models_are_refused(changes: dict, message: str):
    with pytest.raises(ValueError, match=message):
        ModelConfig(**changes)


def test_derived_fields_follow_their_sources():
    config = ModelConfig(width=32, heads=4)
    assert (config.head_size, config.kv_head_count, config.mlp_size) == (8, 4, 128)
    wider = dataclasses.replace(config, width=64)
    assert (wider.head_size, wider.mlp_size) == (16, 256)


def test_resolved_writes_them_out_and_is_idempotent():
    resolved = ModelConfig(width=32, heads=4).resolved()
    assert (resolved.head_width, resolved.kv_heads, resolved.mlp_width) == (8, 4, 128)
    assert resolved.resolved() == resolved


def test_a_head_may_have_a_width_of_its_own():
    assert ModelConfig(width=30, heads=4, head_width=8).head_size == 8
