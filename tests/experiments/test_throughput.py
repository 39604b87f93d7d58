"""The benchmark measures what it says: paired ratios, their interval, and peers that agree."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest

from experiments.benchmarks import throughput
from experiments.benchmarks.contestants import SHAPES


def test_flops_per_token_are_those_of_the_reference_shapes():
    assert SHAPES["S"].flops_per_token / 1e6 == pytest.approx(34.7, abs=0.05)
    assert SHAPES["M"].flops_per_token / 1e6 == pytest.approx(799, abs=1)


def test_a_ratio_is_paired_by_round():
    # The machine halves its speed for some rounds; the ratio of each round is 2 all the same.
    theirs = [100.0, 50.0, 100.0, 50.0, 50.0, 100.0, 50.0, 100.0]
    ratio = throughput.paired_ratio([2 * speed for speed in theirs], theirs)
    assert ratio == (2.0, 2.0, 2.0, 1 - 2 / 2**8)


def test_the_interval_is_that_of_the_sign_test():
    # Of 10 rounds, the second and the ninth: 1 - 2 (1 + 10) / 2^10.
    ratio = throughput.paired_ratio([float(n) for n in range(1, 11)], [1.0] * 10)
    assert (ratio.low, ratio.high) == (2.0, 9.0)
    assert ratio.confidence == 1 - 22 / 1024


def test_the_interval_holds_the_median_as_often_as_it_says():
    generator = np.random.default_rng(0)
    draws = generator.normal(1.0, 0.1, (2000, 10))
    ratios = [throughput.paired_ratio(draw, np.ones(10)) for draw in draws]
    held = np.mean([ratio.low <= 1.0 <= ratio.high for ratio in ratios])
    promised = ratios[0].confidence
    assert abs(held - promised) < 4 * math.sqrt(promised * (1 - promised) / 2000)


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


@pytest.mark.parametrize("flags", ["--peers keras", "--rounds 0", "--policies nonsense"])
def test_bad_flags_end_with_code_2(flags: str, capsys):
    with pytest.raises(SystemExit) as end:
        throughput.main(["--shape", "tiny", *flags.split()])
    assert end.value.code == 2
    assert "error:" in capsys.readouterr().err
