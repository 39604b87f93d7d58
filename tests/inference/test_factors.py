"""A run that learned or observed its scale factors is read with them, by every reader."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from run_helpers import result, tiny

from lmjax.compression import PruneConfig, QuantizeConfig, prune, quantize
from lmjax.compression.written import write_run
from lmjax.inference import TrainedModel, evaluate, generate, load_model, parity, score
from lmjax.precision import paths
from lmjax.train import train

POLICY = "f32; **/mlp: w=int4@tensor.learned,x=int8@tensor.observed2"


@pytest.fixture(scope="module")
def workdir(home: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two blocks with learned weights and observed activations in its MLPs."""
    folder = tmp_path_factory.mktemp("factors") / "run"
    config = tiny(home, POLICY, steps=30, model={"layers": 2}, audit=True)
    train(config, folder, progress=False)
    return folder


@pytest.fixture(scope="module")
def model(workdir: Path) -> TrainedModel:
    return load_model(workdir)


@pytest.fixture(scope="module")
def by_themselves(model: TrainedModel) -> TrainedModel:
    """The same parameters, each tensor scaled by its own maximum."""
    return dataclasses.replace(model, scaling={})


def factors(model: TrainedModel) -> Mapping[str, Any]:
    return paths.flatten(model.evaluated.factors)


def test_all_factors_of_the_run_are_read(model: TrainedModel) -> None:
    own = factors(model)
    assert set(own) == {f"blocks/mlp/{s}/{role}" for s in ("up", "down") for role in "wx"}
    assert all(leaf.shape == (2,) and np.all(leaf != 1) for leaf in own.values())


def test_the_audit_of_its_step_passes(workdir: Path) -> None:
    (phase,) = json.loads((workdir / "audit.json").read_text())["phases"].values()
    assert phase["verdict"] == "pass", phase


def test_evaluation_is_that_of_the_run(
    model: TrainedModel, by_themselves: TrainedModel, workdir: Path
) -> None:
    trained = result(workdir)["eval_loss"]
    assert evaluate(model, progress=False).eval_loss == trained
    assert evaluate(by_themselves, progress=False).eval_loss != trained


def test_scores_logits_and_decoding_are_the_same_numbers(
    model: TrainedModel, by_themselves: TrainedModel
) -> None:
    text = "to be or not"
    found = parity(model, text)
    assert found.holds
    assert np.isclose(found.forward.sum(), score(model, text).total, rtol=1e-6)
    assert not np.array_equal(found.decoded, parity(by_themselves, text).decoded)
    tokens = np.asarray([[model.tokenizer.start_of_document, *model.tokenizer.encode(text)]])
    logits = model.logits_function()(model.evaluated, tokens.astype(np.int32), None)
    expected = jax.nn.log_softmax(np.asarray(logits, np.float64))[0]
    picked = expected[np.arange(len(text)), tokens[0, 1:]]
    np.testing.assert_allclose(found.forward, picked, atol=1e-5)
    assert generate(model, text, tokens=8) != ""


def test_another_policy_keeps_the_factors_of_quantizers_that_it_shares(
    model: TrainedModel,
) -> None:
    assert model.under("f32").scaling == {}
    weights = model.under("f32; **/mlp: w=int4@tensor.learned,x=int8@tensor")
    assert set(factors(weights)) == {"blocks/mlp/up/w", "blocks/mlp/down/w"}
    first = model.under("f32; blocks/0/mlp: w=int4@tensor.learned")
    assert set(factors(first)) == {"blocks/mlp/up/w", "blocks/mlp/down/w"}
    assert model.under("f32; **/mlp: w=int4@tensor.observed2").scaling == {}


def test_a_pruned_copy_is_read_with_them_too(model: TrainedModel, tmp_path: Path) -> None:
    made = prune(model, PruneConfig(sparsity=0.1)).model
    write_run(tmp_path / "pruned", made)
    read = load_model(tmp_path / "pruned")
    assert factors(read).keys() == factors(model).keys()
    for path, leaf in factors(read).items():
        np.testing.assert_array_equal(leaf, factors(model)[path])


def test_weights_are_stored_with_the_factors_that_they_were_trained_with(
    model: TrainedModel,
) -> None:
    stored = quantize(model, QuantizeConfig(POLICY)).model
    assert set(factors(stored)) == {"blocks/mlp/up/x", "blocks/mlp/down/x"}
    found, expected = (evaluate(m, progress=False).eval_loss for m in (stored, model))
    assert found == expected
    (up,) = [p for path, p in stored.params["blocks"]["mlp"]["up"].items() if path == "kernel"]
    np.testing.assert_array_equal(up.scale.ravel(), factors(model)["blocks/mlp/up/w"])
    by_channel = POLICY.replace("w=int4@tensor.learned", "w=int4@channel")
    other = quantize(model, QuantizeConfig(by_channel)).model
    assert evaluate(other, progress=False).eval_loss != expected
