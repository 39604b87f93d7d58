"""What happens to what is printed decides nothing."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from pathlib import Path

import pytest
from run_helpers import ROOT

from lmjax.console.streams import Stream


class Refusing(io.StringIO):
    """A stream whose disk is full."""

    encoding = "utf-8"

    def write(self, text: str) -> int:
        raise OSError(28, "No space left on device")


@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "utf-8"])
def test_what_a_terminal_lacks_is_written_as_escapes(encoding: str) -> None:
    inner = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    stream = Stream(inner)
    stream.write("Жизнь caf\udce9 x\n")
    stream.flush()
    written = inner.buffer.getvalue().decode(encoding)  # type: ignore[attr-defined]
    assert written.endswith("caf\\udce9 x\n")
    assert written.startswith("Жизнь" if encoding == "utf-8" else "\\u0416")
    assert stream.failure is None


def test_a_failure_is_remembered_and_not_raised() -> None:
    stream = Stream(Refusing())
    stream.write("text")
    stream.write("more")
    stream.flush()
    assert stream.failure is not None
    assert stream.failure.errno == 28


SCRIPT = """
import sys
from lmjax.cli.common import guarded
def work():
    for number in range(3000):
        print("line", number)
        print("line", number, file=sys.stderr)
    open(sys.argv[1], "w").write("done")
    return 0
sys.exit(guarded(work, prints_results=sys.argv[2] == "result"))
"""


@pytest.mark.parametrize(
    ("redirection", "what", "code"),
    [
        (">/dev/full", "decoration", 0),
        (">/dev/full", "result", 1),
        ("2>/dev/full", "result", 0),
        (">&- 2>&- <&-", "decoration", 0),
        ("| head -1", "result", 0),
        ("2>&1 >/dev/null | head -1", "result", 0),
    ],
)
def test_streams_that_are_full_closed_or_left(
    redirection: str, what: str, code: int, tmp_path: Path
) -> None:
    done = tmp_path / "done"
    shell = f"set -o pipefail; {sys.executable} -c '{SCRIPT.replace(chr(39), '')}' {done} {what} "
    run = subprocess.run(
        ["bash", "-c", shell + redirection],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert run.returncode == code
    assert done.read_text(encoding="utf-8") == "done"
    assert "Traceback" not in run.stderr
    assert "Exception ignored" not in run.stderr
    if code:
        assert "error: cannot write to standard output: No space left on device" in run.stderr
