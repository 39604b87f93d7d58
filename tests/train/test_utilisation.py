"""Model FLOP, the peaks they are divided by, and the peak of memory."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import pytest
from run_helpers import rows

from lmjax.chips import H100, V5P, peak_flops
from lmjax.parallel import sharding
from lmjax.precision.backend import Backend
from lmjax.train import phase_of, train, utilisation
from lmjax.train.utilisation import (
    flops_per_token,
    measured,
    peak_of,
    product_format,
)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_model_flop_are_those_of_the_formula(family: str, tiny: Any) -> None:
    model = tiny("f32", family).model
    width, vocabulary, length = 16, 64, 16
    if family == "gpt2":
        block = 12 * width**2 + 13 * width  # products and biases, two norms with biases
        rest = vocabulary * width + 2 * width
    else:
        block = (2 + 1) * width**2 + 3 * width * 32 + 2 * width + 2 * 4  # half the heads are keys
        rest = vocabulary * width + width
    assert flops_per_token(model, length) == 6 * (2 * block + rest) + 12 * 2 * width * length


@pytest.mark.parametrize(
    ("kind", "name", "chip", "rate"),
    [
        ("NVIDIA H100 80GB HBM3", "bf16", "H100 SXM", 989e12),
        ("NVIDIA H100 PCIe", "bf16", "H100 PCIe", 756e12),
        ("NVIDIA H200", "tf32", "H200", H100.flops["tf32"]),
        ("NVIDIA A100-SXM4-80GB", "f32", "A100", 19.5e12),
        ("NVIDIA A100-SXM4-80GB", "fp8", "A100", 19.5e12),
        ("TPU v5", "bf16", "TPU v5p", V5P.flops["bf16"]),
        ("TPU v5p", "bf16", "TPU v5p", V5P.flops["bf16"]),
        ("TPU v5 lite", "bf16", "TPU v5e", 197e12),
        ("TPU v6 lite", "bf16", "TPU v6e", 918e12),
    ],
)
def test_peaks_are_those_of_data_sheets(kind: str, name: str, chip: str, rate: float) -> None:
    peak = peak_flops(kind, name)
    assert peak is not None
    assert (peak.chip, peak.flops) == (chip, rate)


def test_an_unknown_chip_has_no_peak() -> None:
    assert peak_flops("cpu", "f32") is None
    assert peak_flops("NVIDIA L40", "bf16") is None


@pytest.mark.parametrize(
    ("policy", "on_h100", "on_cpu"),
    [
        ("f32", "f32", "f32"),
        ("p=f32,c=f32,m=tf32", "tf32", "f32"),
        ("mixed_f16", "f16", None),
        ("p=f32,c=bf16,w=e4m3@tensor,x=e4m3@tensor,g=e5m2@tensor", "fp8", None),
        ("p=f32,c=bf16,w=mxfp4,x=mxfp4", "bf16", None),
    ],
)
def test_the_format_is_the_one_that_is_multiplied(
    policy: str, on_h100: str, on_cpu: str | None, tiny: Any
) -> None:
    phase, cpu = phase_of(tiny(policy)), Backend("cpu")
    assert product_format(phase, cpu) == (on_cpu or product_format(phase, cpu))
    assert product_format(phase, Backend("gpu", (9, 0))) == on_h100


def test_a_measured_peak_is_measured_once(
    tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []
    monkeypatch.setattr(utilisation, "measured", lambda _, name: calls.append(name) or 5e9)
    config, mesh = tiny("f32").resolved(), sharding.make_mesh(sharding.MeshConfig())
    config = dataclasses.replace(
        config, data=dataclasses.replace(config.data, cache_dir=str(tmp_path / "cache"))
    )
    for _ in range(2):
        peak = peak_of(phase_of(config), mesh)
        assert peak is not None
        assert str(peak) == "5 GFLOP/s of f32 products (measured)"
    assert calls == ["f32"]
    (tmp_path / "file").write_text("")
    config = dataclasses.replace(
        config, data=dataclasses.replace(config.data, cache_dir=str(tmp_path / "file"))
    )
    assert peak_of(phase_of(config), mesh) is not None, "an unwritable cache costs a measurement"
    assert calls == ["f32", "f32"]


def test_a_rate_is_a_plausible_number() -> None:
    assert 1e7 < measured(jax.devices()[0], "f32") < 1e14


def test_peak_memory_counts_what_was_held() -> None:
    # In a process of its own: the peak of this one may be gigabytes, and had to be exceeded.
    code = (
        "import numpy as np\n"
        "from lmjax.train.utilisation import peak_memory_bytes\n"
        "before = peak_memory_bytes()\n"
        "held = np.ones(before // 8 + 2**20)  # f64\n"
        "print(peak_memory_bytes() >= before + 2**23, held.nbytes > before)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["True", "True"]


def test_rows_hold_the_share_of_the_peak(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from run_helpers import tiny as tiny_run

    config = tiny_run(home, steps=5)
    peak = utilisation.Peak(1e9, "f32", "of this test")
    monkeypatch.setattr("lmjax.train.loop.peak_of", lambda *_: peak)
    train(config, tmp_path / "known", progress=False)
    (row,) = (row for row in rows(tmp_path / "known") if "loss" in row)
    flops = flops_per_token(config.model, config.context)
    assert row["mfu"] == row["tokens_per_second"] * flops / 1e9
    assert row["peak_memory_bytes"] > 2**20
    monkeypatch.setattr("lmjax.train.loop.peak_of", lambda *_: None)
    train(config, tmp_path / "unknown", progress=False)
    (row,) = (row for row in rows(tmp_path / "unknown") if "loss" in row)
    assert "mfu" not in row
