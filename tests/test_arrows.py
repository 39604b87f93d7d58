"""Rooms import only what lies below them, and each framework stays in the room that wraps it."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import lmjax

ROOT = Path(lmjax.__file__).parent

ARROWS = {
    "precision": set(),
    "files": set(),
    "console": {"files"},
    "data": {"console", "files"},
    "hlo": {"precision"},
    "inspection": {"hlo", "precision"},
    "model": {"precision"},
    "optim": {"precision"},
    "parallel": {"console", "precision"},
    "telemetry": {"files", "model", "optim", "precision"},
    "runs": {"console", "data", "files", "model", "optim", "parallel", "precision", "telemetry"},
    "interop": {
        "console", "data", "files", "model", "optim", "parallel", "precision", "runs",
    },
    "train": {
        "chips", "console", "data", "files", "inspection", "interop", "model", "optim", "parallel",
        "precision", "runs", "telemetry",
    },
    "audit": {
        "console", "inspection", "model", "parallel", "plan", "precision", "runs", "train",
    },
    "plan": {"chips", "console", "hlo", "model", "parallel", "precision", "runs", "train"},
    "diagnosis": {
        "chips", "console", "data", "files", "interop", "model", "optim", "parallel", "precision",
        "runs", "telemetry", "train",
    },
    "inference": {"console", "data", "model", "parallel", "precision", "runs", "train"},
    "ablation": {"console", "data", "files", "runs", "train"},
    "compression": {
        "console", "data", "files", "inference", "model", "optim", "parallel", "precision", "runs",
        "train",
    },
    "cli": {
        "ablation", "audit", "compression", "console", "data", "diagnosis", "files", "inference",
        "inspection", "interop", "model", "parallel", "plan", "precision", "runs", "telemetry",
        "train",
    },
    "chips": set(),
    "__init__": {"console"},
    "__main__": {"cli", "console"},
}  # fmt: skip
"""What each room of lmjax imports from the others: all of it is used, and nothing else may be."""

BELOW_ALL = {"checks", "errors", "strict_json"}
"""What every room may import, and which import nothing of lmjax."""

CONFINED = {
    "flax": ("model/",),
    "orbax": ("runs/checkpoint.py",),
    "grain": ("data/",),
    "tensorflow_datasets": ("data/",),
    "array_record": ("data/",),
    "tokenizers": ("data/",),
    "tyro": ("cli/",),
    "safetensors": ("interop/tensors.py",),
    "lm_eval": ("inference/harness.py",),
    "fsspec": ("runs/store/object_store.py",),
    "submitit": ("ablation/pools.py",),
    "tensorboardX": ("runs/metrics.py",),
    "jmp": ("precision/",),
    "jinja2": ("ablation/report_page.py", "audit/page.py"),
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


def test_every_room_has_its_arrows_and_takes_them_all():
    taken: dict[str, set[str]] = {}
    for file in FILES:
        room = file.relative_to(ROOT).parts[0].removesuffix(".py")
        names = [name.split(".") for name, _ in imports(file.read_text("utf-8"))]
        rooms = {rest[0] for top, *rest in names if top == "lmjax" and rest}
        taken.setdefault(room, set()).update(rooms - {room} - BELOW_ALL)
    assert all(not taken.pop(room) for room in BELOW_ALL)
    assert taken == ARROWS


def circles(arrows: dict[str, set[str]]) -> set[str]:
    """Whatever can be reached from itself."""

    def reached(start: str) -> set[str]:
        seen: set[str] = set()
        waiting = [start]
        while waiting:
            for end in arrows.get(waiting.pop(), set()) - seen:
                seen.add(end)
                waiting.append(end)
        return seen

    return {name for name in arrows if name in reached(name)}


def test_no_room_is_above_itself():
    assert circles(ARROWS) == set()
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == {"b", "c"}


def test_no_module_imports_itself_by_way_of_others():
    """Imports for type checkers count: a circle of types is a circle of meaning."""
    modules = {}
    for file in FILES:
        parts = file.relative_to(ROOT.parent).with_suffix("").parts
        modules[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = file
    arrows = {}
    for module, file in modules.items():
        names = [name for name, _ in imports(file.read_text("utf-8"))]
        known = {n if n in modules else n.rpartition(".")[0] for n in names} & set(modules)
        arrows[module] = known - {module, *packages_of(module)}
    assert circles(arrows) == set()


def packages_of(module: str) -> set[str]:
    """The packages that a module is in, whose faces import it."""
    parts = module.split(".")
    return {".".join(parts[:end]) for end in range(1, len(parts))}


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("precision/policy.py", "from lmjax.model import ModelConfig"),
        ("precision/policy.py", "from lmjax.optim import loss_scale"),
        ("data/corpus.py", "import lmjax.precision.formats"),
        ("model/layers.py", "from lmjax.parallel.sharding import constrain"),
        ("model/layers.py", "def f():\n    from lmjax.optim import optimizer"),
        ("optim/loss_scale.py", "from lmjax.telemetry import rows"),
        ("optim/storage.py", "from lmjax.model import param_sites"),
        ("files/manifest.py", "from lmjax.console.stages import stage"),
        ("runs/state.py", "from lmjax.train.step import train_step"),
        ("train/loop.py", "from lmjax.inference import generate"),
        ("train/loop.py", "import lmjax.cli.common"),
        ("cli/common.py", "import experiments.quickstart"),
        ("train/step.py", "from flax import nnx"),
        ("runs/state.py", "import orbax.checkpoint as ocp"),
        ("train/loop.py", "import grain"),
        ("runs/config.py", "import tyro"),
        ("runs/store/remote.py", "import fsspec"),
        ("runs/metrics.py", "import matplotlib.pyplot"),
        ("runs/metrics.py", "import json"),
        ("checks.py", "from lmjax.precision import formats"),
        ("cli/common.py", "from lmjax.telemetry.format_plot import draw_number_lines"),
    ],
)
def test_a_violation_is_caught(path: str, source: str):
    assert len(violations(path, source)) == 1


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("runs/metrics.py", "def draw():\n    from matplotlib.figure import Figure"),
        ("telemetry/format_plot.py", "import matplotlib"),
        ("cli/common.py", "from lmjax.inference import generate\nimport tyro"),
        ("model/decoder.py", "from flax import nnx\nfrom lmjax.model.config import ModelConfig"),
    ],
)
def test_what_is_allowed_passes(path: str, source: str):
    assert violations(path, source) == []
