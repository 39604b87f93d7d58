"""Prints what the compilers of chips make of a run: `python -m lmjax plan --target CHIP:SHAPE`.

Knows `lmjax.plan` and how tables are printed.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any

from lmjax import plan
from lmjax.cli.common import print_json
from lmjax.cli.plan import size_in_words
from lmjax.console.tables import Column, print_table
from lmjax.plan import ChipPlan, Suggestion
from lmjax.train import Config

KERNELS = (Column("kernel", "key"), Column("library"), Column("times", "number"))
PRODUCTS = (
    Column("product", "key"),
    *(Column(title) for title in ("sum", "precision", "by")),
    *(Column(title, "number") for title in ("times", "of all FLOP")),
)
SENT = (
    Column("collective", "key"),
    *(Column(title) for title in ("dtype", "along")),
    *(Column(title, "number") for title in ("times", "sent")),
)


def show_chip_plan(config: Config, target: plan.Target, *, json: bool) -> None:
    """Prints memory, kernels, products and collectives of a step on chips, and whether it fits."""
    made = plan.plan_for_chips(config, target)
    found = None if made.fits else plan.suggestion(made)
    if json:
        print_json(_json(made) | {"suggestion": None if found is None else _suggested(found)})
        return
    sizes = " x ".join(f"{name}={size}" for name, size in made.mesh.items())
    print(f"{target.devices} x {target.title} ({target.name}), {sizes}")
    print(f"policy {made.config.precision}")
    if made.compiled is not None:
        print(f"compiled by {made.compiled.compiler} in {made.compiled.seconds:.0f} s")
    print()
    _print_memory(made)
    print(f"\n{verdict(made)}")
    if not made.fits:
        print(_in_words(found))
    if made.compiled is not None:
        _print_program(made)


def verdict(made: ChipPlan) -> str:
    """Whether a plan fits, in a sentence."""
    target, peak = made.target, made.memory.peak
    has = f"{size_in_words(target.memory)} of a {target.title}"
    if made.fits_by_default:
        return f"It fits: {size_in_words(peak)} are {peak / target.memory:.0%} of the {has}."
    if made.fits:
        fraction = -(-peak * 100 // target.memory) / 100
        return (
            f"It fits if JAX may take more than 75% of the {has}: "
            f"set XLA_PYTHON_CLIENT_MEM_FRACTION={fraction:.2f}"
        )
    return f"It does not fit: it needs {size_in_words(peak)}, more than the {has}."


def _in_words(found: Suggestion | None) -> str:
    if found is None:
        return (
            "No change of --model.remat, --micro-batches or the mesh makes it fit, by the "
            "arithmetic; use more chips, or fewer rows, with --batch-size."
        )
    if found.plan is None:
        tries = plan.TRIES
        return (
            f"The next change to try is {found.flags}; none of up to {tries} that were compiled "
            f"fits, and the arithmetic expects {size_in_words(found.expected)} of it."
        )
    peak, target = found.plan.memory.peak, found.plan.target
    return (
        f"The smallest change that fits: {found.flags}\n"
        f"compiled with it, it needs {size_in_words(peak)} ({peak / target.memory:.0%})"
    )


def _print_memory(made: ChipPlan) -> None:
    memory = made.memory
    parts = (
        ("state and batch", memory.arguments),
        ("temporaries", memory.temporaries),
        ("results", memory.results),
        ("in all", memory.peak),
    )
    columns = Column("memory", "key"), Column("per device", "number")
    print_table(columns, [(name, size_in_words(size)) for name, size in parts])


def _print_program(made: ChipPlan) -> None:
    named = [kernel for kernel in made.kernels if kernel.library != "XLA"]
    flash = sorted({kernel.library for kernel in named if kernel.attention})
    print(
        f"\nAttention is a kernel of {' and '.join(flash)}, which writes no scores."
        if flash
        else "\nNo kernel of a library computes attention."
    )
    if named:
        print()
        print_table(KERNELS, [(one.name, one.library, str(one.count)) for one in named])
    print()
    print_table(PRODUCTS, [_product_row(row) for row in _products(made.products)])
    print()
    rows = [
        (row["kind"], row["dtype"], " x ".join(row["axes"]), str(row["count"]),
         size_in_words(row["sent"]))
        for row in _collectives(made.sent)
    ]  # fmt: skip
    print_table(SENT, rows) if rows else print("Nothing is sent between devices.")


def _product_row(row: dict[str, Any]) -> tuple[str, ...]:
    return (
        " x ".join(row["operands"]), row["summed"], row["precision"], row["library"],
        str(row["count"]), f"{row['share']:.1%}",
    )  # fmt: skip


def _products(found: Iterable[plan.Product]) -> list[dict[str, Any]]:
    """Products by what they multiply, the largest share first."""
    total = sum(product.flops for product in found) or 1.0
    keys = ("operands", "summed", "precision", "library")
    rows: dict[tuple[Any, ...], dict[str, Any]] = {}
    for product in found:
        key = tuple(getattr(product, name) for name in keys)
        row = rows.setdefault(key, dict(zip(keys, key, strict=True)) | {"count": 0, "share": 0.0})
        row["count"] += product.count
        row["share"] += product.flops / total
    return sorted(rows.values(), key=lambda row: -row["share"])


def _collectives(found: Iterable[plan.Collective]) -> list[dict[str, Any]]:
    """Collectives by what they send, most bytes first."""
    keys = ("kind", "dtype", "axes")
    rows: dict[tuple[Any, ...], dict[str, Any]] = {}
    for one in found:
        key = tuple(getattr(one, name) for name in keys)
        row = rows.setdefault(key, dict(zip(keys, key, strict=True)) | {"count": 0, "sent": 0.0})
        row["count"] += one.count
        row["sent"] += one.sent
    return sorted(rows.values(), key=lambda row: -row["sent"])


def _json(made: ChipPlan) -> dict[str, Any]:
    target, compiled = made.target, made.compiled
    return {
        "target": target.name,
        "devices": target.devices,
        "mesh": made.mesh,
        "precision": made.config.precision,
        "compiler": target.compiler,
        "seconds": None if compiled is None else compiled.seconds,
        "memory": dataclasses.asdict(made.memory)
        | {"peak": made.memory.peak, "device": target.memory, "usable": target.usable},
        "fits": made.fits,
        "fits_by_default": made.fits_by_default,
        "kernels": [dataclasses.asdict(kernel) for kernel in made.kernels],
        "products": _products(made.products),
        "collectives": _collectives(made.sent),
    }


def _suggested(found: Suggestion) -> dict[str, Any]:
    made = found.plan
    return {"flags": found.flags, "expected": found.expected, "verified": made is not None} | (
        {} if made is None else {"memory": dataclasses.asdict(made.memory)}
    )
