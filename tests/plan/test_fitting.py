"""Whether a run fits on chips, and the smallest change with which it does.

The compiler here is the arithmetic times a factor; real ones are in `test_compiled_targets.py`.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable

import pytest

from lmjax.cli import chips
from lmjax.cli.verbs import main
from lmjax.parallel.sharding import MeshConfig
from lmjax.plan import ChipPlan, Compiled, DoesNotFit, fitting, parse_target
from lmjax.plan.program import Memory
from lmjax.plan.targets import Target
from lmjax.train import Config

GB = 10**9
GPUS, TPUS = parse_target("h100:8"), parse_target("tpu-v5e:2x4")

PROGRAM = """\
HloModule jit_step

ENTRY %main (x: bf16[8,32], w: bf16[32,16]) -> f32[8,16] {
  %x = bf16[8,32]{1,0} parameter(0)
  %w = bf16[32,16]{1,0} parameter(1)
  %y = f32[8,16]{1,0} dot(%x, %w), lhs_contracting_dims={1}, rhs_contracting_dims={0}
  ROOT %r = f32[8,16]{1,0} all-reduce(%y), replica_groups={}, to_apply=%add
}
"""


def with_memory(target: Target, size: float) -> Target:
    return dataclasses.replace(target, memory=int(size), usable=int(0.75 * size))


def plan_of(target: Target, needs: float, config: Config) -> ChipPlan:
    memory = Memory(int(needs), 0)
    return ChipPlan(config, target, memory, Compiled(target, PROGRAM, memory, 1.0, "a compiler"))


@pytest.fixture
def compile_by(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], list[Config]]:
    """Compiles by the arithmetic times a factor; returns what was compiled."""

    def begin(factor: float) -> list[Config]:
        seen: list[Config] = []

        def compiled_for(config: Config, target: Target) -> Compiled:
            seen.append(config)
            memory = Memory(int(factor * fitting._expected(config, target)), 0)
            if target.backend.platform == "tpu" and memory.peak > target.memory:
                raise DoesNotFit("too much", memory)
            return Compiled(target, PROGRAM, memory, 1.0, "a compiler")

        monkeypatch.setattr(fitting, "compiled_for", compiled_for)
        return seen

    return begin


@pytest.fixture(scope="module")
def llama(tiny: Callable[..., Config]) -> Config:
    """One whose activations are most of its memory."""
    return tiny(
        "mixed_bf16", "llama", batch_size=64, context=16, mesh=MeshConfig(data=8)
    ).resolved()


def test_what_jax_takes_by_default_is_less_than_a_gpu_has(llama: Config):
    verdict = lambda target, needs: chips.verdict(plan_of(target, needs, llama))
    assert verdict(GPUS, 8.5 * GB) == "It fits: 8.5 GB are 10% of the 85 GB of a H100 SXM."
    assert "XLA_PYTHON_CLIENT_MEM_FRACTION=0.83" in verdict(GPUS, 70 * GB)
    assert verdict(GPUS, 82 * GB).startswith("It does not fit: it needs 82 GB, more than")
    assert verdict(TPUS, 16.8 * GB).startswith("It fits: 16.8 GB are 98%")


@pytest.mark.parametrize("name", ["h100:1", "tpu-v5e:1x1"])
def test_the_smallest_change_that_fits_is_compiled(name: str, llama: Config, compile_by):
    """With a compiler whose programs take three times what the arithmetic expects."""
    seen = compile_by(3.0)
    one = dataclasses.replace(llama, mesh=MeshConfig())
    target = parse_target(name)
    most = 0.9 * 3 * fitting._expected(one, target)
    target = dataclasses.replace(target, memory=int(most), usable=int(most))
    made = fitting.plan_for_chips(one, target)
    assert not made.fits
    found = fitting.suggestion(made)
    assert found is not None
    assert found.plan is not None
    assert found.flags == "--micro-batches 2"
    assert found.plan.memory.peak == pytest.approx(found.expected, rel=1e-6)
    assert [config.micro_batches for config in seen] == [1, 2]


def test_more_than_one_setting_changes_where_one_is_not_enough(llama: Config, compile_by):
    compile_by(1.0)
    # Its state takes most of what one device has left: without fsdp nothing fits.
    target = with_memory(TPUS, 0.3 * fitting._expected(llama, TPUS))
    made = fitting.plan_for_chips(llama, target)
    found = fitting.suggestion(made)
    assert found is not None
    assert found.plan is not None
    assert found.plan.fits
    assert "--mesh.data 1 --mesh.fsdp" in found.flags


def test_every_rematerialisation_that_keeps_less_is_tried(llama: Config):
    """In the order of what it keeps."""
    of = lambda config: [fields for flags, fields in fitting._remat(config) if flags]
    names = [fields["model"].remat for fields in of(llama)]
    assert names == ["dots", "attention", "full", "offload"]
    sizes = [fitting._expected(dataclasses.replace(llama, **fields), GPUS) for fields in of(llama)]
    assert sizes == sorted(sizes, reverse=True)
    least = dataclasses.replace(llama.model, remat="full")
    assert [flags for flags, _ in fitting._remat(dataclasses.replace(llama, model=least))] == [
        "",
        "--model.remat offload",
    ]


def test_what_nothing_helps_is_said(llama: Config, compile_by, capsys: pytest.CaptureFixture[str]):
    compile_by(1.0)
    one = dataclasses.replace(llama, batch_size=1, mesh=MeshConfig())
    chips.show_chip_plan(one, with_memory(parse_target("tpu-v5e"), 10), json=False)
    said = capsys.readouterr().out
    assert "It does not fit" in said
    assert "use more chips" in said


def test_a_search_ends(llama: Config, compile_by, monkeypatch: pytest.MonkeyPatch):
    """Where programs need more than the arithmetic expects, whatever is changed."""
    seen = compile_by(1.0)
    target = with_memory(TPUS, 0.9 * fitting._expected(llama, TPUS))
    made = fitting.plan_for_chips(llama, target)
    monkeypatch.setattr(
        fitting, "plan_for_chips", lambda config, target: seen.append(config) or made
    )
    monkeypatch.setattr(ChipPlan, "fits", False)
    found = fitting.suggestion(made)
    assert found is not None
    assert found.plan is None
    assert 1 < len(seen) <= 1 + fitting.TRIES


def test_a_plan_shows_what_is_multiplied_and_sent(
    llama: Config, compile_by, capsys: pytest.CaptureFixture[str]
):
    compile_by(1.0)
    chips.show_chip_plan(llama, GPUS, json=False)
    lines = capsys.readouterr().out.splitlines()
    assert "8 x H100 SXM (h100:8), data=8 x fsdp=1 x tensor=1 x sequence=1" in lines
    assert "compiled by a compiler in 1 s" in lines
    assert "No kernel of a library computes attention." in lines
    row = next(line for line in lines if line.startswith("bf16 x bf16"))
    assert row.split()[-3:] == ["XLA", "1", "100.0%"]
    assert next(line for line in lines if line.startswith("all-reduce")).split()[1:3] == [
        "f32",
        "data",
    ]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--target", "h200:3x3"], "not a number of GPUs"),
        (["--target", "h100:8", "--devices", "8"], "leave out --devices"),
        (["--target", "h100:8", "--roofline"], "leave out --roofline"),
        (["--target", "tpu-v5e:4x4"], r"needs libtpu.*\[aot-tpu\]"),
        (["--model.remat", "all"], "--model.remat"),
    ],
)
def test_what_cannot_be_planned_is_one_line(
    flags: list[str],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(SystemExit) as stopped:
        main(["plan", "experiments.quickstart", *flags])
    assert stopped.value.code == 2
    said = capsys.readouterr()
    assert not said.out
    assert len(said.err.splitlines()) == 1
    assert re.search(message, said.err)
