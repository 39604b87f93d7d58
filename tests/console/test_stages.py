"""The line that says what a command is doing: live in a terminal, stamped lines elsewhere."""

from __future__ import annotations

import io
import time

import pytest

from lmjax.console import stages
from lmjax.console.stages import _Line


class Stream(io.StringIO):
    """What stderr is, in a terminal or not."""

    def __init__(self, terminal: bool) -> None:
        super().__init__()
        self._terminal = terminal

    def isatty(self) -> bool:
        return self._terminal


@pytest.fixture
def now(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """A clock that the test sets."""
    clock = [100.0]
    monkeypatch.setattr(stages.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(_Line, "_keep_updated", lambda self: None)
    return clock


def shown(monkeypatch: pytest.MonkeyPatch, *, terminal: bool) -> tuple[_Line, Stream]:
    """A line on a stream of its own."""
    stream, line = Stream(terminal), _Line()
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr("sys.stderr", stream)
    monkeypatch.setattr(stages, "_line", line)
    monkeypatch.setattr(stages.atexit, "register", lambda call: None)
    line.show()
    return line, stream


def test_in_a_file_stages_that_last_are_lines_with_a_clock(
    now: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    line, stream = shown(monkeypatch, terminal=False)
    with stages.stage("blinking"):
        now[0] += 0.5
        line.update()
    assert stream.getvalue() == ""
    with stages.stage("compiling"):
        for _ in range(80):
            now[0] += 0.5
            line.update()
    assert stream.getvalue() == "[2 s] compiling\n[32 s] compiling, for 31 s\n"


def test_in_a_terminal_the_line_is_live_and_makes_way(
    now: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    line, stream = shown(monkeypatch, terminal=True)
    with stages.stage("compiling"):
        assert stream.getvalue() == "\r\x1b[Kcompiling ... 0 s"
        now[0] += 7
        line.update()
        assert stream.getvalue().endswith("\r\x1b[Kcompiling ... 7 s")
        stages.sys.stderr.write("a note\n")
        assert stream.getvalue().endswith("7 s\r\x1b[Ka note\n")
        with stages.hidden():
            line.update()
        assert stream.getvalue().endswith("a note\n")
    stages.sys.stderr.write("done\n")
    assert stream.getvalue().endswith("a note\ndone\n")


@pytest.mark.parametrize(
    ("name", "terminal"), [("stdout", True), ("stderr", True), ("stderr", False)]
)
def test_a_line_that_is_begun_is_ended_first(
    name: str, terminal: bool, now: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    """`print` writes a text and its newline one by one, and another thread draws the stage."""
    out = Stream(terminal)
    monkeypatch.setattr("sys.stdout", out)
    line, err = shown(monkeypatch, terminal=terminal)
    with stages.stage("checking"):
        stream = getattr(stages.sys, name)
        stream.write("error: no")
        before = err.getvalue()
        now[0] += 90
        line.update()
        assert err.getvalue() == before
        stream.write("\n")
        assert (err if name == "stderr" else out).getvalue().endswith("error: no\n")
        line.update()
        assert err.getvalue() != before


def test_nothing_is_shown_that_nobody_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    with stages.stage("compiling"):
        assert stages.current() == "compiling"
        time.sleep(0)
    assert stages.current() is None
    assert capsys.readouterr() == ("", "")


def test_an_error_says_in_which_stage_it_arose() -> None:
    def fail() -> None:
        with stages.stage("running"), stages.stage("compiling"):
            raise ValueError("no")

    with pytest.raises(ValueError, match="no") as error:
        fail()
    assert stages.stage_of(error.value) == "while compiling"
    assert stages.stage_of(ValueError()) is None
