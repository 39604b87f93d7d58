"""What the documentation names exists, and its tables say what the code says."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from test_arrows import ARROWS, CONFINED

from experiments import quickstart
from lmjax.ablation.claims import load_claims
from lmjax.cli import verbs
from lmjax.cli.common import TrainFlags
from lmjax.cli.flags import known_flags
from lmjax.precision.formats import format_table
from lmjax.precision.grammar import PRESETS, parse_policy
from lmjax.precision.keys import KEYS
from lmjax.precision.sites import SITES

ROOT = Path(__file__).parents[1]
NAMED = {"import": "import_model"}
"""Functions of verbs that are words of Python."""
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
every_page = pytest.mark.parametrize("page", PAGES, ids=lambda p: p.relative_to(ROOT).as_posix())


def read(name: str) -> str:
    """A page of docs/."""
    return (ROOT / "docs" / name).read_text("utf-8")


def section(page: str, title: str) -> str:
    """What stands below a heading of the second level."""
    return page.partition(f"\n## {title}\n")[2].partition("\n## ")[0]


def table(text: str) -> list[list[str]]:
    """The cells of the first table of a text, without its header."""
    lines = re.search(r"(?:^\|.*\n)+", text, re.MULTILINE)
    assert lines, "no table"
    rows = [line.strip("|").split("|") for line in lines[0].splitlines()[2:]]
    return [[cell.strip() for cell in row] for row in rows]


def quoted(cell: str) -> list[str]:
    """The parts of a text that are set as code."""
    return re.findall(r"`([^`]+)`", cell)


@every_page
def test_files_that_a_page_names_exist(page: Path) -> None:
    named = re.findall(r"\b(?:lmjax|tests|experiments|notebooks|docs)/[\w./-]*\w", page.read_text())
    missing = [name for name in named if not list(ROOT.glob(name))]
    assert missing == []


@every_page
def test_modules_that_a_page_starts_exist(page: Path) -> None:
    started = re.findall(r"-m (experiments(?:\.[a-z_0-9]+)*)(?![\w.]*[A-Z])", page.read_text())
    assert [name for name in started if importlib.util.find_spec(name) is None] == []


@every_page
def test_verbs_that_a_page_uses_exist(page: Path) -> None:
    used = set(re.findall(r"python -m lmjax ([a-z]+)", page.read_text()))
    assert [
        verb for verb in used if not callable(getattr(verbs, NAMED.get(verb, verb), None))
    ] == []


def flags() -> Iterator[str]:
    """Every flag of an experiment, an ablation and a verb."""
    yield from known_flags(TrainFlags)
    for verb in (verbs.generate, verbs.score, verbs.evaluate, verbs.prepare, verbs.sites):
        yield from known_flags(verb)
    for verb in (
        verbs.audit,
        verbs.twin,
        verbs.replay,
        verbs.attribute,
        verbs.advise,
        verbs.quantize,
        verbs.prune,
    ):
        yield from known_flags(verb)
    for verb in (verbs.export, verbs.import_model):
        yield from known_flags(verb)
    for verb in (verbs.plan, verbs.report, verbs.reproduce, verbs.formats):
        yield from known_flags(verb)


@every_page
def test_flags_that_a_page_names_exist(page: Path) -> None:
    elsewhere = {"--worker", "--command", "--strict", "--nproc-per-node", "--help", "--no-deps"}
    sources = [*ROOT.glob("experiments/benchmarks/*.py"), ROOT / "lmjax/cli/ablation.py"]
    declared = "".join(source.read_text("utf-8") for source in sources)
    known = {f"--{name.lstrip('-')}" for name in flags()} | elsewhere
    known |= {f"{name.partition('.')[0]}.*" for name in known if "." in name}
    named = set(re.findall(r"(?<![\w-])--[a-z][a-z-]*(?:\.(?:[a-z][a-z-]*|\*))?", page.read_text()))
    missing = [n for n in named - known if n[2:].replace("-", "_") not in declared]
    assert missing == []


def test_the_rooms_and_arrows_of_the_architecture_are_those_of_the_code() -> None:
    page = section(read("architecture.md"), "Rooms")
    rooms = {quoted(room)[0]: set(quoted(imports)) for room, _, imports in table(page)}
    assert rooms == ARROWS
    frameworks = page.partition("| framework |")[1:]
    confined = {quoted(name)[0]: tuple(quoted(where)) for name, where in table("".join(frameworks))}
    assert confined == CONFINED


def test_the_floors_of_the_architecture_are_those_of_the_arrows() -> None:
    drawn = section(read("architecture.md"), "Rooms").split("```")[1].split("\n")[2:-1]
    above: set[str] = set()
    for floor in (set(line.split()) for line in drawn):
        assert not any(ARROWS[room] & (above | floor) for room in floor), floor
        above |= floor
    assert above == set(ARROWS) - {"__init__"}


def test_the_table_of_keys_is_that_of_the_grammar() -> None:
    rows = table(section(read("policies.md"), "Keys"))
    assert [quoted(row[0]) for row in rows] == [[key, row.long] for key, row in KEYS.items()]
    assert [row[2].strip("`") for row in rows] == [key.default for key in KEYS.values()]


def test_the_table_of_presets_says_what_they_stand_for() -> None:
    listed = {}
    for names, meaning in table(section(read("policies.md"), "Presets")):
        policies = quoted(meaning)
        for name, policy in zip(quoted(names), policies, strict=False):
            listed[name] = policy
        listed |= dict.fromkeys(quoted(names)[len(policies) :], "")
    assert set(PRESETS) <= set(listed)
    for name in PRESETS:
        if "=" in listed[name] or listed[name] in PRESETS:
            assert str(parse_policy(listed[name])) == str(parse_policy(name))


def test_every_example_of_a_policy_can_be_read() -> None:
    page = read("policies.md")
    for policy, *_ in table(page):
        parse_policy(quoted(policy)[0])
    wide = {site.name for site in SITES.values() if site.wide}
    sentence = page.partition("The *wide sites* ")[2].partition(" compute")[0]
    assert set(quoted(sentence)) == wide


def test_the_table_of_formats_lists_all_of_them() -> None:
    rows = {quoted(row[0])[0]: row for row in table(read("formats.md"))}
    for row in format_table():
        said = rows[row.name]
        assert (said[1], said[2], said[9]) == (str(row.bits), row.layout, row.native)
        assert said[4] == f"{row.largest:.5g}"


def test_every_claim_has_its_result() -> None:
    rows = table(section(read("claims.md"), "Results"))
    assert {name for row in rows for name in quoted(row[0])} == set(
        load_claims("experiments.ablations")
    )


def test_the_policies_of_the_readme_can_be_read() -> None:
    lines = section((ROOT / "README.md").read_text(), "A policy in ten lines").split("```")[1]
    policies = [re.split(r"\s{2,}", line)[0] for line in lines.strip().splitlines()]
    assert len(policies) == 10
    for policy in policies:
        parse_policy(f"mixed_bf16{policy}" if policy[0] in ",;" else policy)


def test_the_readme_is_one_page_whose_first_command_trains() -> None:
    page = (ROOT / "README.md").read_text("utf-8")
    assert len(page.splitlines()) < 100
    assert f"python3 bootstrap.py {quickstart.__name__}" in page
    links = re.findall(r"\]\(([^)#]+)\)", page)
    assert [link for link in links if not (ROOT / link).exists()] == []


def test_the_site_lists_every_page() -> None:
    class Loader(yaml.SafeLoader):
        """Reads the tags that mkdocs adds to YAML as nothing."""

    Loader.add_multi_constructor("", lambda *_: None)
    text = (ROOT / "mkdocs.yml").read_text("utf-8")
    listed = set(re.findall(r"[\w/-]+\.md\b", str(yaml.load(text, Loader)["nav"])))
    assert listed == {p.relative_to(ROOT / "docs").as_posix() for p in PAGES[1:]}
