"""A quantized run is smaller, computes what its policy says, and is refused what it cannot do."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from run_helpers import home
from untrained import untrained, verb

from lmjax.cli.common import BAD_INPUT, DONE
from lmjax.compression import Calibration, QuantizeConfig, quantize
from lmjax.compression.gptq import gptq
from lmjax.compression.observers import observed_factors
from lmjax.compression.written import write_run
from lmjax.errors import InputError
from lmjax.inference import TrainedModel, load_model, score
from lmjax.precision.quantizer import parse_quantizer
from lmjax.precision.scaling import dequantize, quantize_with_scale
from lmjax.runs.run_directory import BESIDE

__all__ = ["home"]

TEXT = "the quick brown fox"


@pytest.fixture(scope="module")
def model(home: Path) -> TrainedModel:
    """An untrained model of one block whose weights have outliers, as if it were a run's."""
    return untrained(home)


@pytest.fixture(scope="module")
def run(model: TrainedModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run directory of the model."""
    target = tmp_path_factory.mktemp("runs") / "run"
    write_run(target, model)
    return target


@pytest.mark.long
def test_a_quantized_run_is_what_its_policy_says_to_the_bit(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / "int4"
    asked = "w=int4@block8; head: w=int8@channel"
    assert verb("quantize", run, "--policy", asked, "--to", target, "--json") == DONE
    said = json.loads(capsys.readouterr().out)
    made = load_model(target)
    assert made.step == 7
    kernel = made.params["blocks"]["mlp"]["up"]["kernel"]
    assert (kernel.codes.dtype, kernel.codes.nbytes) == (np.uint8, 16 * 64 // 2)
    assert said["after"]["bytes"] < 0.4 * said["before"]["bytes"]
    assert (target / "quantization.png").stat().st_size
    # A tied head reads the table that tokens are looked up in; the run's own does not look up so.
    without = load_model(run, precision=f"mixed_bf16,{asked}")
    table = made.params["embed"]["table"].dense()
    without.params["embed"]["table"] = np.asarray(table)
    assert score(made, TEXT) == score(without, TEXT)


def test_a_quantized_run_is_not_trained(run: Path, tmp_path: Path) -> None:
    target = tmp_path / "int8"
    (run / BESIDE).mkdir()
    (run / BESIDE / "merges.txt").touch()
    assert verb("quantize", run, "--policy", "w=int8@channel", "--to", target) == DONE
    assert (target / BESIDE / "merges.txt").exists()
    assert verb("resume", target) == DONE, "it is finished"
    (target / "result.json").unlink()
    assert verb("resume", target) == BAD_INPUT
    assert (
        verb("quantize", target, "--policy", "w=int8@tensor", "--to", tmp_path / "x") == BAD_INPUT
    )
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--policy", "w=int7@chanel"], "int7@chanel"),
        (["--policy", "mixed_bf16"], "quantizes no weights"),
        (["--policy", "w=int8@channel; blocks/9: w=int8@channel"], "matches no site"),
        (["--policy", "w=int8@channel", "--keep-worst", "6"], "of only 6 products"),
        (["--policy", "w=int8@channel", "--calibrate", "short.txt"], "fewer than the 17 of"),
        (["--policy", "w=int8@channel", "--calibrate", "cut.txt"], "is not UTF-8: byte 400"),
        (["--policy", "w=int8@channel", "--calibrate", "none.txt"], "cannot read none.txt"),
    ],
)
def test_what_cannot_be_quantized_is_one_line(
    flags: list[str],
    said: str,
    run: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("short.txt").write_text("too short")
    Path("cut.txt").write_bytes(b"a" * 400 + "я".encode()[:1])
    assert verb("quantize", run, *flags, "--to", "made") == BAD_INPUT
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert said in error
    assert not Path("made").exists()


def test_weights_that_are_not_finite_are_refused(model: TrainedModel) -> None:
    params = jax.tree.map(np.array, model.params)
    params["blocks"]["mlp"]["up"]["kernel"][0, 3, 3] = np.nan
    broken = TrainedModel(model.phase, params, 7, model.tokenizer)
    with pytest.raises(InputError, match="blocks/mlp/up/kernel holds a NaN"):
        quantize(broken, QuantizeConfig("w=int8@channel"))


@pytest.mark.parametrize(
    "name",
    [
        "int4@block8.affine",
        *(pytest.param(n, marks=pytest.mark.long) for n in ("int4@channel", "nvfp4")),
    ],
)
def test_gptq_with_an_identity_is_rounding_to_nearest(name: str) -> None:
    quantizer = parse_quantizer(name)
    w = jnp.asarray(np.random.default_rng(0).normal(size=(20, 6)), jnp.float32)
    found = gptq(w, np.eye(20), quantizer)
    nearest = quantize_with_scale(w, quantizer, axis=0)
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(nearest), strict=True):
        np.testing.assert_array_equal(one, other)


def test_gptq_makes_errors_of_products_smaller() -> None:
    quantizer, generator = parse_quantizer("int4@block8"), np.random.default_rng(0)
    mix = generator.normal(size=(24, 24))
    x = generator.normal(size=(400, 24)) @ mix
    w = jnp.asarray(generator.normal(size=(24, 8)), jnp.float32)

    def error(quantized: Any) -> float:
        miss = np.asarray(dequantize(quantized, quantizer, axis=0) - w)
        return float(np.sum((x @ miss) ** 2))

    nearest = error(quantize_with_scale(w, quantizer, axis=0))
    assert error(gptq(w, x.T @ x, quantizer)) < 0.75 * nearest


def test_what_products_read_is_counted_in_every_block(model: TrainedModel) -> None:
    windows = np.random.default_rng(0).integers(0, 256, (9, 16)).astype(np.int32)
    found = Calibration.of(model.phase, model.params, [{"inputs": windows}]).inputs
    products = [
        path for path, site in model.sites.items() if site.site.kind.name == "WEIGHT_PRODUCT"
    ]
    assert set(found) == set(products)
    assert all(float(own.count) == windows.size for own in found.values())
    assert all(np.all(np.diag(own.gram) <= own.count * own.largest**2) for own in found.values())
    query, key = found["blocks/0/attention/query"], found["blocks/0/attention/key"]
    np.testing.assert_array_equal(query.gram, key.gram)


@pytest.mark.parametrize("method", ["awq", "smoothquant", "gptq"])
@pytest.mark.long
def test_every_method_lowers_the_error_that_it_is_for(method: str, model: TrainedModel) -> None:
    policy = "w=int4@block8,x=int8@tensor.static"
    nearest = quantize(model, QuantizeConfig(policy, windows=8))
    made = quantize(model, QuantizeConfig(policy, method=method, windows=8))  # type: ignore[arg-type]
    mean = lambda q: np.mean([layer.output_snr for layer in q.layers if layer.output_snr])
    assert method == "smoothquant" or mean(made) > mean(nearest)
    kernel = made.model.params["blocks"]["mlp"]["up"]["kernel"]
    assert float(kernel.inputs[0]) > 0


@pytest.mark.long
def test_the_worst_products_stay_wide(model: TrainedModel) -> None:
    made = quantize(model, QuantizeConfig("w=int2@block16", keep_worst=2, windows=8))
    kept = [
        layer for layer in made.layers if layer.format == "bf16" and layer.loss_alone is not None
    ]
    assert len(kept) == 2
    others = [x.loss_alone for x in made.layers if x.loss_alone is not None and x not in kept]
    assert min(layer.loss_alone or 0 for layer in kept) >= max(others)


@pytest.mark.parametrize("name", ["int4@block16", "int4@channel.affine"])
def test_observers_clamp_outliers_and_mse_errs_least(name: str) -> None:
    quantizer = parse_quantizer(name)
    w = jnp.asarray(np.random.default_rng(0).standard_t(3, (64, 8)), jnp.float32)

    def error(observer: Any) -> float:
        factors = observed_factors(w, quantizer, observer, axis=0)
        quantized = quantize_with_scale(w, quantizer, axis=0, factors=factors)
        return float(jnp.sum((dequantize(quantized, quantizer, axis=0) - w) ** 2))

    assert error("mse") < 0.95 * error("minmax")
    covered = observed_factors(w, quantizer, "percentile", axis=0).scale
    assert (covered < observed_factors(w, quantizer, "minmax", axis=0).scale).all()


@pytest.mark.parametrize(
    "name", ["int8@block32", pytest.param("int8@channel", marks=pytest.mark.long)]
)
def test_percentiles_count_neither_pruned_weights_nor_the_filling_of_a_block(name: str) -> None:
    quantizer = parse_quantizer(name)
    covered = lambda w, observer: observed_factors(w, quantizer, observer, axis=0)
    lone = jnp.zeros((161, 2)).at[160, 0].set(3.0)
    np.testing.assert_array_equal(covered(lone, "percentile").scale, covered(lone, "minmax").scale)
    w = jnp.asarray(np.random.default_rng(0).normal(size=(161, 2)), jnp.float32)
    found = gptq(w, np.eye(161), quantizer, "percentile")
    nearest = quantize_with_scale(w, quantizer, axis=0, factors=covered(w, "percentile"))
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(nearest), strict=True):
        np.testing.assert_array_equal(one, other)
