"""What an ablation may be, what its cells are called, and what their files say."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from run_helpers import home

from lmjax.ablation import grid
from lmjax.ablation.grid import Ablation
from lmjax.ablation.keys import cell_key
from lmjax.data import tokenized_corpus, train_iterator
from lmjax.optim.optimizer import OptimizerConfig
from lmjax.parallel import sharding
from lmjax.precision import exact, paths
from lmjax.runs import config as run_config
from lmjax.train import Config, InputError, create_state

__all__ = ["home"]

BASE = Config(precision="f32", steps=100, optimizer=OptimizerConfig(learning_rate=1e-3))
POLICIES = ("f32", "mixed_bf16", "mixed_f16")


def ablation(**changes: Any) -> Ablation:
    """Three policies with two seeds."""
    arms = {policy: dataclasses.replace(BASE, precision=policy) for policy in POLICIES}
    values = {
        "name": "policies",
        "question": "Does it matter?",
        "base": BASE,
        "arms": arms,
        "varies": ("precision",),
        "control": "f32",
        "seeds": (0, 1),
    }
    return Ablation(**values | changes)


def with_rate(config: Config, rate: float) -> Config:
    """The config with another learning rate."""
    optimizer = dataclasses.replace(config.optimizer, learning_rate=rate)
    return dataclasses.replace(config, optimizer=optimizer)


# --- Differences ---


def test_differences_are_those_of_resolved_configs_and_say_what_follows() -> None:
    precision, kind = grid.arm_differences(ablation())
    assert precision == (
        "precision",
        {
            "f32": "p=f32,c=f32,o=f32",
            "mixed_bf16": "p=f32,c=bf16,o=f32",
            "mixed_f16": "p=f32,c=f16,o=f32",
        },
        False,
    )
    # It is implicit: a policy with f16 brings its loss scale along.
    kinds = {"f32": "none", "mixed_bf16": "none", "mixed_f16": "dynamic"}
    assert kind == ("loss_scale.kind", kinds, True)


def test_another_spelling_or_seed_is_not_a_difference() -> None:
    same = dataclasses.replace(BASE, precision="p=float32,c=float32,o=float32", seed=7)
    assert grid.arm_differences(ablation(arms={"f32": BASE, "long": same}, varies=())) == []


def test_more_than_the_named_fields_is_refused() -> None:
    arms = {"f32": BASE, "fast": with_rate(dataclasses.replace(BASE, precision="bf16"), 2e-3)}
    words = r"arm fast .*\(optimizer.learning_rate is 0.001 there, 0.002 here\); name these fields"
    with pytest.raises(ValueError, match=words):
        ablation(arms=arms)
    ablation(arms=arms, varies=("precision", "optimizer.learning_rate"))
    ablation(arms=arms, varies=("precision", "optimizer"))


def test_a_derived_field_that_somebody_sets_must_be_named() -> None:
    scale = dataclasses.replace(BASE.loss_scale, kind="dynamic")
    arms = {"f32": BASE, "scaled": dataclasses.replace(BASE, loss_scale=scale)}
    with pytest.raises(ValueError, match=r"loss_scale\.kind is 'none' there, 'dynamic' here"):
        ablation(arms=arms)
    ablation(arms=arms, varies=("loss_scale.kind",))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"name": "a/b"}, "name is 'a/b'"),
        ({"arms": {"f32 ": BASE}}, "arm is 'f32 '"),
        ({"arms": {"f\n32": BASE}}, r"arm is 'f\\n32'"),
        ({"arms": {"": BASE}}, "arm is ''"),
        ({"max_seeds": 1}, "max_seeds is 1, but there are 2 seeds to begin with"),
        ({"seed_counts": {"f64": 3}}, "no arm is named 'f64'"),
        ({"control": "f64"}, "no arm is named 'f64'; the arms are f32, mixed_bf16, mixed_f16"),
        ({"controls": {"mixed_f16": "f64"}}, "no arm is named 'f64'"),
        ({"controls": {"f64": "f32"}}, "no arm is named 'f64'"),
        ({"seeds": ()}, "seeds are"),
        ({"seeds": (1, 1)}, "seeds are"),
        ({"seeds": (-1,)}, r"seeds\[0\] is -1"),
        ({"seeds": (0, 2**64)}, r"seeds\[1\] is 18446744073709551616; it must be"),
        ({"seeds": (2**64 - 2, 3), "max_seeds": 4}, "the last seed that may be added is"),
        ({"seeds": (True,)}, r"seeds\[0\] is True"),
        ({"margin": float("nan")}, "margin is nan"),
        ({"max_seeds": 2**31}, "max_seeds is 2147483648"),
        ({"margin": 0.0}, "margin is 0.0"),
        ({"margin": math.inf}, "margin is inf"),
        ({"varies": ("precision", "learning_rate")}, "varies names 'learning_rate'"),
        ({"varies": ("precision", "optim")}, "varies names 'optim'"),
    ],
)
def test_bad_values_are_refused(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        ablation(**changes)


def test_an_arm_may_have_its_own_control() -> None:
    matched = ablation(controls={"mixed_f16": "mixed_bf16"})
    assert matched.control_of("mixed_f16") == "mixed_bf16"
    assert matched.control_of("mixed_bf16") == "f32"


# --- Cells ---


def test_a_field_that_came_later_changes_no_key_until_it_is_set(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    named = dataclasses.replace(BASE, data=dataclasses.replace(BASE.data, labels=("no", "yes")))
    key = cell_key(BASE)
    assert key != cell_key(named)
    whole = run_config.identity
    without = lambda c: {name: x for name, x in whole(c).items() if name != "data.labels"}
    monkeypatch.setattr(run_config, "identity", without)
    assert cell_key(BASE) == key


def test_a_key_follows_from_what_is_computed() -> None:
    key = cell_key(BASE)
    moved = dataclasses.replace(BASE, mesh=sharding.MeshConfig(data=1, fsdp=-1))
    spelled = dataclasses.replace(BASE, precision="full")
    assert {cell_key(c) for c in (moved, spelled, BASE.resolved())} == {key}
    other = {
        cell_key(c)
        for c in (
            with_rate(BASE, 2e-3),
            dataclasses.replace(BASE, precision="mixed_bf16"),
            dataclasses.replace(BASE, steps=101),
            dataclasses.replace(BASE, seed=1),
        )
    }
    assert len(other) == 4
    assert key not in other


def test_the_plan_goes_seed_by_seed_and_has_equal_arms_once() -> None:
    twin = dataclasses.replace(BASE, precision="p=float32,c=float32,o=float32")
    arms = {"f32": BASE, "bf16": dataclasses.replace(BASE, precision="bf16"), "twin": twin}
    plan = grid.plan(ablation(arms=arms))
    assert [(c.seed, c.precision) for c in plan.values()] == [
        (0, "p=f32,c=f32,o=f32"),
        (0, "p=bf16,c=bf16,o=bf16"),
        (1, "p=f32,c=f32,o=f32"),
        (1, "p=bf16,c=bf16,o=bf16"),
    ]
    keys = grid.keys_by_arm(ablation(arms=arms))
    assert list(keys["f32"].values()) == list(keys["twin"].values()) == list(plan)[::2]


def test_changing_an_arm_changes_its_cells_alone() -> None:
    before = ablation()
    arms = {**before.arms, "mixed_bf16": dataclasses.replace(BASE, precision="bf16")}
    old, new = grid.keys_by_arm(before), grid.keys_by_arm(ablation(arms=arms))
    assert [arm for arm in old if old[arm] != new[arm]] == ["mixed_bf16"]


def test_steps_keep_the_proportion_of_arms() -> None:
    arms = {"f32": BASE, "long": dataclasses.replace(BASE, steps=400)}
    short = grid.with_steps(ablation(arms=arms, varies=("steps",)), 25)
    assert [c.steps for c in (short.base, *short.arms.values())] == [25, 25, 100]
    with pytest.raises(ValueError, match="steps is 0"):
        grid.with_steps(ablation(), 0)


def test_seeds_are_added_to_an_arm_and_its_control() -> None:
    before = ablation(seeds=(5, 3), controls={"mixed_f16": "mixed_bf16"}, max_seeds=8)
    grown = grid.add_seeds(before, {"mixed_f16": 2})
    assert grown.seeds_of("mixed_f16") == grown.seeds_of("mixed_bf16") == (5, 3, 6, 7)
    assert grown.seeds_of("f32") == (5, 3)
    # As many as any of its arms needs, and never fewer than before.
    grown = grid.add_seeds(grown, {"mixed_bf16": 1, "mixed_f16": 1})
    assert [len(grown.seeds_of(arm)) for arm in POLICIES] == [5, 5, 5]
    grown = grid.add_seeds(grown, {"mixed_f16": 1})
    assert [len(grown.seeds_of(arm)) for arm in POLICIES] == [5, 6, 6]
    assert grown.all_seeds == (5, 3, 6, 7, 8, 9)
    seeds = [(config.seed, config.precision) for config in grid.plan(grown).values()]
    assert len(seeds) == 17
    assert seeds[-2:] == [(9, "p=f32,c=bf16,o=f32"), (9, "p=f32,c=f16,o=f32")]


def test_looking_again_and_again_is_paid_for() -> None:
    assert ablation().monitoring == "fixed"
    assert ablation(max_seeds=2).monitoring == "anytime"


def test_the_definition_survives_its_file_and_the_next(tmp_path: Path) -> None:
    path = tmp_path / grid.DEFINITION
    written = ablation(controls={"mixed_f16": "mixed_bf16"}, margin=0.01, max_seeds=5)
    written = grid.add_seeds(written, {"mixed_f16": 1})
    copy = grid.write_ablation(written, tmp_path)
    assert grid.read_ablation(path) == grid.read_ablation(copy) == written
    grid.write_ablation(ablation(), tmp_path)
    assert grid.read_ablation(path) == ablation()
    assert grid.read_ablation(copy) == written
    with pytest.raises(InputError, match="is not the directory of an ablation"):
        grid.read_ablation(tmp_path / "none" / grid.DEFINITION)
    path.write_text("{}")
    with pytest.raises(InputError, match="damaged"):
        grid.read_ablation(path)


def write_json(path: Path, values: Any) -> None:
    """Writes a file of a run."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(values))


