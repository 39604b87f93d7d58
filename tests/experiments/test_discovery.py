"""Every experiment describes itself and has a train step that eight devices could run."""

from __future__ import annotations

import ast
import importlib
import pkgutil
import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest

import experiments
import experiments.ablations
from lmjax.ablation.claims import Claim, judge, load_claims
from lmjax.ablation.evidence import Evidence
from lmjax.ablation.grid import Ablation, arm_differences, plan, read_cells
from lmjax.parallel import sharding
from lmjax.runs.config import from_json, to_json
from lmjax.train import Config, abstract_state, make_train_step

NAMES = sorted(
    module.name for module in pkgutil.iter_modules(experiments.__path__) if not module.ispkg
)
SHARED = {"recipes", "loss_scale_invariants"}
"""Modules of `experiments.ablations` that are no ablation but parts of some."""
ABLATIONS = sorted(
    f"ablations.{module.name}"
    for module in pkgutil.iter_modules(experiments.ablations.__path__)
    if module.name not in SHARED
)
CLAIMS = load_claims("experiments.ablations")
LABELS = ("Command", "Hardware", "Time", "Expected")
MESHES = {
    "gpt2_124m": sharding.MeshConfig(data=2, fsdp=2, tensor=2),
    "llama_1b": sharding.MeshConfig(data=1, fsdp=4, tensor=2),
}


def experiment(name: str) -> Any:
    """The module of an experiment."""
    return importlib.import_module(f"experiments.{name}")


def labelled(docstring: str) -> dict[str, str]:
    """What a docstring says under each of `LABELS`."""
    pattern = rf"^({'|'.join(LABELS)}):\s+(.*(?:\n[ \t]+\S.*)*)"
    return dict(re.findall(pattern, docstring, re.MULTILINE))


def test_the_experiments_are_found() -> None:
    assert {"quickstart", "char_shakespeare", "gpt2_124m", "llama_1b"} <= set(NAMES)
    assert "ablations.policies" in ABLATIONS


@pytest.mark.parametrize("name", NAMES + ABLATIONS)
def test_the_docstring_says_command_hardware_time_and_expectation(name: str) -> None:
    said = labelled(experiment(name).__doc__ or "")
    assert set(said) == set(LABELS)
    claimed = name.removeprefix("ablations.") in CLAIMS
    command = name.replace("ablations.", "lmjax reproduce ") if claimed else f"experiments.{name}"
    assert f"python -m {command}" in said["Command"]
    # Numbers, or why there are none; a placeholder in capitals is neither.
    for label in ("Time", "Expected"):
        assert re.search(r"\d|not measured", said[label]), said[label]
    assert not [text for text in said.values() if re.fullmatch(r"[A-Z]+", text.strip())]


@pytest.mark.parametrize("name", NAMES + ABLATIONS)
def test_the_module_runs_its_own_config(name: str) -> None:
    """`python -m` runs the module as `__main__`; what it then calls is read from the source."""
    module = experiment(name)
    with open(module.__file__, encoding="utf-8") as file:
        last = ast.unparse(ast.parse(file.read()).body[-1])
    assert last.startswith("if __name__ == '__main__':")
    what = "ablation" if name in ABLATIONS else "config"
    runner = {"config": "run_experiment", "ablation": "run_ablation"}[what]
    assert f"{runner}({what})" in last


@pytest.mark.parametrize("name", ABLATIONS)
def test_an_ablation_builds_and_its_arms_differ(name: str) -> None:
    ablation = experiment(name).ablation()
    assert isinstance(ablation, Ablation)
    assert f"ablations.{ablation.name}" == name
    assert len(plan(ablation)) == len(ablation.arms) * len(ablation.seeds)
    chosen = {
        difference.field for difference in arm_differences(ablation) if not difference.follows
    }
    assert chosen == set(ablation.varies)


@pytest.mark.parametrize("claim", CLAIMS.values(), ids=list(CLAIMS))
def test_a_claim_names_its_source_and_says_what_is_large(claim: Claim) -> None:
    assert re.search(r"arXiv \d{4}\.\d{5}|issue \d+", claim.source)
    assert len(plan(claim.large)) == len(claim.large.arms) * len(claim.large.seeds)
    smallest = min(config.model.width for config in claim.large.arms.values())
    assert smallest >= 768, "not the size of the paper, nor near it"


SLOW = ("loss_scaling", "pure_f16_adam", "unit_scaling")
"""Claims whose arithmetic compiles models."""


@pytest.mark.parametrize(
    "claim",
    [
        pytest.param(claim, marks=pytest.mark.long if name in SLOW else [], id=name)
        for name, claim in CLAIMS.items()
    ],
)
def test_without_runs_a_claim_says_what_arithmetic_says_and_no_more(
    claim: Claim, tmp_path: Path
) -> None:
    cells = read_cells(claim.ablation, tmp_path) if claim.ablation else []
    outcomes = [
        finding.outcome for finding in judge(claim, Evidence(claim.ablation, cells)).findings
    ]
    assert "refuted" not in outcomes
    assert ("undecided" in outcomes) == (claim.ablation is not None)


def batch_of(config: Config, mesh: Any) -> dict[str, jax.ShapeDtypeStruct]:
    """A batch of a run, spread over a mesh."""
    placed = lambda shape: sharding.batch_sharding(mesh, shape)
    return {
        name: jax.ShapeDtypeStruct(shape, jnp.int32, sharding=placed(shape))
        for name, shape in config.data.batch_shapes(config.batch_size, config.context).items()
    }


TRACED = [
    pytest.param(
        claim,
        arm,
        marks=[] if number == 0 and claim.quick and claim.ablation else pytest.mark.long,
        id=f"{name}-{arm}",
    )
    for name, claim in CLAIMS.items()
    for number, arm in enumerate(reversed(claim.large.arms))
]


@pytest.mark.parametrize(("claim", "arm"), TRACED)
def test_the_large_version_of_a_claim_traces_for_eight_devices(claim: Claim, arm: str) -> None:
    """The last arm of quick claims that train; all others are in the long suite."""
    config = claim.large.arms[arm].resolved()
    mesh = sharding.abstract_mesh(sharding.MeshConfig(fsdp=4, tensor=2), 8)
    traced = make_train_step(config, mesh).trace(
        abstract_state(config, mesh), batch_of(config, mesh)
    )
    assert traced.out_info[1]["loss"].shape == ()


@pytest.mark.parametrize("name", NAMES)
def test_config_is_complete_and_survives_json(name: str) -> None:
    config = experiment(name).config()
    assert isinstance(config, Config)
    assert from_json(to_json(config.resolved())) == config.resolved()


@pytest.mark.parametrize("name", NAMES)
def test_one_step_lowers_for_eight_devices(name: str) -> None:
    config = experiment(name).config().resolved()
    mesh = sharding.abstract_mesh(MESHES.get(name, sharding.MeshConfig(fsdp=2, tensor=2)), 8)
    state = abstract_state(config, mesh)
    traced = make_train_step(config, mesh).trace(state, batch_of(config, mesh))
    new_state, metrics = traced.out_info
    assert jax.tree.map(lambda x: (x.shape, x.dtype), new_state) == jax.tree.map(
        lambda x: (x.shape, x.dtype), state
    )
    assert metrics["loss"].shape == ()
    text = traced.lower(lowering_platforms=("cpu",)).as_text()
    assert "num_partitions = 8" in text
