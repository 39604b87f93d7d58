"""Attribution: what costs the loss is named, and where nothing does, nothing is."""

from __future__ import annotations

import dataclasses
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from run_helpers import tiny as tiny_run

from lmjax.diagnosis import attribute, open_run
from lmjax.diagnosis.attribution import _cost, _halves, _Search
from lmjax.model import layout, resolve_sites
from lmjax.precision.grammar import parse_policy

PATHS = (
    "embed", "blocks/0/residual", "blocks/0/attention/query", "blocks/0/mlp/up",
    "blocks/1/residual", "blocks/1/attention/query", "blocks/1/mlp/up", "head",
)  # fmt: skip


class Additive:
    """Losses in which each switched site costs what `costs` says, and pairs what `pairs` says."""

    def __init__(self, ours: Any, costs: dict[str, float], pairs: dict[frozenset[str], float]):
        self.ours, self.costs, self.pairs, self.count = ours, costs, pairs, 0

    def losses(self, sites: Any) -> np.ndarray:
        self.count += 1
        on = {path for path in sites if sites[path] is self.ours[path]}
        total = sum(cost for path, cost in self.costs.items() if path in on)
        total += sum(cost for pair, cost in self.pairs.items() if pair <= on)
        return 4 + total * np.array([0.9, 1.0, 1.1])


@pytest.fixture(scope="module")
def both(tiny: Any) -> tuple[Any, Any]:
    """The sites of a model under two policies."""
    model = tiny().model
    ours, theirs = (resolve_sites(model, parse_policy(text)) for text in ("p=f32,c=bf16", "f32"))
    return {path: ours[path] for path in PATHS}, {path: theirs[path] for path in PATHS}


def found(both: Any, costs: dict[str, float], pairs: Any = None, budget: int = 99) -> _Search:
    ours, theirs = both
    trial: Any = Additive(ours, costs, pairs or {})
    search = _Search(trial, ours, theirs, trial.losses(theirs), 1e-6)
    whole = trial.losses(ours) - trial.losses(theirs)
    search.costs = search.sites(PATHS, whole, budget)  # type: ignore[attr-defined]
    return search


def test_sites_that_cost_something_are_found_with_what_they_cost(both):
    costs = {"blocks/1/mlp/up": 0.1, "embed": -1e-4}
    search: Any = found(both, costs)
    assert [cost.where for cost in search.costs] == ["blocks/1/mlp/up", "embed"]
    assert [cost.difference for cost in search.costs] == pytest.approx([0.1, -1e-4])
    low, high = search.costs[0].low, search.costs[0].high
    # t(0.975, 2) = 4.303 times a standard error of 0.01 / sqrt(3)
    assert (low, high) == pytest.approx((0.1 - 0.02484, 0.1 + 0.02484), abs=1e-4)
    assert search.interactions == []


def test_what_two_sites_cost_only_together_is_an_interaction(both):
    costs = {"blocks/0/mlp/up": 0.1, "blocks/1/mlp/up": 0.1}
    search: Any = found(both, costs, {frozenset(costs): 0.05})
    (interaction,) = search.interactions
    assert interaction.difference == pytest.approx(0.05)
    assert "blocks/0" in interaction.where
    assert "blocks/1" in interaction.where


def test_the_largest_is_found_first_if_little_may_be_tried(both):
    costs = dict.fromkeys(PATHS, 0.001) | {"blocks/1/attention/query": 0.1}
    search: Any = found(both, costs, budget=17)
    assert search.costs[0].where == "blocks/1/attention/query"


def test_changes_of_both_signs_are_a_change(both):
    assert _cost("", np.array([1.0, -1.0])).change == 1
    assert _cost("", np.array([1.0, -1.0])).difference == 0


def test_groups_part_where_paths_do():
    assert next(_halves(PATHS)) == ("embed",)
    assert [*_halves(PATHS[1:7])] == [PATHS[1:4], PATHS[4:7]]
    assert next(_halves(PATHS[1:4])) == ("blocks/0/residual",)


@pytest.fixture(scope="module")
def run(home: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A trained run of two blocks in bf16."""
    from lmjax.train import train

    workdir = tmp_path_factory.mktemp("attributed") / "run"
    config = tiny_run(home, "p=f32,c=bf16,o=f32", model={"layers": 2})
    train(config, workdir, progress=False)
    return workdir


@pytest.mark.long
@pytest.mark.parametrize("precision", ["f32", "p=f32,c=bf16,o=f32", "fp8"])
def test_a_policy_against_itself_has_nothing_to_attribute(precision: str, run: Path):
    precision = {"fp8": "p=f32,c=bf16,w=e4m3@tensor,x=e4m3@tensor"}.get(precision, precision)
    for _ in range(7):
        made = attribute(open_run(run), precision=precision, reference=precision, batches=2)
        assert made.total.change == 0
        assert made.sites == made.tensors == made.classes == made.interactions == ()


@pytest.mark.long
@pytest.mark.parametrize(("count", "least"), [(1, 19), (2, 17)])
def test_planted_casts_are_named_in_nearly_all_draws(count: int, least: int, run: Path):
    base, draws, named = "p=f32,c=bf16,o=f32", random.Random(count), 0
    paths = list(layout(open_run(run).config.model).paths)
    for _ in range(20):
        planted = draws.sample(paths, count)
        precision = base + "".join(f"; {site}: c=e5m2" for site in planted)
        made = attribute(open_run(run), precision=precision, reference=base, batches=4)
        found = [cost.where for cost in made.sites]
        print(planted, [(c.where, c.difference) for c in made.sites], made.remaining)
        named += set(found) == set(planted)
        assert made.remaining is None or len(found) < count or made.remaining.change == 0
    assert named >= least


@pytest.mark.long
def test_cotangents_cost_something_once_a_step_is_taken(run: Path):
    precision = "f32; blocks/0/mlp/up: g=e3m2"
    assert attribute(open_run(run), precision=precision, batches=2).total.change == 0
    made = attribute(open_run(run), precision=precision, batches=2, steps=3)
    assert [cost.where for cost in made.sites] == ["blocks/0/mlp/up"]
    assert dataclasses.asdict(made)["steps"] == 3
