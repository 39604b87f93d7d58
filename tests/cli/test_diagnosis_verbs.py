"""What twin, replay, attribute and advise print, and what they refuse."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import pytest

from lmjax.cli import diagnosis, verbs
from lmjax.diagnosis import Advice, Attribution, Cost, Difference, Element, Replay, Replayed, Twin
from lmjax.diagnosis.advice import Trial
from lmjax.diagnosis.exponents import Loss


@pytest.mark.parametrize("verb", ["twin", "replay", "attribute"])
def test_other_directories_are_refused(
    verb: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    flags = ["--from", "3"] if verb == "replay" else []
    with pytest.raises(SystemExit) as ended:
        verbs.main([verb, str(tmp_path / "nothing"), *flags])
    assert ended.value.code == 2
    assert "is not a run directory" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_an_unknown_chip_is_refused_with_those_there_are(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as ended:
        verbs.main(["advise", "experiments.quickstart", "--target", "abacus"])
    assert ended.value.code == 2
    assert "H100" in capsys.readouterr().err


def test_the_twin_names_the_first_error_and_its_origin():
    rows = (
        Difference("embed", "y", 0.0, 0.0, 1.0, 0.0, 0),
        Difference("blocks/0/mlp/up", "y", 0.1, 0.09, 0.99, 0.1, 0),
        Difference("head", "dy", 0.2, math.nan, 0.9, 0.3, 2),
    )
    made = Twin("bf16", "f32", 7, 2**-5, 2.5, 2.4, rows)
    summary = "\n".join(diagnosis._twin_summary(made))
    assert "step 8, bf16 against f32: loss 2.500000, reference 2.400000" in summary
    assert "1 of 3 tensors are equal" in summary
    assert "first error above 0.03125: blocks/0/mlp/up/y, 0.1 (3.3 bits)" in summary
    assert "by themselves, these sites exceed it: blocks/0/mlp/up (0.09)" in summary
    json = diagnosis._twin_json(made)
    assert json["first"] == "blocks/0/mlp/up/y"
    assert [row["own_error"] for row in json["tensors"]] == [0.0, 0.09, None]
    assert json["tensors"][0]["bits"] == math.inf


def test_replay_says_what_was_compared_and_where_the_infinity_is():
    step = Replayed(9, 2.0, math.inf, 1024.0, True, 2.0, True)
    found = Element(
        9, 1, "blocks/0/mlp/up", "backward", "product", "dx", (0, 3), math.inf, math.inf, {"g": 7e4}
    )
    made = Replay(4, "mixed_f16", True, (step,), {8: True}, found, None)
    summary = "\n".join(diagnosis._replay_summary(made))
    assert "bit-identical: compared with 1 row of metrics.jsonl and 1 checkpoint" in summary
    assert "step 9, backward, blocks/0/mlp/up/dx[0, 3] = inf, in part 1 of the batch" in summary
    assert "largest magnitudes read: g 7e+04" in summary
    unexplained = Replay(4, "mixed_f16", True, (step,), {8: False}, None, None)
    summary = "\n".join(diagnosis._replay_summary(unexplained))
    assert "NOT the same" in summary
    assert "gradients of step 9 were not finite" in summary


def test_attribution_prints_shares_and_what_remains(capsys: pytest.CaptureFixture[str]):
    cost = lambda where, size: Cost(where, size, size / 2, 2 * size, size)
    site, whole = cost("blocks/0/mlp/up", 0.08), cost("all sites", 0.1)
    rest = (site,), (), (), (), cost("what remains", 0.02)
    diagnosis._print_attribution(Attribution("bf16", "f32", 7, 4, 0, 2.5, 2.4, whole, *rest, 9))
    shown = capsys.readouterr().out
    assert "80.0%" in shown
    assert "20.0%" in shown
    nothing = Attribution(
        "f32", "f32", 7, 4, 0, 2.4, 2.4, cost("all sites", 0), (), (), (), (), None, 2
    )
    diagnosis._print_attribution(nothing)
    assert "nothing to attribute" in capsys.readouterr().out


def test_advice_shows_the_outcome_beside_the_prediction():
    trial = Trial(
        "p=f32,c=f16", 2048.0, (2.51,), 0.01, math.inf, {"head/dw": "f16"},
        {"head/dw": Loss(0.02, 0.0)}, {"head/dw": Loss(0.03, 0.0)},
    )  # fmt: skip
    made = Advice(0.01, 0.02, "", "p=f32,c=f16", (2.5,), {}, 256.0, 2.0**17, (trial,))
    lines = "\n".join(diagnosis._advice_lines(made))
    assert "3.00%" in lines
    assert "2.00%" in lines
    assert "gap +0.0100 nats, accepted up to 0.02" in lines
    assert "f16 would need a loss scale of 256 to 131072" in lines
    assert lines.startswith("Trial 1: p=f32,c=f16, loss scale 2048")
    scaled = "--loss-scale.kind static --loss-scale.initial 2048 --loss-scale.maximum 2048"
    assert lines.endswith(f"advised: --precision 'p=f32,c=f16' {scaled}")
    wide = dataclasses.replace(made, precision="f32")
    assert wide.flags == "--precision 'f32'"
