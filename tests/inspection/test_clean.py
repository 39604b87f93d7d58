"""Programs that obey their policy: an audit finds nothing to complain about.

By default the traced programs of a few policies and one compiled program; `pytest -m long` compiles
all of them.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import pytest

from experiments import bert_tiny_mlm
from lmjax.audit import audit
from lmjax.audit.programs import trace
from lmjax.errors import InputError
from lmjax.inspection.inspection import LEAST_ATTRIBUTED, Inspection, inspect
from lmjax.inspection.judge_traced import TracedJudge
from lmjax.inspection.rows import AuditVerdict
from lmjax.inspection.traced import TracedProgram
from lmjax.parallel import sharding
from lmjax.precision import exact
from lmjax.precision.backend import Backend, planned_for
from lmjax.runs.resolved import phase_of
from lmjax.train.step import PARTS

NARROW_SITES = "**/softmax: c=bf16; **/norm: c=bf16; **/activation: c=bf16; loss: c=bf16"
POLICIES = (
    "f32",
    "mixed_bf16",
    "pure_bf16",
    "mixed_f16",
    "pure_f16",
    "fp8",
    "mxfp8",
    "nvfp4,xb=nvfp4.rht",
    "int8",
    "p=bf16.sr,c=bf16,o=f32,mu=bf16,nu=bf16",
    "p=bf16.kahan,c=bf16",
    "mixed_bf16,a=bf16@block16",
    "mixed_bf16,a=e5m9",
    "p=f32,c=f32,m=tf32",
    "p=f32,c=f32,m=default",
    "p=e5m9,c=e5m9,o=f32",
    "mixed_bf16,r=bf16,mu=int8@block128,nu=e5m2,kv=e4m3@channel",
    f"mixed_bf16; {NARROW_SITES}",
    "mixed_bf16; blocks/0: c=f32; head: c=f32; **/residual: c=f32",
    "p=f32,c=f16,w=e4m3@tensor.delayed,x=e4m3@tensor.delayed,g=e5m2@tensor.delayed",
    "p=f32,c=bf16,w=int4@tensor.learned,x=int8@tensor.observed2",
)
STORED = (
    "mixed_bf16,w=int8@channel.stored,x=int8@tensor.static; blocks/0/mlp: w=int4@block4.stored",
    "mixed_f16,w=nvfp4.stored",
    "f32,w=int3@block8.affine.stored; head: w=e4m3@channel.stored",
)
CHEAP = POLICIES[1], POLICIES[5], POLICIES[15], POLICIES[16], POLICIES[17], POLICIES[20]
FAMILIES = ("gpt2", "llama")
WIDELY_USED = ("f32", "mixed_bf16", "mixed_f16", "fp8")


def traced_inspection(config: Any, program: str) -> Inspection:
    phase = phase_of(config)
    mesh = sharding.make_mesh(phase.config.mesh, jax.devices()[:1])
    jaxpr = trace(program, phase, mesh).traced.jaxpr
    options = exact.COMPILER_OPTIONS
    return inspect(program, jaxpr, [], phase.layout, phase.sites, PARTS, options)


def traced_failures(config: Any, program: str) -> list[tuple[str, str, str]]:
    found = traced_inspection(config, program)
    assert found.rows
    return [(row.site, row.tensor, finding.text) for row, finding in found.findings]


@pytest.mark.parametrize("policy", CHEAP)
def test_what_is_traced_under_a_policy_obeys_it(policy: str, tiny: Any) -> None:
    for family, program in (("gpt2", "evaluate"), ("llama", "decode")):
        assert traced_failures(tiny(policy, family), program) == []


def test_products_with_stored_elements_obey_their_policy(tiny: Any) -> None:
    assert traced_failures(tiny(STORED[2]), "evaluate") == []
    made = traced_inspection(tiny(STORED[1]), "decode")
    assert made.findings == []
    inside = [row.site for row in made.rows if row.site.startswith("blocks/")]
    alone = [not site.startswith("blocks/0-1") for site in inside]
    assert alone == sorted(alone)  # what a block has alone follows what all have
    assert len(set(alone)) == 2


def test_what_is_stored_as_elements_is_audited_where_it_is_read(tiny: Any) -> None:
    made = traced_inspection(tiny(STORED[0]), "decode")
    assert made.findings == []
    stored = {(r.site, r.tensor): (r.asked, r.traced) for r in made.rows}
    assert stored["blocks/0/mlp/up", "elements"] == ("int4@block4, packed", "uint8")
    assert stored["blocks/1/mlp/up", "elements"] == ("int8@channel", "int8")
    assert stored["blocks/1/mlp/up", "elements, scale"] == ("int8@channel", "f32")
    assert stored["blocks/1/mlp/up", "rounded to int8@channel"][0] == "int8@channel"
    with pytest.raises(InputError, match="quantize the run afterwards"):
        audit(tiny(STORED[0]), programs=("train",))


@pytest.mark.long
def test_an_audit_of_stored_elements_says_why_it_has_no_train_step(tiny: Any) -> None:
    report = audit(tiny(STORED[0]))
    assert report.failures == []
    assert [one.name for one in report.inspections] == ["evaluate", "decode"]
    assert "can be read, but nothing can be added to it" in report.untrained
    compiled = {
        row.site: row.compiled for row in report.inspections[1].rows if row.tensor == "elements"
    }
    assert compiled["blocks/0/mlp/up"] == {"cpu": "uint8"}
    assert compiled["blocks/1/mlp/up"] == {"cpu": "int8"}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_traced_step_obeys_its_policy(family: str, tiny: Any) -> None:
    assert traced_failures(tiny("mixed_bf16", family), "train") == []


def test_fp8_products_of_a_gpu_are_the_ones_asked_for(tiny: Any) -> None:
    with planned_for(Backend("gpu", (9, 0))):
        assert traced_failures(tiny("fp8"), "evaluate") == []


GPU, TPU = Backend("gpu", (9, 0)), Backend("tpu")
WHOLE = "**/softmax: c=bf16"  # cuDNN's attention is traced only where there is cuDNN
DEFAULT = f"mixed_bf16; **: m=default; {WHOLE}"


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    ("policy", "backend"),
    [
        (f"mixed_bf16; {WHOLE}", GPU),
        ("mixed_bf16", TPU),
        (DEFAULT, GPU),
        pytest.param(f"fp8; {WHOLE}", GPU, marks=pytest.mark.long),
        pytest.param(f"mixed_bf16; {NARROW_SITES}", GPU, marks=pytest.mark.long),
        pytest.param("mixed_f16", TPU, marks=pytest.mark.long),
    ],
)
def test_a_step_that_is_traced_for_accelerators_obeys_its_policy(
    policy: str, backend: Backend, family: str, tiny: Any
) -> None:
    assert judged(tiny(policy, family), backend, on_gpus=backend is GPU) == []


def test_parts_of_sums_are_rounded_on_gpus_only_if_the_policy_leaves_it_to_them(tiny: Any) -> None:
    kinds = {kind for kind, _ in judged(tiny(DEFAULT), GPU, on_gpus=False)}
    assert kinds == {"narrow accumulation"}  # for another backend, it would be one


def judged(config: Any, backend: Backend, *, on_gpus: bool) -> list[tuple[str, str]]:
    """What fails in a train step as it is traced for a backend: kind and text."""
    phase = phase_of(config)
    with planned_for(backend):
        step = trace("train", phase, sharding.abstract_mesh(phase.config.mesh, 1)).traced
    judge = TracedJudge(phase.layout, phase.sites, on_gpus=on_gpus)
    judge.read(TracedProgram(step.jaxpr, phase.layout, PARTS))
    findings = [finding for row in judge.table for finding in row.findings]
    return [(f.kind, f.text) for f in findings if f.verdict is not AuditVerdict.PASS]


def encoder(policy: str) -> Any:
    config = bert_tiny_mlm.config()
    small = {"layers": 2, "width": 16, "heads": 2, "vocab_size": 64, "max_positions": 16}
    model = dataclasses.replace(config.model, **small)
    return dataclasses.replace(config, model=model, context=16, batch_size=8, precision=policy)


def test_the_products_of_an_encoder_belong_to_sites() -> None:
    assert traced_failures(encoder("mixed_bf16"), "evaluate") == []


def test_a_compiled_program_obeys_its_policy(tiny: Any) -> None:
    report = audit(tiny("mixed_bf16"), programs=("evaluate",))
    assert report.failures == []
    (one,) = report.inspections
    (share,) = one.shares.values()
    assert share.attributed >= LEAST_ATTRIBUTED
    kinds = {row.tensor for row in one.rows}
    assert {row.traced for row in one.rows if row.tensor == "attention"} == {"blockwise"}
    assert {"y", "arithmetic", "exponentials", "result", "parameters", "flags"} <= kinds
    compiled = [row for row in one.rows if row.tensor == "y"]
    assert compiled
    assert all(row.asked and row.traced and row.compiled for row in compiled)


@pytest.mark.long
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("policy", POLICIES)
def test_no_program_of_a_policy_raises_a_false_alarm(policy: str, family: str, tiny: Any) -> None:
    assert_clean(tiny(policy, family, batch_size=8), ("train", "evaluate", "decode"))


@pytest.mark.long
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("policy", STORED)
def test_no_program_that_reads_elements_raises_a_false_alarm(
    policy: str, family: str, tiny: Any
) -> None:
    assert_clean(tiny(policy, family, batch_size=8), ("evaluate", "decode"))


@pytest.mark.long
@pytest.mark.parametrize("policy", WIDELY_USED)
def test_no_program_of_an_encoder_raises_a_false_alarm(policy: str) -> None:
    assert_clean(encoder(policy), ("train", "evaluate"))


def assert_clean(config: Any, programs: tuple[str, ...]) -> None:
    """On one device, or on eight where there are: `XLA_FLAGS=...force_host_platform...=8`."""
    mesh = sharding.MeshConfig()
    if jax.device_count() == 8:
        mesh = sharding.MeshConfig(data=2, fsdp=2, tensor=2)
    report = audit(dataclasses.replace(config, mesh=mesh), programs=programs)
    assert [(one.name, row.site, finding) for one, row, finding in report.failures] == []
    assert len(report.inspections) == len(programs)
    for one in report.inspections:
        assert one.shares
        assert all(share.attributed >= LEAST_ATTRIBUTED for share in one.shares.values())
