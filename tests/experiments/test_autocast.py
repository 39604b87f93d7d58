"""The comparison with PyTorch starts from the same numbers and finds what its docstring says."""

from __future__ import annotations

import importlib.util

import numpy as np
import pytest

from experiments.benchmarks import autocast


def test_a_ratio_is_a_geometric_mean_with_an_interval_around_it() -> None:
    ratio = autocast.Ratio.of(np.array([2.0, 8.0, 4.0]), np.array([1.0, 1.0, 1.0]))
    assert ratio.mean == pytest.approx(4.0)
    assert np.log(ratio.high / ratio.mean) == pytest.approx(
        4.303 * np.log(2) / np.sqrt(3), rel=1e-3
    )
    assert ratio.low * ratio.high == pytest.approx(ratio.mean**2)


def test_without_torch_it_says_what_is_missing(monkeypatch, capsys) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert autocast.main([]) == 2
    assert "PyTorch" in capsys.readouterr().err


def test_one_seed_is_refused(capsys) -> None:
    with pytest.raises(SystemExit) as end:
        autocast.main(["--seeds", "1"])
    assert end.value.code == 2
    assert "at least 2" in capsys.readouterr().err


@pytest.mark.long
def test_policies_have_the_error_of_what_they_are_named_after() -> None:
    pytest.importorskip("torch")
    found = autocast.errors(0, autocast.model_config(2, 64, 32, 128), batch_size=4)
    assert found["f32"].max() < 1e-5, "the same model, before anything is rounded"
    for original, (mixed, same) in autocast.ORIGINALS.items():
        assert np.all(np.abs(np.log(found[same] / found[original])) < np.log(1.25)), original
        if original.startswith("torch.autocast"):
            assert np.all(found[mixed] > 1.1 * found[original])
