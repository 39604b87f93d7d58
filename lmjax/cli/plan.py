"""Prints a plan: `python -m lmjax plan experiments.NAME`.

Knows `lmjax.plan` and how tables are printed.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from lmjax import plan
from lmjax.checks import validate
from lmjax.cli.common import print_json
from lmjax.console.tables import Column, print_table
from lmjax.console.wording import counted
from lmjax.model.config import Remat
from lmjax.parallel.sharding import MeshSize
from lmjax.plan import Plan, Roofline
from lmjax.train import Config

WEAK_SCALING = (8, 64, 256)
"""Numbers of chips that the roofline page compares."""

ROOFLINE = (
    Column("chip", "key"),
    Column("chips", "number"),
    Column("mesh"),
    *(Column(title, "number") for title in ("rows", "compute", "memory", "network")),
    Column("bound", "setting"),
    *(Column(title, "number") for title in ("least", "most", "tokens/s/chip at most")),
    Column("needs", "number"),
)

READ = """\
Collectives of the step as XLA's partitioner leaves it, before passes that only its CPU compiler
has; bytes that one device sends in a step, by ring algorithms.
Arithmetic: lmjax/plan/arithmetic.py"""


@dataclass(frozen=True)
class MeshSizes:
    """Sizes of mesh axes that differ from the experiment's own."""

    data: MeshSize | None = None
    """Divides batches; parameters are replicated."""
    fsdp: MeshSize | None = None
    """Divides batches, parameters and optimizer state."""
    tensor: MeshSize | None = None
    """Divides heads, MLP and vocabulary."""
    sequence: MeshSize | None = None
    """Divides positions of the context."""

    def __post_init__(self) -> None:
        """Rejects sizes that fit no number of devices."""
        validate(self, "mesh")

    def given(self) -> dict[str, int]:
        """The sizes that are set."""
        return {name: size for name, size in dataclasses.asdict(self).items() if size is not None}


@dataclass(frozen=True)
class ModelChanges:
    """What differs from the experiment's own model."""

    remat: Remat | None = None
    """What the backward pass recomputes."""

    def __post_init__(self) -> None:
        """Rejects values that are not listed."""
        validate(self, "model")


def changed(config: Config, model: ModelChanges, mesh: MeshSizes, **changes: Any) -> Config:
    """A config with the changes of the flags, of which None leaves the experiment's own."""
    given = {name: value for name, value in changes.items() if value is not None}
    if model.remat is not None:
        given["model"] = dataclasses.replace(config.model, remat=model.remat)
    sizes = dataclasses.replace(config.mesh, **mesh.given())
    return dataclasses.replace(config, mesh=sizes, **given)


def show_plan(config: Config, devices: int, *, json: bool) -> None:
    """Prints the sharding of arrays, and the traffic and memory of a step."""
    made = plan.make_plan(config, devices)
    arrays = list(plan.cuts(made.config, devices))
    if json:
        print_json(_plan_json(made, arrays))
        return
    sizes = " x ".join(f"{name}={size}" for name, size in made.mesh.items())
    print(f"{counted(devices, 'device')}, {sizes}; policy {made.config.precision}\n")
    _print_arrays(arrays)
    print()
    _print_traffic(made)
    print()
    _print_memory(made)
    for warning in made.program.warnings:
        print(f"XLA could move this only by making it whole on every device: {warning}")


def show_rooflines(config: Config, devices: int, *, json: bool) -> None:
    """Prints the bounds of a step on each chip, for growing numbers of them."""
    plans = [
        plan.make_plan(plan.scaled(config, devices, count) if count != devices else config, count)
        for count in sorted({*WEAK_SCALING, devices})
    ]
    found = [
        (made, plan.roofline(made.phase, made.mesh, made.sent, chip), chip)
        for chip in plan.CHIPS
        for made in plans
    ]
    if json:
        print_json(
            {
                "assumptions": plan.ASSUMPTIONS,
                "chips": [dataclasses.asdict(chip) for chip in plan.CHIPS],
                "rooflines": [
                    dataclasses.asdict(line) | {"bound": line.bound} for _, line, _ in found
                ],
            }
        )
        return
    print(f"Bounds of a step; policy {plans[0].config.precision}; rows per device are kept\n")
    print_table(ROOFLINE, [_roofline_row(made, line, chip.memory) for made, line, chip in found])
    print("\nTimes in ms. Assumptions:")
    for assumption in plan.ASSUMPTIONS:
        print(f"- {assumption}")
    for chip in plan.CHIPS:
        print(f"{chip.name}:")
        for source in chip.sources:
            print(f"- {source}")


