"""A run with telemetry writes its rows and pictures, across a stop as without one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from run_helpers import tiny as tiny_run

from lmjax.train import train


@pytest.fixture(scope="module")
def watched(home: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = tiny_run(home, "mixed_f16", steps=4, log_every=3, telemetry={"every": 2})
    workdir = tmp_path_factory.mktemp("watched") / "run"
    train(config, workdir, stop_after=3, progress=False)
    train(config, workdir, progress=False)
    return workdir


def test_what_was_counted_is_in_the_metrics_too(watched: Path):
    logged = [json.loads(line) for line in (watched / "metrics.jsonl").read_text().splitlines()]
    shares = {row["step"]: row for row in logged if "zero_gradients" in row}
    assert list(shares) == [2, 4]
    counts = [json.loads(line) for line in (watched / "telemetry.jsonl").read_text().splitlines()]
    for row in counts:
        gradients = [t for path, t in row["tensors"].items() if path.endswith("/dw")]
        zeros = sum((t["zero"] + t["underflow"]) * t["size"] for t in gradients)
        share = zeros / sum(t["size"] for t in gradients)
        assert shares[row["step"]]["zero_gradients"] == pytest.approx(share)
        same = sum(u["unchanged"] * u["size"] for u in row["updates"].values())
        size = sum(u["size"] for u in row["updates"].values())
        assert shares[row["step"]]["unchanged_weights"] == pytest.approx(same / size)


def test_a_run_writes_a_row_for_each_watched_step_once(watched: Path):
    rows = [json.loads(line) for line in (watched / "telemetry.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [2, 4]
    assert "blocks/0/mlp/up/dw" in rows[0]["tensors"]
    assert "blocks/0/mlp/up/kernel" in rows[0]["updates"]
    logged = [json.loads(line) for line in (watched / "metrics.jsonl").read_text().splitlines()]
    assert {2, 3, 4} <= {row["step"] for row in logged if "loss" in row}
    for name in ("telemetry.png", "telemetry_course.png"):
        assert (watched / name).read_bytes().startswith(b"\x89PNG")
