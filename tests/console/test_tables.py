"""Tables lose nothing at any width: the key stays whole, and every cell is somewhere."""

from __future__ import annotations

import functools
import unicodedata
from collections.abc import Sequence

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from rich.cells import cell_len

from lmjax.ablation.claims import load_claims as load
from lmjax.cli import claims as reproduce
from lmjax.cli import verbs
from lmjax.console import tables
from lmjax.console.tables import Column, print_table, table_lines
from lmjax.files.filenames import printable
from lmjax.precision.formats import format_table

WIDTHS = (60, 80, 100, 140)

names = st.text(
    st.characters(exclude_categories=("Cs",)) | st.sampled_from("[]\\$\x1b\n\t\u6f22\u0301"),
    min_size=1,
    max_size=30,
)
sentences = st.lists(names, max_size=12).map(" ".join)


@st.composite
def any_tables(draw: st.DrawFn) -> tuple[list[Column], list[list[str]]]:
    roles = draw(st.lists(st.sampled_from(("value", "number")), max_size=6))
    roles = ["key", *roles, *["text"] * draw(st.integers(0, 2))]
    columns = [Column(f"title {index}", role) for index, role in enumerate(roles)]
    row = st.tuples(*(sentences if role == "text" else names for role in roles))
    return columns, [list(one) for one in draw(st.lists(row, min_size=1, max_size=4))]


load_claims = functools.cache(load)


def squeezed(text: str) -> str:
    return "".join(text.split())


@settings(max_examples=150, deadline=None)
@given(any_tables(), st.integers(40, 150))
@example(
    (
        [Column("k", "key"), Column("v"), Column("t", "text")],
        [["[v2]", "\x1b[31m", "\u6f22 " * 60]],
    ),
    40,
)
@example(([Column("k", "key"), Column("t", "text")], [["a", "e\u0301" * 90]]), 40)
def test_no_cell_is_lost_and_no_key_is_cut(
    table: tuple[Sequence[Column], Sequence[Sequence[str]]], width: int
) -> None:
    columns, rows = table
    lines = table_lines(columns, rows, width=width)
    everything = squeezed("".join(lines))
    longest_key = max(cell_len(printable(row[0])) for row in rows)
    for row in rows:
        assert any(line.startswith(printable(row[0]).rstrip()) for line in lines[1:])
        assert all(squeezed(printable(cell)) in everything for cell in row)
    assert all(cell_len(line) <= max(width, longest_key) for line in lines)
    assert all(line == printable(line) for line in lines), "a terminal obeys nothing in a cell"


@pytest.mark.parametrize("width", WIDTHS)
def test_a_mark_stays_with_its_letter(width: int) -> None:
    lines = table_lines(
        [Column("k", "key"), Column("t", "text")], [["a", "e\u0301" * 200]], width=width
    )
    assert not any(unicodedata.combining(line.lstrip()[0]) for line in lines)


def test_columns_line_up_by_what_a_terminal_shows() -> None:
    rows = [["\u6f22\u5b57", "x", "1.5"], ["e\u0301", "[b]", "10.25"], ["abcd", "", "7"]]
    lines = table_lines([Column("name", "key"), Column("v"), Column("n", "number")], rows)
    assert {cell_len(line) for line in lines} == {len("name  [b]  10.25")}
    starts = [cell_len(lines[1].partition("x")[0]), cell_len(lines[2].partition("[b]")[0])]
    assert starts == [6, 6]


def test_settings_that_do_not_vary_are_said_once() -> None:
    columns = [Column("site", "key"), *(Column(key, "setting") for key in "pcxwm")]
    rows = [["up", "f32", "f16", "f16", "f16", ""], ["norm", "f32", "f32", "f32", "f32", ""]]
    assert table_lines(columns, rows, each="site") == [
        "site  c",
        "up    f16",
        "norm  f32",
        "in every site: p f32, m none; x and w the same as c",
    ]
    assert table_lines(columns, rows[:1])[0].split() == ["site", "p", "c", "x", "w", "m"]


def test_values_are_not_said_once() -> None:
    columns = [Column("arm", "key"), Column("seed 0", "number"), Column("seed 1", "number")]
    assert table_lines(columns, [["a", "2.5", "2.5"], ["b", "2.5", "2.5"]])[1:] == [
        "a       2.5     2.5",
        "b       2.5     2.5",
    ]


def test_text_is_wrapped_beside_its_row_or_below_it() -> None:
    columns = [Column("name", "key"), Column("runs"), Column("claim", "text")]
    row = ["loss_scaling", "6 arms", "f16 needs loss scaling " + "and more " * 4]
    assert table_lines(columns, [row], width=60) == [
        "name          runs    claim",
        "loss_scaling  6 arms  f16 needs loss scaling and more and",
        "                      more and more and more",
    ]
    assert table_lines(columns, [row], width=40) == [
        "name          runs",
        "loss_scaling  6 arms",
        "    claim: f16 needs loss scaling and",
        "      more and more and more and more",
    ]


@pytest.mark.parametrize("roles", [("value", "key"), ("key", "key"), ("key", "text", "value")])
def test_columns_in_another_order_are_refused(roles: Sequence[tables.Role]) -> None:
    with pytest.raises(ValueError, match="key, others and then text"):
        table_lines([Column("a", role) for role in roles], [])


