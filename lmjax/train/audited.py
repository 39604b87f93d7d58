"""`audit.json`: what the compiled train step does with numbers, compared with the policy.

Read off the programs that the run has traced and compiled anyway, in a thread beside the first
steps. A run is never held up or ended by it.

Knows runs, their programs and how programs are inspected.
"""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

from lmjax import strict_json
from lmjax.inspection.inspection import default_target, inspect
from lmjax.inspection.rows import AuditVerdict
from lmjax.parallel.agreement import is_first
from lmjax.precision import exact
from lmjax.runs.metrics import replace_text
from lmjax.runs.resolved import Phase
from lmjax.train.step import PARTS

NAME = "audit.json"


def audit_beside(phase: Phase, mesh: Any, jaxpr: Any, compiled: Any, workdir: Path) -> None:
    """Writes the audit of a phase's train step into a run directory, in the background."""
    if is_first():
        arguments = phase, mesh, jaxpr, compiled, workdir
        threading.Thread(target=_write, args=arguments, name=NAME).start()


def finish_audits() -> None:
    """Waits for audits that are still being written, so that no file appears after its run."""
    for thread in threading.enumerate():
        if thread.name == NAME:
            thread.join()


def _write(phase: Phase, mesh: Any, jaxpr: Any, compiled: Any, workdir: Path) -> None:
    try:
        found = _found(phase, mesh, jaxpr, compiled)
    except Exception as error:  # a program that cannot be read does not stop a run
        found = {"verdict": AuditVerdict.OPAQUE.value, "error": f"{type(error).__name__}: {error}"}
    path = workdir / NAME
    try:
        before = strict_json.read(path)["phases"] if phase.start and path.exists() else {}
        phases = before | {str(phase.start): found}
        replace_text(path, strict_json.dumps({"phases": phases}, indent=1) + "\n")
    except (OSError, KeyError, ValueError):
        return


def _found(phase: Phase, mesh: Any, jaxpr: Any, compiled: Any) -> dict[str, Any]:
    target = default_target(mesh)
    text = compiled.as_text() or ""
    made = inspect(
        "train",
        jaxpr,
        [(target, text)],
        phase.layout,
        phase.sites,
        PARTS,
        exact.COMPILER_OPTIONS,
        phase.attention_forms(parts=mesh.shape["sequence"]),
    )
    return {"precision": phase.config.precision, "devices": target.name} | made.to_json()
