"""Arbitrary text at every path and name: each layer takes it, cheaply and many times.

Whole runs whose directories and files have such names are in test_names.py.
"""

from __future__ import annotations

import contextlib
import io
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from lmjax.ablation.grid import Ablation
from lmjax.cli import common as cli
from lmjax.console.progress import say
from lmjax.console.tables import Column, print_table
from lmjax.data import DataConfig, tokenized_corpus
from lmjax.files.filenames import is_plain, plain, printable
from lmjax.runs.checkpoint import Checkpoints
from lmjax.runs.metrics import draw_curves, replace_text
from lmjax.train import Config, InputError

TROUBLE = (
    "[]{}*?!\\$%~'\"`:;|&<>#@=,^_-. \n\t\r\x01\x1b\x7f\u2028\u202e\ufeff\udce9aZ1é語\U0001f600"
)

texts = st.text(alphabet=TROUBLE, min_size=1, max_size=40) | st.text(min_size=1, max_size=40)


@st.composite
def names(draw: st.DrawFn) -> str:
    """What a file may be called on Linux: any bytes but a slash and zero, and no more than 255."""
    name = draw(
        st.text(alphabet=TROUBLE, min_size=1, max_size=40)
        | st.binary(min_size=1, max_size=60).map(os.fsdecode)
    )
    name = os.fsdecode(os.fsencode(name)[:200])
    name = name.replace("/", "-").replace("\0", "0")
    return f"{name}x" if name in (".", "..") else name


few = settings(max_examples=8, deadline=None, suppress_health_check=list(HealthCheck))
many = settings(max_examples=50, deadline=None)


@contextlib.contextmanager
def folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as place:
        yield Path(place)


@many
@given(names())
def test_a_plain_path_leads_there(name: str) -> None:
    with folder() as place:
        there = place / name
        there.mkdir()
        (plain(there) / "file").write_text("content")
        assert is_plain(plain(there))
        assert (there / "file").read_text() == "content"


@few
@given(names())
def test_a_checkpoint_below_any_name_comes_back(name: str) -> None:
    state = {"kernel": jnp.arange(6.0)}
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    wanted = {"kernel": jax.ShapeDtypeStruct((6,), jnp.float32, sharding=device)}
    with folder() as place:
        with Checkpoints(place / name, 1) as checkpoints:
            for step in (1, 2):
                checkpoints.save(step, state, {}, {})
        with Checkpoints(place / name) as reader:
            assert reader.steps() == [2]
            np.testing.assert_array_equal(reader.restore(2, wanted).state["kernel"], np.arange(6.0))


@few
@given(names(), names())
@example("texts[v2]", "a*?.txt")
def test_a_file_of_any_name_in_a_cache_of_any_name_is_text(directory: str, name: str) -> None:
    with folder() as place:
        path = place / "texts" / directory / name
        path.parent.mkdir(parents=True)
        path.write_text("This is the text. " * 20)
        config = DataConfig(
            dataset="text_files", files=(str(path),), cache_dir=str(place / "cache" / directory)
        )
        corpus = tokenized_corpus(config, window=9, progress=False)
        shutil.rmtree(place / "cache" / directory / "tokens")
        again = tokenized_corpus(config, window=9, progress=False)
        assert corpus.train.size + corpus.validation.size == 18 * 20 + 2
        assert again.fingerprint == corpus.fingerprint


@many
@given(st.lists(texts, min_size=2, max_size=2))
@example(["[v2]", "[/red] :warning:"])
def test_cells_of_a_table_are_shown_as_they_are(cells: list[str]) -> None:
    shown = [printable(cell) for cell in cells]
    with contextlib.redirect_stdout(io.StringIO()) as out:
        print_table((Column("a", "key"), Column("b")), [shown])
    assert all("".join(cell.split()) in "".join(out.getvalue().split()) for cell in shown)


@many
@given(texts)
def test_an_error_about_any_name_is_one_line(text: str) -> None:
    def fail() -> int:
        raise InputError(f"cannot write {text}: no")

    with contextlib.redirect_stderr(io.StringIO()) as err:
        assert cli.guarded(fail) == cli.BAD_INPUT
    assert len(err.getvalue().splitlines()) == 1
    assert err.getvalue() == f"error: cannot write {printable(text)}: no\n"


@many
@given(texts)
@example("a\nb\x1b[31m :warning: [red]")
def test_a_note_about_any_name_is_one_line(text: str) -> None:
    with contextlib.redirect_stderr(io.StringIO()) as err:
        say(f"starting {text}: 5 steps")
    assert err.getvalue() == f"starting {printable(text)}: 5 steps\n"


@few
@given(texts)
@example("lr$1_$ \\frac")
@example("\\$x_$ $$ \\")
def test_curves_have_any_title(title: str) -> None:
    with folder() as place:
        draw_curves([{"step": 1, "loss": 1.0}], printable(title), place / "curves.png")
        assert (place / "curves.png").stat().st_size


@many
@given(st.text())
def test_any_text_can_be_written_to_a_file(text: str) -> None:
    with folder() as place:
        replace_text(place / "report.md", text)
        (place / "report.md").read_bytes().decode("utf-8")


@many
@given(texts)
def test_an_arm_of_any_name_is_taken_or_refused_in_a_line(name: str) -> None:
    arms = {name: Config()}
    if name.isprintable() and name == name.strip():
        assert list(Ablation("runs", "?", Config(), arms, (), name, (0,)).arms) == [name]
    else:
        with pytest.raises(ValueError, match="use one line of text") as error:
            Ablation("runs", "?", Config(), arms, (), name, (0,))
        assert len(str(error.value).splitlines()) == 1
