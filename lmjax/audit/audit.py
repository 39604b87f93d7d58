"""Audits the programs of a run on this machine's backend and on any number of targets.

Knows everything else in this room.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from lmjax.audit.programs import NAMES, Traced, trace
from lmjax.audit.report import AuditReport
from lmjax.console import stages
from lmjax.errors import InputError
from lmjax.inspection.beside import side_by_side
from lmjax.inspection.inspection import Inspection, default_target, inspect
from lmjax.inspection.judge_compiled import CompiledFor
from lmjax.parallel import sharding
from lmjax.plan import Target, compiled_for, parse_target
from lmjax.precision import exact
from lmjax.precision.backend import planned_for
from lmjax.runs.resolved import Phase, resolve
from lmjax.runs.state import refuse_stored
from lmjax.train import Config
from lmjax.train.step import PARTS

FAST = {"xla_backend_optimization_level": 0}
"""The machine code is not used; the optimised HLO is the same."""


def audit(
    config: Config,
    *,
    precision: str | None = None,
    programs: Sequence[str] = (),
    targets: Sequence[str] = (),
) -> AuditReport:
    """Audits a run without allocating anything.

    Args:
      config: the run; each phase of its policy is audited.
      precision: a policy instead of the run's own.
      programs: which of `train`, `evaluate`, `decode`; by default all that the run can have.
      targets: chips, such as `h100:8`, for which the train step is traced and compiled too, with
        their own compilers; see `lmjax.plan.parse_target`.

    Raises:
      ValueError: the policy, the mesh, a target or the name of a program cannot be used.
      PlanError: the compiler of a target refuses the step.
      InputError: the train step is asked for, of weights that are stored to be read alone.
    """
    if precision is not None:
        config = dataclasses.replace(config, precision=precision)
    if unknown := [name for name in programs if name not in NAMES]:
        raise ValueError(f"no program {unknown[0]!r}; there are {', '.join(NAMES)}")
    chips = [parse_target(target) for target in targets]
    resolved = resolve(config)
    mesh = sharding.make_mesh(resolved.config.mesh)
    several = len(resolved.phases) > 1
    untrained = "" if programs or targets else _untrained(resolved.phases)
    found = [
        _inspected(name, _title(name, phase, several), phase, mesh)
        for phase in resolved.phases
        for name in programs or NAMES
        if not (untrained and name == "train")
    ]
    found += [
        _on_chips(_title("train", phase, several), phase, chip)
        for phase in resolved.phases
        for chip in chips
    ]
    precision, devices = str(resolved.config.policy), default_target(mesh).name
    return AuditReport(precision, devices, side_by_side(found), untrained)


def _untrained(phases: Sequence[Phase]) -> str:
    """Why a run has no train step; empty if it has one."""
    try:
        for phase in phases:
            refuse_stored(phase)
    except InputError as error:
        return str(error)
    return ""


def _title(name: str, phase: Phase, several: bool) -> str:
    return f"{name} from step {phase.start}" if several else name


def _inspected(name: str, title: str, phase: Phase, mesh: sharding.Mesh) -> Inspection:
    with stages.stage(f"tracing the program that {name}s"):
        made: Traced = trace(name, phase, mesh)
    with stages.stage(f"compiling the program that {name}s"):
        options = exact.COMPILER_OPTIONS | FAST
        text = made.traced.lower().compile(compiler_options=options).as_text()
    with stages.stage("comparing it with the policy"):
        return inspect(
            title,
            made.traced.jaxpr,
            [(default_target(mesh), text)],
            phase.layout,
            phase.sites,
            PARTS,
            exact.COMPILER_OPTIONS,
            # One token has few scores, which are read at once.
            {} if name == "decode" else phase.attention_forms(parts=mesh.shape["sequence"]),
        )


def _on_chips(title: str, phase: Phase, chip: Target) -> Inspection:
    """The train step as it is traced and compiled for chips that this machine may lack."""
    text = compiled_for(phase.config, chip).text
    mesh = sharding.abstract_mesh(phase.config.mesh, chip.devices)
    with planned_for(chip.backend):
        jaxpr = trace("train", phase, mesh).traced.jaxpr
    sizes = sharding.mesh_shape(phase.config.mesh, chip.devices)
    column = CompiledFor(chip.name, chip.backend.platform, sizes)
    options = exact.COMPILER_OPTIONS
    forms = phase.attention_forms(chip.backend, sizes["sequence"])
    return inspect(title, jaxpr, [(column, text)], phase.layout, phase.sites, PARTS, options, forms)
