"""A config refuses parts that do not fit, leaves nothing open once resolved, and survives JSON."""

from __future__ import annotations

import dataclasses
import json

import pytest

from lmjax.parallel.sharding import MeshConfig
from lmjax.precision.policy import PolicyError
from lmjax.runs.config import differences, from_json, to_json
from lmjax.runs.resolved import phase_of, resolve
from lmjax.train import Config


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": 0}, "steps is 0"),
        ({"seed": -1}, "seed is -1"),
        ({"context": 17}, "learns only 16 positions"),
        ({"batch_size": 6, "micro_batches": 4}, "cannot be cut into 4"),
        ({"log_every": 0}, "log_every is 0"),
        ({"deterministic_reductions": 3}, "power of two"),
        ({"deterministic_reductions": -8}, "power of two"),
        ({"deterministic_reductions": 8}, "batch_size / micro_batches is 4"),
        ({"deterministic_reductions": 4, "optimizer": {"name": "muon"}}, "muon multiplies"),
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
        ("p=f32,c=e4m3", "dynamic"),
        ("p=f32,c=e3m4", "dynamic"),
        ("p=f32,c=e8m3", "none"),
        ("mixed_bf16,g=e4m3", "dynamic"),
        ("mixed_bf16,g=e5m2", "dynamic"),
        ("mixed_bf16,w=e4m3,x=e4m3", "none"),
        ("fp8", "none"),
        ("mixed_bf16; blocks/0/mlp/up: c=f16", "dynamic"),
    ],
)
def test_loss_scaling_follows_the_policy_unless_told_otherwise(policy, kind, tiny):
    assert tiny(policy).resolved().loss_scale.kind == kind
    told = dataclasses.replace(tiny(policy).loss_scale, kind="static")
    assert tiny(policy, loss_scale=told).resolved().loss_scale.kind == "static"


def test_clamped_cotangents_count_as_an_overflow_where_a_lower_scale_would_help(tiny):
    for kind, cotangents in (
        ("auto", "fail"), ("dynamic", "fail"), ("predictive", "fail"), ("static", "clamp"),
        ("none", "clamp"),
    ):  # fmt: skip
        config = tiny("p=f32,c=e4m3")
        config = dataclasses.replace(
            config, loss_scale=dataclasses.replace(config.loss_scale, kind=kind)
        )
        for made in (config, config.resolved()):
            assert {site.cotangents for site in phase_of(made).sites.values()} == {cotangents}, kind
    assert {site.cotangents for site in phase_of(tiny("mixed_bf16")).sites.values()} == {"clamp"}


@pytest.mark.parametrize(
    ("policy", "kind"),
    [
        ("0: f32 | 9: mixed_bf16", "none"),
        ("0: f32 | 9: mixed_f16", "dynamic"),
        ("0: mixed_f16 | 9: f32", "dynamic"),
        ("0: f32 | 9: f32 | 19: mixed_bf16; blocks/0/mlp/up: c=f16", "dynamic"),
    ],
)
def test_loss_scaling_is_the_same_in_every_phase(policy, kind, tiny):
    config = tiny(policy)
    assert config.resolved().loss_scale.kind == kind
    for made in (config, config.resolved()):
        assert {phase.config.loss_scale.kind for phase in resolve(made).phases} == {kind}
    told = dataclasses.replace(config.loss_scale, kind="static")
    assert resolve(tiny(policy, loss_scale=told)).at(9).config.loss_scale.kind == "static"


def test_a_phase_is_the_config_with_the_policy_of_that_phase(tiny):
    run = resolve(tiny("0: mixed_bf16 | 9: f32; **/norm: c=bf16"))
    config = run.config
    first = dataclasses.replace(config, precision="p=f32,c=bf16,o=f32")
    second = dataclasses.replace(config, precision="p=f32,c=f32,o=f32; **/norm: c=bf16")
    assert [run.at(step).config for step in (0, 8, 9, 99)] == [first, first, second, second]
    assert [(phase.start, phase.config) for phase in run.phases] == [(0, first), (9, second)]
    assert second.resolved() == second
    # A state belongs to the phase of the step that made it, not of the one that reads it.
    assert [run.after(steps).config for steps in (0, 1, 9, 10)] == [first, first, first, second]


def test_without_phases_there_is_one(tiny):
    run = resolve(tiny("mixed_f16"))
    assert run.at(50) is run.after(50) is phase_of(run.phases[0]) is run.phases[0]
    assert run.phases == (phase_of(run.config),)
    assert run.phases[0].config is run.config


def test_a_phase_that_would_never_run_is_refused(tiny):
    assert tiny("0: f32 | 99: bf16", steps=100)
    with pytest.raises(ValueError, match=r"step 100 would never run.*100 steps.*--steps"):
        tiny("0: f32 | 100: bf16", steps=100)


def test_every_phase_must_fit_the_model(tiny):
    with pytest.raises(PolicyError, match="matches no site"):
        tiny("0: f32 | 9: f32; **/rope: c=bf16")
    with pytest.raises(PolicyError, match="differs between blocks"):
        tiny("0: f32 | 9: f32; blocks/0/mlp/up: p=bf16")


def test_resolved_leaves_nothing_open_and_is_idempotent(tiny):
    resolved = tiny("mixed_f16", micro_batches=2).resolved()
    assert resolved.precision == "p=f32,c=f16,o=f32"
    assert resolved.model.mlp_width == 64
    assert resolved.evaluation.batch_size == 2
    assert resolved.resolved() is resolved
    phased = tiny("0:mixed_f16|10:f32").resolved()
    assert phased.precision == "0: p=f32,c=f16,o=f32 | 10: p=f32,c=f32,o=f32"
    assert phased.resolved() == phased


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
