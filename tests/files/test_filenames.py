"""Any name that a file system takes is a name here too."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from run_helpers import NAMES, ROOT

from lmjax.files.filenames import expanded, is_plain, plain, printable


@pytest.mark.parametrize("name", NAMES)
def test_the_plain_path_leads_to_the_same_place(name: str, tmp_path: Path) -> None:
    there = tmp_path / name
    link = plain(there)  # before the place exists
    there.mkdir()
    (link / "file").write_text("content", encoding="utf-8")
    assert (there / "file").read_text(encoding="utf-8") == "content"
    assert is_plain(link)
    assert plain(there) == link


def test_a_path_without_surprises_is_left_alone(tmp_path: Path) -> None:
    for name in ("runs/b-1_2.3", "a b", "Привет", "a=b,c@d+e"):
        assert plain(tmp_path / name) == tmp_path / name


@pytest.mark.parametrize("root", ["gs", "s3", "az", "hf"])
def test_a_root_that_orbax_takes_for_a_store_gets_another_name(root: str) -> None:
    assert plain(Path(f"/{root}/runs")) != Path(f"/{root}/runs")


def test_a_link_that_a_cleaner_has_removed_is_made_again(tmp_path: Path) -> None:
    link = plain(tmp_path / "b[1]")
    shutil.rmtree(link.parent)
    assert plain(tmp_path / "b[1]").resolve() == (tmp_path / "b[1]").resolve()


def test_links_go_with_their_process_and_not_with_a_fork_of_it(tmp_path: Path) -> None:
    script = (
        "import os, sys; from pathlib import Path; from lmjax.files.filenames import plain\n"
        "link = plain(Path(sys.argv[1]))\n"
        "if os.fork() == 0: sys.exit()\n"
        "os.wait(); assert link.is_symlink(); print(link)"
    )
    run = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / "b[1]")],
        env={**os.environ, "PYTHONPATH": str(ROOT), "TMPDIR": str(tmp_path)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert run.stdout.startswith(str(tmp_path))
    assert list(tmp_path.iterdir()) == []


def test_a_temporary_directory_that_is_not_plain_is_passed_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "t[1]").mkdir()
    imports = "from pathlib import Path; from lmjax.files.filenames import plain"
    script = f"{imports}; print(plain(Path('a*')))"
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TMPDIR": str(tmp_path / "t[1]")}
    run = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True
    )
    assert is_plain(run.stdout.strip())


def test_home_is_expanded_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert expanded("~/runs") == tmp_path / "runs"
    assert expanded("./~") == Path("~")
    assert expanded("a~b/~") == Path("a~b/~")
    assert expanded("~nobody-of-this-name/x") == Path("~nobody-of-this-name/x")


@given(st.text())
@example("a\nb\x1b[31m\udce9\u2028")
def test_whatever_is_printed_stays_one_line_and_can_be_encoded(text: str) -> None:
    line = printable(text)
    assert line.encode("utf-8").decode() == line
    assert len(line.splitlines()) <= 1
    assert not any(ord(character) < 32 for character in line)


def test_ordinary_text_is_printed_as_it_is() -> None:
    assert printable("runs/Привет [1] $x$ 語") == "runs/Привет [1] $x$ 語"
    assert printable(Path("a\nb")) == "a\\nb"
