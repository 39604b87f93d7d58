"""Rooms import only what lies below them, and each framework stays in the room that wraps it."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import lmjax

ROOT = Path(lmjax.__file__).parent

ARROWS = {
    "stages": set(),
    "interrupts": {"stages"},
    "opening": {"interrupts", "stages"},
    "chips": set(),
    "precision": set(),
    "filenames": set(),
    "data": {"filenames", "stages"},
    "sharding": set(),
    "distributed": set(),
    "forecast": {"precision"},
    "loss_scale": {"forecast", "precision"},
    "storage": {"precision"},
    "optimizer": {"storage", "loss_scale", "forecast", "precision"},
    "model": {"precision"},
    "numerics": {
        "model", "optimizer", "storage", "loss_scale", "forecast", "sharding", "precision",
        "filenames",
    },
    "train": {
        "model", "data", "optimizer", "storage", "loss_scale", "forecast", "sharding", "precision",
        "numerics", "filenames", "stages", "interrupts", "chips",
    },
    "hlo": {"precision"},
    "plan": {
        "hlo", "train", "model", "sharding", "precision", "stages", "chips",
    },
    "inference": {
        "train", "model", "data", "optimizer", "storage", "loss_scale", "forecast", "sharding",
        "precision", "numerics", "filenames", "stages",
    },
    "ablation": {
        "train", "model", "data", "optimizer", "storage", "loss_scale", "sharding", "precision",
        "numerics", "filenames", "stages",
    },
}  # fmt: skip
"""What each room of lmjax may import from the others; a room that is not listed may import all."""

BELOW_ALL = {"checks", "strict_json", "wording"}
"""What every room may import, and which import none."""

CONFINED = {
    "flax": ("model/",),
    "orbax": ("train/checkpoint.py",),
    "grain": ("data/",),
    "tensorflow_datasets": ("data/",),
    "array_record": ("data/",),
    "tokenizers": ("data/",),
    "tyro": ("cli.py", "flags.py", "verbs.py", "ablation_cli.py"),
    "fsspec": ("train/object_store.py",),
    "submitit": ("ablation/pools.py",),
    "tensorboardX": ("train/metrics.py",),
    "jmp": ("precision/",),
    "jinja2": ("ablation/report_page.py",),
    "json": ("strict_json.py",),
}
"""Where a framework may be imported."""

LAZY = ("matplotlib",)
"""Imported inside functions alone, slow to load and not needed to train; or at the top of a file
`*_plot.py`, which is then itself imported inside functions alone."""


def imports(source: str) -> list[tuple[str, bool]]:
    """Every imported module or name, dotted, and whether it is imported at the top of the file."""
    tree = ast.parse(source)
    deferred = {
        id(node)
        for function in ast.walk(tree)
        if isinstance(function, (ast.FunctionDef, ast.AsyncFunctionDef))
        for node in ast.walk(function)
    }
    found = []
    for node in ast.walk(tree):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, "relative imports hide where an arrow goes"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        found += [(name, id(node) not in deferred) for name in names]
    return found


def violations(path: str, source: str) -> list[str]:
    """What a file `path` (below lmjax/) imports although it may not."""
    room = path.split("/")[0].removesuffix(".py")
    wrong = []
    for name, at_top in imports(source):
        top, *rest = name.split(".")
        if top in ("experiments", "tests", "notebooks"):
            wrong.append(f"{path} imports {name}: nothing imports {top}")
        allowed = set() if room in BELOW_ALL else ARROWS.get(room, {*rest}) | BELOW_ALL
        if top == "lmjax" and rest and rest[0] not in allowed | {room}:
            wrong.append(f"{path} imports {name}: no arrow from {room} to {rest[0]}")
        if top in CONFINED and not path.startswith(CONFINED[top]):
            wrong.append(f"{path} imports {name}: only {', '.join(CONFINED[top])} may")
        lazy = top in LAZY or any(part.endswith("_plot") for part in name.split("."))
        if lazy and at_top and not path.endswith("_plot.py"):
            wrong.append(f"{path} imports {name} at its top: import it where it is used")
    return wrong


FILES = sorted(ROOT.rglob("*.py"))


@pytest.mark.parametrize("file", FILES, ids=lambda f: f.relative_to(ROOT).as_posix())
def test_arrows_point_one_way(file: Path):
    assert violations(file.relative_to(ROOT).as_posix(), file.read_text("utf-8")) == []


def test_every_room_with_arrows_is_found():
    present = {file.relative_to(ROOT).parts[0].removesuffix(".py") for file in FILES}
    assert set(ARROWS) - {"numerics"} <= present


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("precision/policy.py", "from lmjax.model import ModelConfig"),
        ("precision/policy.py", "from lmjax import loss_scale"),
        ("data/corpus.py", "import lmjax.precision.formats"),
        ("model/layers.py", "from lmjax.sharding import constrain"),
        ("model/layers.py", "def f():\n    from lmjax import optimizer"),
        ("loss_scale.py", "from lmjax import optimizer"),
        ("storage.py", "from lmjax.model import param_sites"),
        ("storage.py", "from lmjax.optimizer import make_optimizer"),
        ("sharding.py", "from lmjax.precision import exact"),
        ("train/loop.py", "from lmjax.inference import generate"),
        ("train/loop.py", "import lmjax.cli"),
        ("cli.py", "import experiments.quickstart"),
        ("train/step.py", "from flax import nnx"),
        ("train/state.py", "import orbax.checkpoint as ocp"),
        ("train/loop.py", "import grain"),
        ("train/config.py", "import tyro"),
        ("train/remote.py", "import fsspec"),
        ("train/metrics.py", "import matplotlib.pyplot"),
        ("train/metrics.py", "import json"),
        ("checks.py", "from lmjax.precision import formats"),
        ("cli.py", "from lmjax.numerics.format_plot import draw_number_lines"),
    ],
)
def test_a_violation_is_caught(path: str, source: str):
    assert len(violations(path, source)) == 1


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("train/metrics.py", "def draw():\n    from matplotlib.figure import Figure"),
        ("numerics/format_plot.py", "import matplotlib"),
        ("cli.py", "from lmjax.inference import generate\nimport tyro"),
        ("model/decoder.py", "from flax import nnx\nfrom lmjax.model.config import ModelConfig"),
    ],
)
def test_what_is_allowed_passes(path: str, source: str):
    assert violations(path, source) == []
