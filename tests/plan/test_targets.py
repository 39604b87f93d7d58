"""Chips to compile for: what is parsed, what is refused, and what their compilers make of a step.

Each compiler is an extra: `pytest -m long` with `lmjax[aot-tpu,aot-cuda]`.
"""

from __future__ import annotations

import importlib.metadata
import re
from collections.abc import Callable

import pytest

from lmjax.plan import PlanError, compiled_for, parse_target
from lmjax.plan.program import needed_memory
from lmjax.plan.targets import Target
from lmjax.precision.backend import Backend
from lmjax.train import Config


@pytest.mark.parametrize(
    ("text", "name", "devices", "backend"),
    [
        ("h100:8", "h100:8", 8, Backend("gpu", (9, 0))),
        ("H100", "h100:1", 1, Backend("gpu", (9, 0))),
        ("b200:256", "b200:256", 256, Backend("gpu", (10, 0))),
        ("a100:2", "a100:2", 2, Backend("gpu", (8, 0))),
        ("tpu-v5e:4x4", "tpu-v5e:4x4", 16, Backend("tpu")),
        ("v6e:16x16", "tpu-v6e:16x16", 256, Backend("tpu")),
        ("tpu-v5p:4x4x4", "tpu-v5p:4x4x4", 64, Backend("tpu")),
        ("tpu-v5p:4x8x8", "tpu-v5p:4x8x8", 256, Backend("tpu")),
        ("tpu7x:2x2x1", "tpu-7x:2x2x1", 8, Backend("tpu")),
        ("tpu-v5p", "tpu-v5p:1x1x1", 1, Backend("tpu")),
    ],
)
def test_chips_are_a_kind_and_a_shape(text: str, name: str, devices: int, backend: Backend):
    target = parse_target(text)
    assert (target.name, target.devices, target.backend) == (name, devices, backend)
    assert parse_target(target.name) == target


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "unknown chip ''.*write CHIP:SHAPE.*h100, h200, b200, tpu-v5e, tpu-v5p"),
        ("v100:8", "unknown chip 'v100'"),
        ("h100:0", "not a number of GPUs; write h100:N"),
        ("h100:2x4", "not a number of GPUs; write h100:N"),
        ("h100:12", "no whole number of hosts with 8; write h100:8 or h100:16"),
        ("tpu-v5e:4x4x4", "have 2 dimensions; write tpu-v5e:4x4"),
        ("tpu-v5p:8", "have 3 dimensions; write tpu-v5p:4x4x4"),
        ("tpu-v5p:4xax4", "not a shape of TPU v5p slices"),
        ("tpu-v6e:3x3", "no TPU v6e slices of 3x3; there are 1x1, 2x2, 2x4, .*16x16$"),
        ("tpu-v5p:4x4x6", "no TPU v5p slices of 4x4x6; .*multiples of 4 in ascending order"),
        ("tpu-v5p:8x4x4", "ascending order up to 6144 chips"),
        ("tpu-v5p:64x64x64", "up to 6144 chips"),
    ],
)
def test_what_does_not_exist_is_refused_in_words(text: str, message: str):
    with pytest.raises(ValueError, match=message):
        parse_target(text)


def test_a_missing_compiler_is_named_with_its_extra(
    tiny: Callable[..., Config], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    for text, extra in (("tpu-v5e", r"libtpu.*\[aot-tpu\]"), ("h100", r"cuda13.*\[aot-cuda\]")):
        with pytest.raises(ValueError, match=extra):
            compiled_for(tiny(), parse_target(text))


def test_a_batch_that_does_not_fit_is_refused_before_anything_is_compiled(
    tiny: Callable[..., Config], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(Target, "compiler", "a compiler")
    monkeypatch.setattr("lmjax.plan.program.CHILD", "lmjax.plan.nothing")
    with pytest.raises(ValueError, match="4 rows cannot be divided among 8 devices"):
        compiled_for(tiny(batch_size=4), parse_target("h100:8"))
    with pytest.raises(PlanError, match=r"h100:8: .*No module named lmjax\.plan\.nothing"):
        compiled_for(tiny(batch_size=8), parse_target("h100:8"))


@pytest.mark.parametrize(
    ("target", "installed", "mismatch"),
    [
        (
            "tpu-v6e:8x8",
            {"libtpu": "0.0.52"},
            r"jax .* libtpu==0\.0\.42\.\*, but 0\.0\.52 is",
        ),
        ("tpu-v6e:8x8", {"libtpu": "0.0.42.1"}, ""),
        ("tpu-v6e:8x8", {}, ""),
        ("h100:8", {"jax-cuda13-plugin": "0.10.1"}, r"needs jax-cuda13-plugin.*0\.10\.2"),
        ("h100:8", {"jax-cuda13-plugin": "0.10.2"}, ""),
    ],
)
def test_a_compiler_of_another_version_than_jax_asks_for_explains_why_compiling_fails(
    target: str,
    installed: dict[str, str],
    mismatch: str,
    tiny: Callable[..., Config],
    monkeypatch: pytest.MonkeyPatch,
):
    needs = [
        "jaxlib<=0.10.2,>=0.10.2",
        'libtpu==0.0.42.*; extra == "tpu"',
        'jax-cuda13-plugin[with-cuda]<=0.10.2,>=0.10.2; extra == "cuda13"',
    ]

    def version(name: str) -> str:
        known = {"jax": "0.10.2"} | installed
        if name not in known:
            raise importlib.metadata.PackageNotFoundError(name)
        return known[name]

    monkeypatch.setattr("importlib.metadata.requires", lambda name: needs)
    monkeypatch.setattr("importlib.metadata.version", version)
    monkeypatch.setattr(Target, "compiler", "a compiler")
    monkeypatch.setattr("lmjax.plan.program.CHILD", "lmjax.plan.nothing")
    assert re.search(mismatch or "^$", parse_target(target).mismatch)
    with pytest.raises(PlanError, match=f"(?s)No module named.*{mismatch}"):
        compiled_for(tiny(batch_size=64), parse_target(target))


def test_a_compiler_that_runs_out_of_memory_says_how_much_it_needs():
    said = "Ran out of memory in memory space hbm. Used 25.50G of 15.75G hbm. Exceeded by 9.75G."
    assert (
        needed_memory(f"RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. {said}")
        == 25.5e0 * 2**30
    )
    said = "the total memory required for HLO temporaries (225.62G) exceeds available HBM (15.75G)."
    assert needed_memory(f"RESOURCE_EXHAUSTED: E1000: {said}") == round(225.62 * 2**30)
    assert needed_memory("INTERNAL: Mosaic failed") is None
