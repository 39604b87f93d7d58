"""Every field of a config either belongs to a run's identity or leaves its parameters alone.

A resumed run with another value of the field is refused, or ends with the parameters of the
uninterrupted run, bit for bit.
"""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import pytest
from run_helpers import result, strict_loads, tiny

from lmjax import checks
from lmjax.runs.config import HOUSEKEEPING, by_name
from lmjax.runs.run_directory import HISTORY, open_run
from lmjax.train import Config, InputError, read_config, train

STEPS, STOPPED = 8, 3

OTHER: dict[str, Any] = {
    "precision": "p=f32,c=bf16,o=f32",
    "context": 8,
    "micro_batches": 2,
    "deterministic_reductions": 1,
    "loss_multiplier": 0.5,
    "model.width": 32,
    "model.heads": 4,
    "model.kv_heads": 1,
    "model.head_width": 4,
    "model.positions": "rope",
    "model.rope_scaling.factor": 2.0,
    "model.token_types": 2,
    "model.classes": 2,
    "model.mask_token": 1,
    "model.dropout": 0.1,
    "data.dataset": "tfds:wikitext",
    "data.files": ("elsewhere/*.txt",),
    "data.tokenizer_files": "elsewhere",
    "data.validation_files": ("elsewhere/b.txt",),
    "data.feature": "body",
    "data.tokenizer": "bpe",
    "data.end_of_document": "</s>",
    "data.labels": ("no", "yes"),
    "init_from": "elsewhere",
    "optimizer.extensions": ("4:constant",),
    "optimizer.no_decay": (),
    "pruning.pattern": "2:4",
    "pruning.dense": ("blocks/mlp/up/kernel",),
    "loss_scale.kind": "static",
    "loss_scale.initial": 2.0**14,
    "loss_scale.factor": 4.0,
    "loss_scale.minimum": 0.5,
    "loss_scale.maximum": 2.0**30,
    "loss_scale.format": "f16",
    "evaluation.every": 2,
    "evaluation.batches": 1,
    "evaluation.batch_size": 3,
    "telemetry.every": 2,
    "telemetry.tensors": "head/*",
    "checkpoint.every": 1,
    "mesh.data": 1,
    "profile.steps": "6:7",
    "metrics.project": "elsewhere",
}
"""Another valid value of the fields whose other value does not follow from their type."""

TOGETHER: dict[str, dict[str, Any]] = {
    **{
        f"model.{name}": {"model.family": "encoder"}
        for name in ("token_types", "classes", "mask_token", "headless")
    },
    "data.dataset": {"data.files": ()},
    "data.end_of_document": {"data.tokenizer": "elsewhere/tokenizer.json"},
    "telemetry.tensors": {"telemetry.every": 2},
    "telemetry.exact": {"telemetry.every": 4},
    "mesh.fsdp": {"mesh.data": 1},
    "mesh.tensor": {"mesh.data": 1},
    "mesh.sequence": {"mesh.data": 1},
    "loss_scale.per_block": {"loss_scale.kind": "dynamic"},
}
"""What has to change with a field for the whole to be valid."""


def other(config: Config, name: str, home: Path) -> Any:
    """Another value of a field."""
    if name in OTHER:
        return OTHER[name]
    if name == "data.cache_dir":
        return str(home / "cache")
    value = by_name(config)[name]
    if name.startswith("mesh."):
        return -1
    if isinstance(value, bool):
        return not value
    if isinstance(value, int | float):
        return value + 1 if isinstance(value, int) else value / 2 or 0.25
    choices = checks.choices(Config)[name]
    return next(choice for choice in choices if choice not in (value, "auto"))


def changed(config: Config, name: str, home: Path) -> Config:
    """The config with another value of a field."""
    values = {**TOGETHER.get(name, {}), name: other(config, name, home)}
    prefix = name.rpartition(".")[0]
    return _replaced(config, prefix, {field.rpartition(".")[2]: v for field, v in values.items()})


def _replaced(part: Any, prefix: str, values: dict[str, Any]) -> Any:
    """A dataclass with values of the part at a dotted name replaced."""
    if not prefix:
        return dataclasses.replace(part, **values)
    first, _, rest = prefix.partition(".")
    inner = _replaced(getattr(part, first), rest, values)
    return dataclasses.replace(part, **{first: inner})


@pytest.fixture(scope="module")
def config(home: Path) -> Config:
    return tiny(home, steps=STEPS, evaluation={"every": 4}, log_every=2)


@pytest.fixture(scope="module")
def uninterrupted(config: Config, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The uninterrupted run."""
    run = tmp_path_factory.mktemp("identity") / "whole"
    train(config, run, progress=False)
    return run


@pytest.fixture(scope="module")
def stopped(config: Config, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run, stopped after some steps."""
    run = tmp_path_factory.mktemp("identity") / "stopped"
    train(config, run, stop_after=STOPPED, progress=False)
    return run


@pytest.mark.parametrize("name", [n for n in checks.fields(Config) if n not in HOUSEKEEPING])
def test_a_run_is_not_resumed_with_another_value_of_what_it_computes_with(
    name: str, config: Config, home: Path, stopped: Path
) -> None:
    with pytest.raises(InputError, match=f"holds another run.*{name} is "):
        open_run(stopped, changed(config, name, home).resolved())
    assert read_config(stopped) == config.resolved()


@pytest.mark.parametrize(
    "name",
    [  # each telemetry field compiles a program of its own
        pytest.param(name, marks=pytest.mark.long) if name.startswith("telemetry.") else name
        for name in HOUSEKEEPING
        if name != "metrics.sinks"  # its values are services that have to be installed
    ],
)
def test_housekeeping_is_changed_at_will_and_leaves_the_parameters_alone(
    name: str, config: Config, home: Path, stopped: Path, uninterrupted: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(stopped, run)
    new = changed(config, name, home)
    train(new, run, progress=False)
    if name.startswith("telemetry."):
        # A watched step is another program, whose sums may be rounded in another order.
        assert result(run)["eval_loss"] == pytest.approx(result(uninterrupted)["eval_loss"], 1e-5)
    else:
        assert result(run)["parameters_sha256"] == result(uninterrupted)["parameters_sha256"]
    assert read_config(run) == new.resolved(), "the newest launch is recorded"
    (row,) = map(strict_loads, (run / HISTORY).read_text().splitlines())
    assert row["step"] == STOPPED
    assert row["changed"][name]["was"] == by_name(config.resolved())[name]
    assert row["changed"][name]["is"] == by_name(new.resolved())[name]


def test_a_launch_that_changes_nothing_leaves_no_history(
    config: Config, stopped: Path, tmp_path: Path
) -> None:
    shutil.copytree(stopped, tmp_path / "run")
    train(config, tmp_path / "run", stop_after=1, progress=False)
    assert not (tmp_path / "run" / HISTORY).exists()


def test_every_field_outside_the_identity_says_why() -> None:
    assert all(len(why.split()) > 2 for why in HOUSEKEEPING.values())