def _print_arrays(arrays: Iterable[plan.Cut]) -> None:
    total = 0
    rows = []
    for cut in arrays:
        total += cut.bytes
        shape = " x ".join(map(str, cut.shape))
        rows.append((cut.path, shape, cut.dtype, " ".join(cut.spec), size_in_words(cut.bytes)))
    rows.append(("in all", "", "", "", size_in_words(total)))
    columns = Column("array", "key"), Column("shape"), Column("dtype"), Column("divided by")
    print_table((*columns, Column("per device", "number")), rows)


def _print_traffic(made: Plan) -> None:
    rows = [_traffic_row(row) for row in made.rows]
    sent = sum(row.sent for row in made.rows)
    expected = sum(row.expected for row in made.rows)
    ratio = f"{sent / expected:.4f}" if expected else ""
    rows.append(("in all", "", "", "", "", size_in_words(sent), size_in_words(expected), ratio))
    named = Column("for", "key"), Column("collective"), Column("dtype"), Column("along")
    numbers = (Column(title, "number") for title in ("count", "sent", "arithmetic", "ratio"))
    print_table((*named, *numbers), rows)
    print(READ)


def _traffic_row(row: plan.TrafficRow) -> tuple[str, ...]:
    ratio = "" if row.ratio is None else f"{row.ratio:.4f}"
    along = " x ".join(row.axes)
    expected = size_in_words(row.expected) if row.expected else ""
    return (
        row.purpose, row.kind, row.dtype, along, str(row.count), size_in_words(row.sent), expected,
        ratio,
    )  # fmt: skip


def _print_memory(made: Plan) -> None:
    parts = made.memory
    total, peak = sum(parts.values()), made.program.memory.peak
    rows = [(name, size_in_words(size)) for name, size in parts.items()]
    rows += [
        ("sum", size_in_words(total)),
        ("compiled, on CPU", size_in_words(peak)),
        ("compiled / sum", f"{peak / total:.4f}"),
        ("elsewhere, by the sum", size_in_words(total - parts[plan.CPU_ONLY])),
    ]
    print_table((Column("peak memory", "key"), Column("per device", "number")), rows)


def _roofline_row(made: Plan, line: Roofline, memory: float) -> tuple[str, ...]:
    mesh = " x ".join(f"{name}={size}" for name, size in made.mesh.items() if size > 1)
    times = (line.compute, line.memory, line.sent)
    needs = sum(size for name, size in made.memory.items() if name != plan.CPU_ONLY)
    speed = line.tokens / line.devices / line.least
    return (
        line.chip, str(line.devices), mesh or "1", str(made.config.batch_size),
        *(f"{1000 * time:.1f}" for time in times), line.bound,
        f"{1000 * line.least:.1f}", f"{1000 * line.most:.1f}", f"{speed:,.0f}",
        f"{needs / memory:.0%} of {size_in_words(memory)}",
    )  # fmt: skip


def _plan_json(made: Plan, arrays: list[plan.Cut]) -> dict[str, Any]:
    memory = made.program.memory
    return {
        "mesh": made.mesh,
        "precision": made.config.precision,
        "arrays": [dataclasses.asdict(cut) for cut in arrays],
        "collectives": [dataclasses.asdict(row) | {"ratio": row.ratio} for row in made.rows],
        "memory": {"parts": made.memory, "compiled": dataclasses.asdict(memory)},
        "warnings": made.program.warnings,
    }


def size_in_words(size: float) -> str:
    """Bytes in decimal units, three digits."""
    for unit in ("B", "kB", "MB", "GB"):
        if size < 999.5 or unit == "GB":
            return f"{size:.3g} {unit}" if size < 999.5 else f"{size:.0f} {unit}"
        size /= 1000
    raise AssertionError
