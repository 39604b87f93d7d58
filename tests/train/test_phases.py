"""Policies that change with the step: one program a phase, and a state that passes through."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from run_helpers import result, tiny, untimed

from lmjax.inference import evaluate, load_model
from lmjax.parallel import sharding
from lmjax.precision import parse_policy, paths
from lmjax.runs.state import carry_over, change_phase
from lmjax.train import abstract_state, make_train_step, resolve, train
from lmjax.train.programs import Programs

SAVED, EVALUATED = 10, 15
PHASES = ("f32", "p=bf16.kahan,c=bf16,o=f32", "mixed_f16")
POLICY = f"0: {PHASES[0]} | {SAVED}: {PHASES[1]} | {EVALUATED}: {PHASES[2]}"
"""One phase begins where a checkpoint is due, the other where an evaluation is."""


@pytest.fixture(autouse=True)
def _no_curves(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawing would be a fifth of the time of these tests."""
    monkeypatch.setattr("lmjax.train.records.draw_curves", lambda *_: None)


def phased(home: Path, policy: str = POLICY) -> Any:
    """20 steps whose loss scale grows until it overflows f16."""
    scale = {"kind": "dynamic", "initial": 2.0**20, "growth_interval": 7}
    return tiny(home, policy, steps=20, loss_scale=scale)