def test_a_table_without_rows_is_its_header() -> None:
    assert table_lines([Column("a", "key"), Column("b", "setting")], [], width=40) == ["a  b"]


def test_files_get_whole_rows(capsys: pytest.CaptureFixture[str]) -> None:
    print_table([Column("a", "key"), Column("b", "text")], [["[v2]", "long " * 500]])
    assert len(capsys.readouterr().out.splitlines()) == 2


def captured(monkeypatch: pytest.MonkeyPatch, width: int, call: object) -> list[str]:
    """The lines of the tables that a call prints to a terminal so wide."""
    found: list[str] = []
    at_width = lambda columns, rows, *, each="row": found.extend(
        table_lines(columns, list(rows), each=each, width=width)
    )
    for module in (verbs, reproduce):
        monkeypatch.setattr(module, "print_table", at_width)
    call()  # type: ignore[operator]
    assert all(cell_len(line) <= width for line in found)
    return found


@pytest.mark.parametrize("width", WIDTHS)
def test_the_list_of_claims_shows_the_name_to_type(
    width: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    claims = load_claims("experiments.ablations")
    monkeypatch.setattr(reproduce, "load_claims", lambda _: claims)
    lines = captured(monkeypatch, width, lambda: reproduce.list_claims(json=False))
    at = next(index for index, line in enumerate(lines) if line.startswith("bf16_weights "))
    assert " ".join(" ".join(lines[at:]).split()).startswith(CLAIM[width])


CLAIM = {
    60: "bf16_weights A5 6 arms x 3 seeds yes claim: bf16 weights need stochastic rounding or "
    "Kahan summation source: Zamirai et al. 2020, arXiv 2010.06192, abstract; Rae et al. 2021, "
    "arXiv 2112.11446, appendix C",
}
CLAIM[80] = CLAIM[60]
CLAIM[100] = CLAIM[140] = CLAIM[60].replace("claim: ", "")

SITES = """\
site                          c    o    products on cpu
embed                         f16  f16
positions                     f16  f16
blocks/0-3/residual           f16  f16
blocks/0-3/attention/norm     f32  f32
blocks/0-3/attention/query    f16  f16  emulated in f32
blocks/0-3/attention/key      f16  f16  emulated in f32
blocks/0-3/attention/value    f16  f16  emulated in f32
blocks/0-3/attention/scores   f16  f32  emulated in f32
blocks/0-3/attention/softmax  f32  f32  blockwise
blocks/0-3/attention/combine  f16  f16  emulated in f32
blocks/0-3/attention/out      f16  f16  emulated in f32
blocks/0-3/mlp/norm           f32  f32
blocks/0-3/mlp/up             f16  f16  emulated in f32
blocks/0-3/mlp/activation     f32  f32
blocks/0-3/mlp/down           f16  f16  emulated in f32
norm                          f32  f32
head                          f16  f32  emulated in f32
loss                          f32  f32
"""


@pytest.mark.parametrize("width", WIDTHS)
def test_the_table_of_sites_fits_every_terminal(
    width: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = captured(monkeypatch, width, lambda: verbs.sites("experiments.quickstart"))
    assert lines[:19] == SITES.splitlines()
    assert " ".join(" ".join(lines[19:]).split()) == (
        "in every site: p f32, a f32, m highest, r f32, mu f32, nu f32; "
        "w, x, g, wb, xb and kv the same as c"
    )


@pytest.mark.parametrize("width", WIDTHS)
def test_the_table_of_formats_keeps_every_column(
    width: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = captured(monkeypatch, width, verbs.formats)
    assert [line.split()[0] for line in lines[1:] if line[0] != " "] == [
        row.name for row in format_table()
    ]
    at = next(index for index, line in enumerate(lines) if line.startswith("e4m3 "))
    assert lines[at : at + len(E4M3[width])] == E4M3[width]


E4M3 = {
    60: [
        "e4m3         8  1+4+3 fn             7          448     2^-6",
        "    subnormal: 2^-9  inf: no  NaN: yes",
        "    native: float8_e4m3fn",
    ],
    80: [
        "e4m3         8  1+4+3 fn             7          448     2^-6       2^-9  no",
        "    NaN: yes  native: float8_e4m3fn",
    ],
    100: [
        "e4m3         8  1+4+3 fn             7          448     2^-6       2^-9  no   yes  "
        "float8_e4m3fn"
    ],
}
E4M3[140] = E4M3[100]


def test_a_terminal_gets_the_lines_as_they_are(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Rich, which writes them, neither wraps, cuts nor reads them as markup."""
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    monkeypatch.setenv("COLUMNS", "40")
    monkeypatch.setenv("TERM", "xterm")
    columns = [Column("key", "key"), Column("claim", "text")]
    rows = [("[red]:warning:" + "k" * 50, "long text " * 9)]
    print_table(columns, rows)
    out = capsys.readouterr().out.replace("\x1b[1m", "").replace("\x1b[0m", "")
    assert out.splitlines() == table_lines(columns, rows, width=40)
