"""Metrics as files: strict JSON whatever the numbers, TensorBoard events, a picture."""

from __future__ import annotations

import errno
import math
import threading
from pathlib import Path

import matplotlib.image
import pytest
from run_helpers import strict_loads

from lmjax import strict_json
from lmjax.files.background import Background
from lmjax.runs.metrics import MetricsWriter, draw_curves, read_rows, replace_text

NON_FINITE = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}


@pytest.mark.parametrize(("text", "value"), NON_FINITE.items())
def test_non_finite_values_are_strings_that_float_reads(text: str, value: float) -> None:
    nested = {"step": 1, "loss": value, "parts": [{"x": value}, 0.5]}
    read = strict_loads(strict_json.dumps(nested))
    assert read == {"step": 1, "loss": text, "parts": [{"x": text}, 0.5]}
    assert repr(float(read["loss"])) == repr(value)


def test_strict_json_keeps_every_bit_of_a_float() -> None:
    values = [0.1, 1 / 3, 2.0**-1074, 1.7976931348623157e308, -0.0]
    assert [value.hex() for value in strict_loads(strict_json.dumps(values))] == [
        value.hex() for value in values
    ]


def scalars(folder: Path) -> list[tuple[int, str, float]]:
    """Every scalar in the event files of a folder, in order of files: step, name, value."""
    from tensorboardX.event_file_writer import EventsWriter  # noqa: F401  (the format's writer)
    from tensorboardX.proto.event_pb2 import Event

    found = []
    for path in sorted(folder.iterdir()):
        data, at = path.read_bytes(), 0
        while at < len(data):  # TFRecord: length, its CRC, the record, its CRC
            length = int.from_bytes(data[at : at + 8], "little")
            event = Event.FromString(data[at + 12 : at + 12 + length])
            found += [(event.step, v.tag, v.simple_value) for v in event.summary.value]
            at += 12 + length + 4
    return found


def test_rows_and_events_of_a_writer(tmp_path: Path) -> None:
    with MetricsWriter(tmp_path, 0) as writer:
        writer.write({"step": 1, "loss": 2.5, "grad_norm": math.inf})
        writer.write({"step": 2, "eval_loss": 1.5})
    assert read_rows(tmp_path / "metrics.jsonl") == [
        {"step": 1, "loss": 2.5, "grad_norm": "inf"},
        {"step": 2, "eval_loss": 1.5},
    ]
    assert scalars(tmp_path / "tensorboard") == [
        (1, "loss", 2.5),
        (1, "grad_norm", math.inf),
        (2, "eval_loss", 1.5),
    ]


def test_rows_written_before_an_error_are_kept(tmp_path: Path) -> None:
    def write_and_fail() -> None:
        with MetricsWriter(tmp_path, 0) as writer:
            writer.write({"step": 1, "loss": 2.5})
            raise RuntimeError("a step failed")

    with pytest.raises(RuntimeError, match="a step failed"):
        write_and_fail()
    assert read_rows(tmp_path / "metrics.jsonl") == [{"step": 1, "loss": 2.5}]
    assert scalars(tmp_path / "tensorboard") == [(1, "loss", 2.5)]


def test_a_file_system_that_hangs_is_waited_for_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows that come later wait behind it, and are all written when it moves again."""
    monkeypatch.setattr("lmjax.runs.metrics.PATIENCE_SECONDS", 0.05)
    moves = threading.Event()
    append = MetricsWriter._append
    monkeypatch.setattr(
        MetricsWriter, "_append", lambda *arguments: (moves.wait(), append(*arguments))
    )
    patience: list[float] = []
    drained = Background.drained
    monkeypatch.setattr(
        Background, "drained", lambda self, s: (patience.append(s), drained(self, s))[1]
    )
    rows = [{"step": step, "loss": 1.0} for step in range(1, 50)]
    writer = MetricsWriter(tmp_path, 0)
    for row in rows:
        writer.write(row)
    assert not writer.flush()
    assert not writer.flush()
    assert patience == [0.05, 0]
    assert read_rows(tmp_path / "metrics.jsonl") == []
    moves.set()
    monkeypatch.setattr("lmjax.runs.metrics.PATIENCE_SECONDS", 60.0)
    writer._hangs = False
    writer.close()
    assert read_rows(tmp_path / "metrics.jsonl") == rows


def test_what_cannot_be_written_is_raised_by_the_next_call(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    writer = MetricsWriter(tmp_path, 0)
    writer.write({"step": 1, "loss": 1.0})
    assert writer.flush()
    monkeypatch.setattr(MetricsWriter, "_append", fail)
    writer.write({"step": 2, "loss": 1.0})
    with pytest.raises(OSError, match="No space"):
        writer.flush()
    with pytest.raises(OSError, match="No space"):
        writer.close()
    monkeypatch.undo()
    assert [row["step"] for row in read_rows(tmp_path / "metrics.jsonl")] == [1]


@pytest.mark.parametrize("torn", ['{"step": 3, "lo', '{"step": 3, "loss": 1.0', ""])
def test_a_resumed_writer_drops_rows_past_its_step_and_torn_ones(torn: str, tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "loss": 3.0}\n{"step": 2, "loss": 2.0}\n' + torn)
    with MetricsWriter(tmp_path, 1) as writer:
        writer.write({"step": 2, "loss": 2.25})
    assert [strict_loads(line) for line in path.read_text().splitlines()] == [
        {"step": 1, "loss": 3.0},
        {"step": 2, "loss": 2.25},
    ]


def test_replacing_a_file_never_shows_half_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "config.json"
    replace_text(path, "old")
    monkeypatch.setattr(Path, "replace", lambda *_: pytest.fail("stopped before the replacement"))
    with pytest.raises(pytest.fail.Exception):
        replace_text(path, "new")
    assert path.read_text() == "old"
    monkeypatch.undo()
    replace_text(path, "newer")
    assert [file.name for file in tmp_path.iterdir()] == ["config.json"]


def test_curves_show_what_is_there(tmp_path: Path) -> None:
    """Loss in blue, held-out loss in red, the loss scale in a panel of its own."""
    steps = range(1, 50)
    plain = [{"step": step, "loss": 5 / step, "learning_rate": 0.1} for step in steps]
    pictures = {}
    for name, rows in {
        "plain": plain,
        "evaluated": [*plain, {"step": 25, "eval_loss": 3.0}, {"step": 49, "eval_loss": 2.0}],
        "scaled": [row | {"loss_scale": 2.0 ** (row["step"] // 8)} for row in plain],
        "not finite": [*plain, {"step": 50, "loss": "nan", "eval_loss": "inf"}],
        "diverged at once": [{"step": step, "loss": "nan", "loss_scale": 2.0} for step in steps],
    }.items():
        draw_curves(rows, "title", tmp_path / f"{name}.png")
        pictures[name] = matplotlib.image.imread(tmp_path / f"{name}.png")[:, :, :3]

    def red(picture: object) -> int:
        return int(((picture[..., 0] > 0.6) & (picture[..., 2] < 0.3)).sum())  # type: ignore[index]

    def blue(picture: object) -> int:
        return int((picture[..., 2] - picture[..., 0] > 0.2).sum())  # type: ignore[index]

    assert blue(pictures["plain"]) > 200
    assert red(pictures["evaluated"]) > 5 * red(pictures["plain"]) > 0
    assert pictures["scaled"].shape[0] > pictures["plain"].shape[0]
    assert blue(pictures["not finite"]) > 200
    marks = {name: red(pictures[name]) for name in ("plain", "not finite", "diverged at once")}
    assert marks["diverged at once"] > marks["not finite"] > marks["plain"]
