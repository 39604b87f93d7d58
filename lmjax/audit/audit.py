"""Audits the programs of a run on this machine's backend and on any number of targets.

Knows everything else in this room.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from lmjax.audit.programs import NAMES, Traced, trace
from lmjax.audit.report import AuditReport
from lmjax.console import stages
from lmjax.inspection.inspection import Inspection, default_target, inspect
from lmjax.parallel import sharding
from lmjax.precision import exact
from lmjax.runs.resolved import Phase, resolve
from lmjax.train import Config
from lmjax.train.step import PARTS

FAST = {"xla_backend_optimization_level": 0}
"""The machine code is not used; the optimised HLO is the same."""


def audit(
    config: Config,
    *,
    precision: str | None = None,
    programs: Sequence[str] = NAMES,
) -> AuditReport:
    """Audits a run without allocating anything.

    Args:
      config: the run; each phase of its policy is audited.
      precision: a policy instead of the run's own.
      programs: which ones: `train`, `evaluate`, `decode`.

    Raises:
      ValueError: the policy, the mesh or the name of a program cannot be used.
    """
    if precision is not None:
        config = dataclasses.replace(config, precision=precision)
    if unknown := [name for name in programs if name not in NAMES]:
        raise ValueError(f"no program {unknown[0]!r}; there are {', '.join(NAMES)}")
    resolved = resolve(config)
    mesh = sharding.make_mesh(resolved.config.mesh)
    found = [
        _inspected(name, phase, mesh, several=len(resolved.phases) > 1)
        for phase in resolved.phases
        for name in programs
    ]
    return AuditReport(str(resolved.config.policy), default_target(mesh).name, tuple(found))


def _inspected(name: str, phase: Phase, mesh: sharding.Mesh, *, several: bool) -> Inspection:
    with stages.stage(f"tracing the program that {name}s"):
        made: Traced = trace(name, phase, mesh)
    with stages.stage(f"compiling the program that {name}s"):
        options = exact.COMPILER_OPTIONS | FAST
        text = made.traced.lower().compile(compiler_options=options).as_text()
    with stages.stage("comparing it with the policy"):
        title = f"{name} from step {phase.start}" if several else name
        return inspect(
            title,
            made.traced.jaxpr,
            [(default_target(mesh), text)],
            phase.layout,
            phase.sites,
            PARTS,
            exact.COMPILER_OPTIONS,
        )
