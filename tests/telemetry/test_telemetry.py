"""Telemetry's rows say what was counted, and the pictures show it where it belongs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmjax.model import layout, site_tree
from lmjax.optim.storage import update_census
from lmjax.parallel import sharding
from lmjax.precision import paths, quantize
from lmjax.precision.probes import Census, Rounded, is_slot
from lmjax.runs.resolved import phase_of
from lmjax.telemetry.rows import (
    TelemetryConfig,
    counted_roles,
    telemetry_row,
    tensor_format,
)
from lmjax.telemetry.rows_plot import draw_course, draw_exponents
from lmjax.train.step import make_scaled_loss, slots_of


def one_census(x: np.ndarray, policy_format) -> Census:
    x = jnp.asarray(x, jnp.float32)
    return jax.device_get(Census.of(Rounded(x, x, quantize(x, policy_format), policy_format)))


def test_a_row_holds_shares_by_site_block_by_block(tiny):
    config = tiny("mixed_f16")
    sites = phase_of(config).sites
    f16 = sites["head"].compute
    x = np.asarray([[0, 2.0**-26, 2.0**-20, 3.0], [0, 1.0, 1e5, 1.5]], np.float32)
    stacked = jax.tree.map(lambda *leaves: np.stack(leaves), *(one_census(r, f16) for r in x))
    tensors = {"blocks/mlp/up/dx": stacked, "head/x": one_census(x[1], f16)}
    row = telemetry_row(7, tensors, {}, sites, layout(config.model))
    assert list(row["tensors"]) == ["blocks/0/mlp/up/dx", "blocks/1/mlp/up/dx", "head/x"]
    first, second = (row["tensors"][f"blocks/{index}/mlp/up/dx"] for index in (0, 1))
    assert first == {
        "format": "f16", "size": 4, "zero": 0.25, "underflow": 0.25, "subnormal": 0.25,
        "overflow": 0.0, "maximum": 3.0, "exponents": {"-26": 1, "-20": 1, "1": 1},
    }  # fmt: skip
    assert (second["overflow"], second["exponents"]) == (0.25, {"0": 2, "16": 1})
    assert json.loads(json.dumps(row)) == row


@pytest.mark.parametrize("size", [1e-25, 1.0, 2e19])
def test_the_size_of_updates_is_right_where_squares_overflow_or_vanish(size: float, tiny):
    sites = {"w": phase_of(tiny("f32")).param_sites["norm/scale"]}
    old = {"w": jnp.asarray([3.0, -4.0], jnp.float32) * np.float32(size)}
    updates = {"w": jnp.asarray([0.0, 0.5], jnp.float32) * np.float32(size)}
    census = jax.device_get(update_census(old, old, updates, sites))
    row = telemetry_row(1, {}, census, {}, layout(tiny().model))["updates"]["w"]
    assert row["relative"] == pytest.approx(0.1)


def test_a_row_says_what_became_of_updates(tiny):
    sites = {"w": phase_of(tiny("pure_bf16")).param_sites["norm/scale"]}
    old = {"w": jnp.asarray([1.0, 1.0, 1.0, 0.0], jnp.bfloat16)}
    updates = {"w": jnp.asarray([2.0**-9, 2.0**-7, 0.0, 2.0**-9], jnp.float32)}
    new = {"w": (old["w"].astype(jnp.float32) + updates["w"]).astype(jnp.bfloat16)}
    census = jax.device_get(update_census(old, new, updates, sites))
    row = telemetry_row(1, {}, census, {}, layout(tiny().model))["updates"]["w"]
    # bf16 has 7 bits: half a unit in the last place of 1 is 2^-8, which 2^-9 does not reach.
    assert (row["size"], row["unchanged"], row["lost"]) == (4, 0.5, 0.25)
    squares = np.sqrt((2 * 2.0**-18 + 2.0**-14) / 3)
    assert row["relative"] == pytest.approx(squares, rel=1e-6)


def noting(path: str, seen: dict[str, set[str]]) -> Any:
    """A slot that measures nothing, but notes what the tensor at `path` is rounded to."""

    class Note(NamedTuple):
        nothing: jax.Array

        @classmethod
        def of(cls, tensor: Rounded) -> Any:
            seen.setdefault(path, set()).add(tensor.format.name)
            return cls(jnp.zeros((), jnp.float32))

    return Note(jnp.zeros((), jnp.float32))


@pytest.mark.parametrize(
    ("family", "rule", "of_weights"),
    [("gpt2", "", "f32"), ("llama", "", "f32"), ("llama", "; **/combine: x=e4m3", "f16")],
)
def test_rows_name_the_formats_that_the_step_rounds_to(
    family, rule, of_weights, tiny, draw_params, draw_batch
):
    """`combine/dx` is rounded where attention needs its whole matrix, and not in blocks."""
    policy = "mixed_f16,w=e4m3@tensor,g=e5m2; **/residual: c=f32,o=bf16; head: o=bf16"
    config = tiny(policy + rule, family)
    seen: dict[str, set[str]] = {}
    roles = ("w", "x", "g", "dx", "dw", "y")
    slots = site_tree(
        layout(config.model),
        lambda place: {
            role: {"who": noting(f"{place.paths[0]}/{role}", seen)}
            for role in roles
            if role in place.site.roles
        },
    )
    loss = make_scaled_loss(phase_of(config), sharding.make_mesh(config.mesh, jax.devices()[:1]))
    jax.eval_shape(
        jax.grad(loss, argnums=4, has_aux=True), draw_params(config), draw_batch(config), None,
        jnp.ones((), jnp.float32), slots,
    )  # fmt: skip
    assert len(seen) > 40
    places = layout(config.model)
    named = {
        path: {tensor_format(path, phase_of(config).sites, places).partition("@")[0]}
        for path in seen
    }
    assert named == seen
    assert named["blocks/0/attention/combine/dx"] == {of_weights}
    assert {"e4m3", "e5m2", "bf16", "f16", "f32"} == set().union(*seen.values())


def test_the_heat_map_puts_a_tensor_where_its_exponents_are(tmp_path: Path, monkeypatch):
    from lmjax.telemetry import rows_plot as telemetry_plot

    drawn = []
    original = telemetry_plot._shares
    monkeypatch.setattr(
        telemetry_plot, "_shares", lambda tensor: drawn.append(original(tensor)) or drawn[-1]
    )
    tensor = {"format": "f16", "size": 8, "underflow": 0.0, "overflow": 0.0}
    row = {"step": 1, "tensors": {"head/x": tensor | {"exponents": {"-3": 6, "-90": 2}}}}
    draw_exponents(row, tmp_path / "a.png")
    (shares,) = [s for s in drawn if s.any()]
    low = telemetry_plot._LOW
    assert {int(i) + low: float(shares[i]) for i in np.flatnonzero(shares)} == {low: 0.25, -3: 0.75}
    draw_course([row, row | {"step": 2}], tmp_path / "b.png")


def test_a_pattern_says_which_tensors_are_counted(tiny):
    def roles(pattern: str, site: str) -> list[str]:
        place = layout(tiny().model).place(site)
        return counted_roles(TelemetryConfig(1, tensors=pattern), place)

    assert roles("**", "blocks/mlp/up") == ["w", "x", "g", "dx", "dw"]
    assert roles("**/dw", "blocks/mlp/up") == ["dw"]
    assert roles("**/dw", "blocks/mlp/norm") == []
    assert roles("blocks/1/mlp/*/x", "blocks/mlp/up") == ["x"], "blocks are counted alike"
    assert roles("blocks/2/**", "blocks/mlp/up") == []
    assert roles("head/*", "head") == ["w", "x", "g", "dx", "dw"]
    slots = slots_of(phase_of(tiny(telemetry=TelemetryConfig(1, tensors="**/dw"))), telemetry=True)
    counted = paths.flatten(slots, is_slot)
    assert "head/dw/telemetry" in counted
    assert {path.split("/")[-2] for path in counted} == {"dw"}


def test_a_pattern_that_names_no_tensor_is_refused(tiny):
    with pytest.raises(ValueError, match=r"telemetry\.tensors is 'haed/\*'.* there are .*head/dw"):
        tiny(telemetry=TelemetryConfig(1, tensors="haed/*"))
    tiny(telemetry=TelemetryConfig(0, tensors="haed/*"))


def test_a_negative_interval_is_refused():
    with pytest.raises(ValueError, match=r"telemetry\.every"):
        TelemetryConfig(-1)
