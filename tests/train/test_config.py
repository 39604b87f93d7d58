"""A config refuses parts that do not fit, leaves nothing open once resolved, and survives JSON."""

from __future__ import annotations

import dataclasses
import json

import pytest

from lmjax.precision.policy import PolicyError
from lmjax.sharding import MeshConfig
from lmjax.train import Config
from lmjax.train.config import differences, from_json, to_json


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": 0}, "steps is 0"),
        ({"seed": -1}, "seed is -1"),
        ({"context": 17}, "learns only 16 positions"),
        ({"batch_size": 6, "micro_batches": 4}, "cannot be cut into 4"),
        ({"log_every": 0}, "log_every is 0"),
    ],
)
def test_parts_that_do_not_fit_are_refused(changes, message, tiny):
    with pytest.raises(ValueError, match=message):
        tiny(**changes)


def test_a_policy_that_does_not_fit_the_model_is_refused(tiny):
    with pytest.raises(PolicyError, match="matches no site"):
        tiny("f32; **/rope: c=bf16")
    assert tiny("f32; **/rope: c=bf16", "llama")


@pytest.mark.parametrize(
    ("policy", "kind"),
    [
        ("f32", "none"),
        ("mixed_bf16", "none"),
        ("pure_bf16", "none"),
        ("mixed_f16", "dynamic"),
        ("pure_f16", "dynamic"),
        ("p=f16,c=f32", "dynamic"),
        ("p=f32,c=f32,o=f16", "none"),
        ("mixed_bf16; blocks/0/mlp/up: c=f16", "dynamic"),
    ],
)
def test_loss_scaling_follows_the_policy_unless_told_otherwise(policy, kind, tiny):
    assert tiny(policy).resolved().loss_scale.kind == kind
    told = dataclasses.replace(tiny(policy).loss_scale, kind="static")
    assert tiny(policy, loss_scale=told).resolved().loss_scale.kind == "static"


def test_resolved_leaves_nothing_open_and_is_idempotent(tiny):
    resolved = tiny("mixed_f16", micro_batches=2).resolved()
    assert resolved.precision == "p=f32,c=f16,o=f32"
    assert resolved.model.mlp_width == 64
    assert resolved.evaluation.batch_size == 2
    assert resolved.resolved() == resolved


def test_survives_json(tiny):
    config = tiny("mixed_bf16; **/softmax: c=bf16", "llama", optimizer={"no_decay": ("embed/**",)})
    assert from_json(json.loads(json.dumps(to_json(config)))) == config
    assert from_json(json.loads(json.dumps(to_json(config.resolved())))) == config.resolved()


def test_json_of_another_version_is_refused_by_name():
    values = to_json(Config())
    values["model"]["experts"] = 8
    with pytest.raises(ValueError, match=r"unknown config field model\.experts"):
        from_json(values)


def test_json_with_impossible_values_is_refused():
    values = to_json(Config())
    values["optimizer"]["b1"] = 2.0
    with pytest.raises(ValueError, match=r"optimizer\.b1"):
        from_json(values)


def test_differences_name_fields_and_ignore_where_a_run_happens(tiny):
    old = tiny()
    moved = dataclasses.replace(
        old,
        mesh=MeshConfig(data=1, fsdp=-1),
        data=dataclasses.replace(old.data, cache_dir="elsewhere"),
    )
    assert differences(old, moved) == {}
    new = tiny("f16", seed=3, optimizer={"learning_rate": 0.5})
    assert differences(old, new) == {
        "precision": ("f32", "f16"),
        "seed": (0, 3),
        "optimizer.learning_rate": (0.01, 0.5),
    }