def test_states_of_a_run(tmp_path: Path) -> None:
    assert grid.read_state(tmp_path / "none", "eval_loss")[0::3] == ("missing", None)
    assert grid.read_state(tmp_path, "eval_loss")[0::3] == ("missing", 0)
    # The line that is being written does not count.
    rows = '{"step": 10, "loss": 2.5}\n' * 500 + '{"step": 15, "loss": 2.4}\n{"step": 2'
    (tmp_path / "metrics.jsonl").write_text(rows)
    assert grid.read_state(tmp_path, "eval_loss")[0::3] == ("missing", 15)

    write_json(tmp_path / "result.json", {"steps": 20, "eval_loss": 1.5})
    assert grid.read_state(tmp_path, "eval_loss") == ("finished", 1.5, "", 20)
    with pytest.raises(InputError, match=r"perplexity is not a number in .*; .* steps, eval_loss"):
        grid.read_state(tmp_path, "perplexity")

    write_json(tmp_path / "result.json", {"steps": 20, "eval_loss": "nan"})
    state = grid.read_state(tmp_path, "eval_loss")
    assert (state.status, state.reason) == ("failed", "eval_loss is nan")
    assert math.isnan(state.value)

    grid.record_failure(tmp_path, "it diverged")
    state = grid.read_state(tmp_path, "eval_loss")
    assert (state.status, state.reason, state.step) == ("failed", "it diverged", 15)


