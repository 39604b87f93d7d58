"""The benchmark measures what it says: paired ratios, their interval, and peers that agree."""

from __future__ import annotations

import json

import pytest

from experiments.benchmarks import throughput
from experiments.benchmarks.contestants import (
    SHAPES,
    LeftOut,
    jax_contestant,
    refuse_other_than_gpt2,
    torch_contestant,
)


def test_flops_per_token_are_those_of_the_reference_shapes():
    assert SHAPES["S"].flops_per_token / 1e6 == pytest.approx(34.7, abs=0.05)
    assert SHAPES["M"].flops_per_token / 1e6 == pytest.approx(799, abs=1)


@pytest.mark.long
def test_lmjax_and_its_peer_train_alike(capsys):
    flags = "--shape tiny --policies mixed_bf16 --peers jnp,torch --torch-python false --rounds 2"
    throughput.main([*flags.split(), "--json"])
    printed = capsys.readouterr()
    result = json.loads(printed.out)
    ours, peer = result["contestants"]["lmjax mixed_bf16"], result["contestants"]["jnp mixed_bf16"]
    assert ours["first_loss"] == pytest.approx(peer["first_loss"], abs=1e-3)
    assert ours["last_loss"] == pytest.approx(peer["last_loss"], abs=1e-3)
    assert ours["last_loss"] < ours["first_loss"] - 0.05
    assert len(result["tokens_per_second"]["lmjax mixed_bf16"]) == 2
    flops = ours["tokens_per_second"] * result["shape"]["flops_per_token"]
    assert ours["flops"] == pytest.approx(flops)
    assert ours["share_of_peak"] == pytest.approx(flops / result["peaks"]["bfloat16"])
    assert set(result["ratios"]) == {"lmjax mixed_bf16 / jnp mixed_bf16"}
    assert "left out: torch bf16" in printed.err


def test_policies_are_presets_by_commas_or_apart_or_written_out():
    written = "p=f32,c=bf16,o=f32,m=default"
    flags = throughput._flags(["--policies", "f32,fp8", "mixed_bf16", written])
    assert flags.policies == ["f32", "fp8", "mixed_bf16", written]


def test_every_policy_is_compared_with_peers_in_its_compute_format_and_with_own_bf16():
    formats = {
        "lmjax mixed_bf16": "bfloat16",
        "lmjax fp8": "bfloat16",
        "jnp mixed_bf16": "bfloat16",
        "torch f32": "float32",
        "torch bf16 compiled": "bfloat16",
    }
    assert throughput.pairs(formats) == [
        ("lmjax mixed_bf16", "jnp mixed_bf16"),
        ("lmjax mixed_bf16", "torch bf16 compiled"),
        ("lmjax fp8", "lmjax mixed_bf16"),
        ("lmjax fp8", "torch bf16 compiled"),
    ]


def test_peers_refuse_an_architecture_that_they_do_not_have():
    with pytest.raises(LeftOut, match="llama_1b has another"):
        jax_contestant("jnp", "mixed_bf16", SHAPES["llama_1b"])
    with pytest.raises(LeftOut, match="llama_1b has another"):
        torch_contestant("torch bf16", "python", SHAPES["llama_1b"])
    for name in set(SHAPES) - {"llama_1b"}:
        refuse_other_than_gpt2("jnp f32", SHAPES[name])


@pytest.mark.parametrize(
    "flags", ["--peers keras", "--torch jit", "--rounds 0", "--policies nonsense"]
)
def test_bad_flags_end_with_code_2(flags: str, capsys):
    with pytest.raises(SystemExit) as end:
        throughput.main(["--shape", "tiny", *flags.split()])
    assert end.value.code == 2
    assert "error:" in capsys.readouterr().err


@pytest.mark.parametrize("width", [60, 80, 100, 140, None])
def test_the_report_keeps_names_and_numbers_at_any_width(width: int | None):
    row = {"tokens_per_second": 4802.3, "flops": 1.6e11, "share_of_peak": 0.59, "first_loss": 9.01}
    row |= {"last_loss": 8.8, "compile_seconds": None, "peak_bytes": None}
    ratio = {"median": 0.74, "low": 0.7, "high": 0.78, "confidence": 0.961}
    result = {
        "shape": {"flops_per_token": 34.7e6},
        "flop_formula": "6 N",
        "peaks": {"f32": 2.1e11},
        "rounds": 8,
        "contestants": {"lmjax bf16": row, "torch compiled bf16": row},
        "ratios": {"lmjax bf16 / torch compiled bf16": ratio},
    }
    printed = throughput.table(result, width)
    assert all(len(line) <= (width or 1000) for line in printed.splitlines())
    for said in (*result["contestants"], *result["ratios"], "4802", "59.0%", "0.700 to 0.780"):
        assert said in printed