@pytest.fixture(scope="module")
def uninterrupted(home: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The run directory of the whole run, and what it compiled, said and parsed."""
    compiled: list[str] = []
    said: list[str] = []
    parsed: list[str] = []

    def record(phase: Any, mesh: Any) -> Any:
        compiled.append(phase.config.precision)
        return make_train_step(phase, mesh)

    def parse(text: str) -> Any:
        parsed.append(text)
        return parse_policy(text)

    config, workdir = phased(home), tmp_path_factory.mktemp("phases") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lmjax.train.records.draw_curves", lambda *_: None)
        patch.setattr("lmjax.train.programs.make_train_step", record)
        patch.setattr("lmjax.train.loop.Reporter.note", lambda _, text: said.append(text))
        patch.setattr("lmjax.runs.config.parse_policy", parse)
        train(config, workdir, progress=False, programs=Programs())
    return {"workdir": workdir, "compiled": compiled, "said": said, "parsed": parsed}


def test_every_phase_is_compiled_once_and_announced_in_a_line(uninterrupted: Any) -> None:
    names = [str(parse_policy(phase)) for phase in PHASES]
    assert uninterrupted["compiled"] == names
    changes = [line for line in uninterrupted["said"] if "from here on" in line]
    assert changes == [
        f"step {SAVED}  from here on {names[1]}",
        f"step {EVALUATED}  from here on {names[2]}",
    ]


def test_a_run_parses_its_policy_once_and_each_phase_once(uninterrupted: Any) -> None:
    times = Counter(uninterrupted["parsed"])
    assert [times[str(parse_policy(phase))] for phase in PHASES] == [1, 1, 1], times
    assert times[str(parse_policy(POLICY))] <= 3, "once, and where config.json is read"


def test_stopped_before_at_and_after_each_change_equals_uninterrupted(
    home: Path, uninterrupted: Any, tmp_path: Path
) -> None:
    """A checkpoint holds what the phase before it has made, in the formats of that phase."""
    workdir = tmp_path / "run"
    reached = 0
    for step, phase, stored in (
        (SAVED - 1, PHASES[0], "float32"),
        (SAVED, PHASES[0], "float32"),
        (SAVED + 1, PHASES[1], "bfloat16"),
        (EVALUATED, PHASES[1], "bfloat16"),
    ):
        outcome = train(phased(home), workdir, stop_after=step - reached, progress=False)
        reached = outcome.step
        assert reached == step
        model = load_model(workdir)
        assert model.config.precision == str(parse_policy(phase))
        assert {leaf.dtype.name for leaf in jax.tree.leaves(model.params)} == {stored}
    train(phased(home), workdir, progress=False)

    whole = uninterrupted["workdir"]
    assert untimed(workdir) == untimed(whole)
    for name in ("parameters_sha256", "eval_loss", "tokens", "steps"):
        assert result(workdir)[name] == result(whole)[name]


def test_the_loss_scale_that_grew_in_one_phase_overflows_in_the_next(uninterrupted: Any) -> None:
    """Otherwise the test above would say nothing about its state."""
    logged = {row["step"]: row for row in untimed(uninterrupted["workdir"]) if "loss" in row}
    assert [logged[step]["skipped_steps"] for step in (5, 10, 15)] == [0, 0, 0]
    assert [logged[step]["loss_scale"] for step in (5, 10, 15)] == [2.0**20, 2.0**21, 2.0**22]
    assert 0 < logged[20]["skipped_steps"] < 5
    assert logged[20]["loss_scale"] < 2.0**22


def test_a_finished_run_is_used_in_the_last_phase(uninterrupted: Any) -> None:
    workdir = uninterrupted["workdir"]
    model = load_model(workdir)
    assert model.config.precision == str(parse_policy(PHASES[2]))
    assert evaluate(model, progress=False).eval_loss == result(workdir)["eval_loss"]
    # A policy asked for instead may have phases too; the step of the checkpoint picks one.
    assert (
        load_model(workdir, precision="0: f32 | 19: bf16").config.precision
        == "p=bf16,c=bf16,o=bf16"
    )
    assert (
        load_model(workdir, precision="0: f32 | 18: bf16 | 19: f16").config.precision[:5] == "p=f16"
    )


def test_a_change_that_changes_nothing_leaves_no_trace(
    home: Path, uninterrupted: Any, tmp_path: Path
) -> None:
    train(phased(home, "f32"), tmp_path / "plain", progress=False)
    train(phased(home, "0: f32 | 7: f32"), tmp_path / "phased", progress=False)
    rows = untimed(tmp_path / "plain")
    assert untimed(tmp_path / "phased") == rows
    ours, theirs = result(tmp_path / "phased"), result(tmp_path / "plain")
    assert ours["parameters_sha256"] == theirs["parameters_sha256"]
    # And until a change that changes something, the run is the one that will never change.
    of_step = lambda rows: {row["step"]: row["loss"] for row in rows if "loss" in row}
    plain, changing = of_step(rows), of_step(untimed(uninterrupted["workdir"]))
    assert [step for step in plain if plain[step] != changing[step]] == [15, 20]


def test_a_step_is_of_one_phase(tiny: Any) -> None:
    config = tiny("0: f32 | 7: bf16")
    for use in (make_train_step, lambda c: abstract_state(c, sharding.make_mesh(c.mesh))):
        with pytest.raises(ValueError, match=r"changes with the step.*at\(step\)"):
            use(config)


# --- carry_over

CHAIN = (
    "f32",
    "p=bf16.kahan,c=bf16,mu=bf16,nu=int8@block16",
    "p=f16,c=f16,mu=e4m3@tensor,nu=e5m7",
    "p=e5m7.kahan,c=f32,mu=e4m3@tensor",
    "p=bf16.kahan,c=bf16; head: p=f32; **/norm: p=f32,mu=bf16",
    "f32",
)
"""Formats of every kind, each carried over into those of the next."""


@pytest.mark.parametrize("optimizer", ["adamw", "lion", "muon"])
def test_the_state_is_that_of_a_run_in_the_new_formats(optimizer: str, tiny: Any) -> None:
    policy = " | ".join(f"{10 * i}: {phase}" for i, phase in enumerate(CHAIN))
    config = tiny(policy, optimizer={"name": optimizer}, model={"layers": 1})
    mesh = sharding.abstract_mesh(config.mesh, 1)
    old, *later = resolve(config).phases
    for new in later:
        carried = jax.eval_shape(
            lambda s, a=old, b=new: carry_over(s, a, b), abstract_state(old, mesh)
        )
        wanted = abstract_state(new, mesh)
        assert jax.tree.map(lambda x: (x.shape, x.dtype), carried) == jax.tree.map(
            lambda x: (x.shape, x.dtype), wanted
        )
        old = new


def test_what_keeps_its_format_passes_bit_for_bit(tiny: Any, draw_state: Any) -> None:
    config = tiny("0: f32 | 7: p=bf16.kahan,c=f16,mu=bf16", model={"layers": 1})
    old, new = resolve(config).phases
    mesh = sharding.make_mesh(config.mesh, jax.devices()[:1])
    state = draw_state(old)
    counters = {"scale": 2.0**9, "good_steps": 3, "skipped_steps": 2, "consecutive_skips": 1}
    like = lambda name: getattr(state.opt_state, name).dtype
    counters = {name: jnp.asarray(value, like(name)) for name, value in counters.items()}
    state = state._replace(step=jnp.int32(7), opt_state=state.opt_state._replace(**counters))
    before = {path: np.asarray(leaf) for path, leaf in paths.flatten(state).items()}

    carried = change_phase(state, old, new, mesh)
    described = lambda leaf: (leaf.shape, leaf.dtype, leaf.sharding)
    assert jax.tree.map(described, carried) == jax.tree.map(described, abstract_state(new, mesh))
    after = paths.flatten(carried)
    for path, leaf in before.items():
        narrowed = path.startswith("params/") or "/mu/" in path
        kept = leaf.astype(jnp.bfloat16) if narrowed else leaf
        assert np.asarray(after.pop(path)).tobytes() == kept.tobytes(), path
    assert {path.split("/")[0] for path in after} == {"residuals"}
