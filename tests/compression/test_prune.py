"""What is pruned is zero, stays zero, and is what the score says."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from test_quantize import home, model, run, verb

from lmjax.cli.common import BAD_INPUT, DONE
from lmjax.compression import PruneConfig, QuantizeConfig, prune, quantize
from lmjax.compression.prune import mask_of
from lmjax.inference import TrainedModel, load_model
from lmjax.optim.pruning import PruningConfig, keep_mask
from lmjax.train import Config

__all__ = ["home", "model", "run"]


def kernels(params: Any) -> dict[str, np.ndarray]:
    """The weights of products in the blocks, dense."""
    blocks = params["blocks"]
    found = {name: blocks["mlp"][name]["kernel"] for name in ("up", "down")}
    return {k: np.asarray(w.dense() if hasattr(w, "dense") else w) for k, w in found.items()}


def is_two_of_four(w: np.ndarray) -> bool:
    """At most two of four inputs in a row are not zero, of every output."""
    alive = (w != 0).reshape(*w.shape[:-2], -1, 4, w.shape[-1])
    return bool((alive.sum(axis=-2) <= 2).all())


def test_the_lowest_scores_of_each_group_go() -> None:
    score = jnp.asarray([[4.0, 1.0], [3.0, 1.0], [2.0, 1.0], [1.0, 1.0]])
    expected = [[True, False], [True, False], [False, True], [False, True]]
    np.testing.assert_array_equal(keep_mask(score, 2, 4), expected)
    np.testing.assert_array_equal(keep_mask(score, 1, 2)[:, 0], [True, False, True, False])
    assert keep_mask(score, 0).all()


@pytest.mark.parametrize("pattern", ["unstructured", "2:4"])
def test_wanda_with_equal_norms_is_magnitude(pattern: str) -> None:
    w = np.random.default_rng(0).normal(size=(16, 5)).astype(np.float32)
    config = PruneConfig(pattern)
    equal = np.full(16, 3.0, np.float32)
    np.testing.assert_array_equal(mask_of(w, equal, config), mask_of(w, None, config))
    unequal = mask_of(w, np.arange(16.0, dtype=np.float32), config)
    assert (unequal != mask_of(w, None, config)).any()
    assert not unequal[0].any(), "an input that is always zero needs no weights"


@pytest.mark.long
def test_zeros_survive_quantization_and_pruning_works_on_elements(model: TrainedModel) -> None:
    pruned = prune(model, PruneConfig("2:4")).model
    request = QuantizeConfig("w=int4@block8.affine", method="gptq", windows=4)
    made = kernels(quantize(pruned, request).model.params)
    for name, dense in kernels(pruned.params).items():
        assert is_two_of_four(made[name])
        assert not made[name][dense == 0].any()
    quantized = quantize(model, QuantizeConfig("w=int4@block8.affine")).model
    after = kernels(prune(quantized, PruneConfig("2:4")).model.params)
    for name, before in kernels(quantized.params).items():
        assert is_two_of_four(after[name])
        np.testing.assert_array_equal(after[name][after[name] != 0], before[after[name] != 0])


def test_a_pruned_run_is_a_run(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / "pruned"
    flags = ["--pattern", "2:4", "--method", "wanda", "--dense", "blocks/mlp/up/kernel"]
    assert verb("prune", run, *flags, "--to", target) == DONE
    assert "of 5 products: 50.0%" in capsys.readouterr().out
    for path, w in kernels(load_model(target).params).items():
        assert w.all() if path == "up" else is_two_of_four(w)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--pattern", "3:5"], "groups of 5, which do not divide the 16 inputs of"),
        (["--pattern", "4:2"], "'4:2' is not a pattern"),
        (["--sparsity", "1"], "sparsity"),
        (["--dense", "mlp/down"], "dense is mlp/down, but the weights are blocks/attention/"),
        (["--dense", "blocks/**"], "all weights are to stay dense"),
    ],
)
def test_what_cannot_be_pruned_is_one_line(
    flags: list[str], said: str, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert verb("prune", run, *flags, "--to", tmp_path / "made") == BAD_INPUT
    assert said in capsys.readouterr().err
    assert not (tmp_path / "made").exists()


def test_a_schedule_prunes_step_by_step_and_keeps_zeros(
    tiny: Callable[..., Config],
    draw_state: Callable[..., Any],
    draw_batch: Callable[..., Any],
    compiled_step: Callable[..., Any],
) -> None:
    pruning = PruningConfig("2:4", start=1, end=4, every=2, dense=("blocks/mlp/up/kernel",))
    config = tiny("f32", pruning=pruning)
    step, state, batch = compiled_step(config), draw_state(config), draw_batch(config)
    shares = []
    for _ in range(6):
        before = state.params["blocks"]["mlp"]["down"]["kernel"]
        state, _ = step(state, batch)
        w = np.asarray(state.params["blocks"]["mlp"]["down"]["kernel"])
        assert not w[np.asarray(before) == 0].any(), "a zero stays zero"
        shares.append(float(np.mean(w == 0)))
    assert shares == [0.0, 0.25, 0.25, 0.5, 0.5, 0.5]
    assert is_two_of_four(w)
    assert np.asarray(state.params["blocks"]["mlp"]["up"]["kernel"]).all()


@pytest.mark.parametrize(
    ("pruning", "said"),
    [
        ({"pattern": "2:5"}, "do not divide the 16 inputs of blocks/attention/key/kernel"),
        ({"pattern": "2:4", "start": 100}, "pruning ends after step 101"),
    ],
)
def test_a_schedule_that_cannot_be_is_refused(
    pruning: dict[str, Any], said: str, tiny: Callable[..., Config]
) -> None:
    with pytest.raises(ValueError, match=said):
        tiny("f32", pruning=PruningConfig(**pruning))