def test_cells_are_read_arm_by_arm(tmp_path: Path) -> None:
    chosen = ablation()
    key = grid.keys_by_arm(chosen)["mixed_bf16"][1]
    run = grid.cells_directory(tmp_path) / key
    write_json(run / "result.json", {"steps": 20, "eval_loss": 1.5})
    cells = grid.read_cells(chosen, tmp_path)
    assert [(c.arm, c.seed) for c in cells] == [(arm, s) for arm in POLICIES for s in (0, 1)]
    assert [c for c in cells if c.status == "finished"] == [
        ("mixed_bf16", 1, run, "finished", 1.5, "")
    ]


# --- Seeds ---


def test_a_seed_fixes_initialisation_and_data_order_in_every_arm(
    home: Path, compile_fast: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    from run_helpers import tiny

    monkeypatch.setattr(exact, "jit", compile_fast)
    arms = [tiny(home), with_rate(tiny(home, "mixed_f16"), 1e-3), tiny(home, "p=bf16,c=bf16,o=f32")]
    starts = {}
    for config in [*arms, dataclasses.replace(arms[0], seed=1)]:
        resolved = config.resolved()
        mesh = sharding.make_mesh(resolved.mesh, jax.devices()[:1])
        params = paths.flatten(create_state(resolved, mesh).params)
        values = {path: np.asarray(leaf.astype(np.float32)) for path, leaf in params.items()}
        corpus = tokenized_corpus(config.data, window=config.context + 1)
        batches = train_iterator(
            corpus,
            length=config.context,
            batch_size=config.batch_size,
            seed=config.seed,
            process_index=0,
            process_count=1,
        )
        starts[config] = values, [next(batches)["inputs"] for _ in range(20)]
    f32, f16, bf16, other = starts.values()
    kernel = next(path for path in f32[0] if path.endswith("query/kernel"))
    for params, batches in (f16, bf16):
        np.testing.assert_array_equal(batches, f32[1])
        expected = f32[0][kernel]
        if params is bf16[0]:
            expected = expected.astype(jax.numpy.bfloat16).astype(np.float32)
        np.testing.assert_array_equal(params[kernel], expected)
    assert not np.array_equal(other[1], f32[1])
    assert not np.array_equal(other[0][kernel], f32[0][kernel])
