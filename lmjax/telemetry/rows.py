"""Telemetry: what rounding does to each tensor of a run, as rows of `telemetry.jsonl`.

Every `every` steps a run takes a watched step: the same step, compiled a second time with probes in
it, so that all other steps are the program of a run without telemetry. A watched step counts, for
each site and role (listed in `precision/probes.py`), what rounding did to the elements of the
tensor, and for each parameter what became of its update.

This file turns those counts into rows with the keys `step`, `tensors` and `updates`. Shares of
tensors with more than 2^14 elements come from a sample of that size, with a standard error of about
sqrt(s / 2^14) for a share s, unless `telemetry.exact` counts every element.

    tensors["blocks/3/mlp/up/dx"]
        format                the format that the tensor was rounded to
        size                  number of elements
        zero                  share that was 0 before
        underflow             share that became 0
        subnormal             share that became subnormal
        overflow              share beyond the largest finite number
        maximum               largest magnitude before rounding
        exponents             {e: count of elements with 2^e <= |x| < 2^(e + 1)}, in units of the
                              format, that is after division by scale factors
    updates["blocks/3/mlp/up/kernel"]
        size                  number of elements
        unchanged             share that is the same number after the step
        lost                  share whose update is less than half a unit in the last place, not 0
        relative              root mean square of the updates over that of the parameters

Knows NumPy, probes, policies and the sites of a model, not the loop that calls it.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np

from lmjax.checks import at_least, validate
from lmjax.model.attention_form import unrounded_in
from lmjax.model.sites import within
from lmjax.optim.storage import UpdateCensus
from lmjax.precision import paths
from lmjax.precision.policy import SitePolicy
from lmjax.precision.probes import Census, Fate
from lmjax.precision.sites import Layout, Place, site_at


@dataclass(frozen=True)
class TelemetryConfig:
    """Which steps and tensors telemetry counts."""

    every: Annotated[int, at_least(0)] = 0
    """Steps between watched steps, which are written to telemetry.jsonl; 0: none."""
    tensors: str = "**"
    """Which tensors are counted, as a pattern of their paths, such as `**/dw` for the gradients of
    weights or `head/*`. All blocks are counted alike; fewer tensors compile faster."""
    exact: bool = False
    """Count every element of each tensor instead of a sample of 2^14; largest magnitudes always
    cover all elements. Watched steps then take about twice as long."""

    def __post_init__(self) -> None:
        """Refuses values out of range."""
        validate(self, "telemetry")


def counted_roles(config: TelemetryConfig, place: Place) -> list[str]:
    """The tensors of a place that are to be counted, in any block or in all."""
    return [
        role
        for role in place.site.roles
        if any(paths.matches(config.tensors, f"{path}/{role}") for path in place.paths)
    ]


def refuse_no_tensor(config: TelemetryConfig, layout: Layout) -> None:
    """Raises ValueError if a model with these sites has no tensor that is to be counted."""
    known = [f"{path}/{role}" for path in layout.paths for role in site_at(path).roles]
    if config.every and not any(paths.matches(config.tensors, path) for path in known):
        raise ValueError(
            f"telemetry.tensors is {config.tensors!r}, which names no tensor of this model; there "
            f"are {', '.join(known)}"
        )


def telemetry_row(
    step: int,
    tensors: Mapping[str, Census],
    updates: Mapping[str, UpdateCensus],
    sites: Mapping[str, SitePolicy],
    layout: Layout,
) -> dict[str, Any]:
    """One row of `telemetry.jsonl`.

    Args:
      step: the step that was watched.
      tensors: counts by site and role, stacked for blocks, as NumPy arrays.
      updates: counts by path of the parameter, stacked likewise.
      sites: the formats of every site of the model, in its order, which rows keep.
      layout: the sites of the model.
    """
    by_site: dict[str, dict[str, Any]] = {site: {} for site in sites}
    for path, census in _unstacked(tensors, layout):
        number_format = tensor_format(path, sites, layout)
        by_site[path.rpartition("/")[0]][path] = _tensor(census, number_format)
    return {
        "step": step,
        "tensors": {path: row for site in by_site.values() for path, row in site.items()},
        "updates": {path: _update(census) for path, census in _unstacked(updates, layout)},
    }


def mechanisms(row: Mapping[str, Any]) -> dict[str, float]:
    """The columns of `metrics.jsonl` that a row of `telemetry.jsonl` provides.

    Returns:
      zero_gradients: share of all gradients of weights in products that are 0 once rounded.
      unchanged_weights: share of all parameters that are the same number after the step.
    """
    gradients = [tensor for path, tensor in row["tensors"].items() if path.endswith("/dw")]
    zeros = _share(gradients, lambda tensor: tensor["zero"] + tensor["underflow"])
    unchanged = _share(row["updates"].values(), lambda update: update["unchanged"])
    found = {"zero_gradients": zeros} if gradients else {}
    return found | {"unchanged_weights": unchanged}


def tensor_format(path: str, sites: Mapping[str, SitePolicy], layout: Layout) -> str:
    """The format that the tensor of a role at a site is rounded to: `blocks/0/mlp/up/g`."""
    site_path, _, role = path.rpartition("/")
    part, _, name = site_path.rpartition("/")
    site = sites[site_path]
    operand = {"w": site.second, "x": site.activations, "g": site.grads}.get(role)
    if operand is not None:
        return str(operand.quantizer)
    if role == "y":
        return site.output.name
    wide = unrounded_in(within(sites, part), name, role) if part else None
    return (wide or layout.input_format(site_path, sites) or site.compute).name


def draw_telemetry(rows: Sequence[Mapping[str, Any]], title: str, directory: Path) -> None:
    """Draws `telemetry.png`, the last watched step, and `telemetry_course.png`, all of them."""
    from lmjax.telemetry.rows_plot import draw_course, draw_exponents

    step = rows[-1]["step"]
    draw_exponents(rows[-1], directory / "telemetry.png", f"{title}   step {step}")
    draw_course(rows, directory / "telemetry_course.png", title)


def _unstacked(stacked: Mapping[str, Any], layout: Layout) -> Iterator[tuple[str, Any]]:
    """Counts by full path: those of blocks one block at a time."""
    for path, census in stacked.items():
        if not layout.stack.holds(path):
            yield path, census
            continue
        for index, member in enumerate(layout.stack.members(path)):
            yield member, type(census)(*(part[index] for part in census))


def _tensor(census: Census, format_name: str) -> dict[str, Any]:
    size = float(census.size)
    shares = {
        "zero": Fate.ZERO,
        "underflow": Fate.UNDERFLOW,
        "subnormal": Fate.SUBNORMAL,
        "overflow": Fate.OVERFLOW,
    }
    counts = np.asarray(census.histogram)
    return {
        "format": format_name,
        "size": int(size),
        **{name: float(census.elements(fate)) / size for name, fate in shares.items()},
        "maximum": float(census.maximum),
        "exponents": {str(i - 127): int(counts[i]) for i in np.flatnonzero(counts) if i > 0},
    }


def _share(rows: Collection[Mapping[str, Any]], share: Callable[[Any], float]) -> float:
    """The mean of a share over rows, each weighted with its size."""
    total = sum(row["size"] for row in rows)
    return sum(share(row) * row["size"] for row in rows) / total if total else 0.0


def _update(census: UpdateCensus) -> dict[str, Any]:
    size = float(census.size)
    return {
        "size": int(size),
        "unchanged": float(census.unchanged) / size,
        "lost": float(census.lost) / size,
        "relative": float(census.update_norm) / float(census.param_norm)
        if census.param_norm
        else float("inf"),
    }
