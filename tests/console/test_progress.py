"""What a person sees: lines where there is no terminal, nothing when nothing is wanted."""

from __future__ import annotations

import pytest

from lmjax.console import progress
from lmjax.console.progress import Reporter

ROW = {
    "step": 10,
    "loss": 2.34567,
    "tokens_per_second": 12345.6,
    "loss_scale": 1.0,
    "skipped_steps": 0,
}


class Loss:
    """The loss of a step that is done, or not yet."""

    ready = True

    def is_ready(self) -> bool:
        return self.ready


def test_the_bar_shows_steps_that_are_done() -> None:
    report, losses = Reporter(0, 100), {step: Loss() for step in (1, 2, 3)}
    losses[2].ready = losses[3].ready = False
    for step, loss in losses.items():
        report.dispatched(step, loss)
    (task,) = report._bar.tasks
    assert task.completed == 1
    losses[2].ready = losses[3].ready = True
    list(report._bar.get_renderables())
    assert task.completed == 3


def test_lines_with_loss_and_speed_where_there_is_no_terminal(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with Reporter(0, 100) as report:
        report.dispatched(10, Loss())
        report.metrics(ROW)
    out, err = capsys.readouterr()
    assert out == ""
    assert "step 10/100  loss 2.3457  12,346 tokens/s" in err
    assert "scale" not in err


def test_utilisation_and_memory_where_they_are_known(capsys: pytest.CaptureFixture[str]) -> None:
    with Reporter(0, 100) as report:
        report.metrics(ROW | {"mfu": 0.4137, "peak_memory_bytes": 3 * 2**29})
    assert "12,346 tokens/s  MFU 41.4%  1.50 GiB" in capsys.readouterr().err


def test_loss_scale_and_skipped_steps_when_there_are_any(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with Reporter(0, 100) as report:
        report.metrics(ROW | {"loss_scale": 2.0**15, "skipped_steps": 3})
    assert "scale 2^15  3 skipped" in capsys.readouterr().err


def test_lines_come_seconds_apart(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = iter([100.0, 105.0, 110.0])
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(now, 200.0))
    report = Reporter(0, 100)
    for step in (1, 2, 3):
        report.metrics(ROW | {"step": step})
    shown = [line.split()[1] for line in capsys.readouterr().err.splitlines()]
    assert shown == ["1/100", "3/100"]


def test_markup_in_a_note_is_text(capsys: pytest.CaptureFixture[str]) -> None:
    Reporter(0, 100).note("wrote runs/[red]x[/red]")
    assert capsys.readouterr().err == "wrote runs/[red]x[/red]\n"


def test_silent_when_asked(capsys: pytest.CaptureFixture[str]) -> None:
    with Reporter(0, 100, enabled=False) as report:
        report.dispatched(10, Loss())
        report.metrics(ROW)
        report.note("done")
    assert capsys.readouterr() == ("", "")
