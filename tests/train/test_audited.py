"""A run directory says what the compiled step does with numbers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from lmjax import strict_json
from lmjax.parallel import sharding
from lmjax.runs.resolved import phase_of
from lmjax.train.audited import NAME, audit_beside, finish_audits


def written(workdir: Path, config: Any, jaxpr: Any, compiled: Any) -> dict[str, Any]:
    phase = phase_of(config)
    mesh = sharding.make_mesh(phase.config.mesh, jax.devices()[:1])
    audit_beside(phase, mesh, jaxpr, compiled, workdir)
    finish_audits()
    return strict_json.read(workdir / NAME)["phases"]["0"]


def test_the_audit_of_a_step_is_in_the_run_directory(tmp_path: Path, tiny: Any) -> None:
    def product(x: jax.Array) -> jax.Array:
        with jax.named_scope("blocks/0-1/mlp/up"), jax.named_scope("y"):
            narrow = x.astype(jnp.bfloat16)
            return jnp.dot(narrow, narrow, preferred_element_type=jnp.float32)

    traced = jax.jit(product).trace(jnp.ones((8, 8), jnp.float32))
    compiled = traced.lower().compile()
    good = written(tmp_path, tiny("mixed_bf16"), traced.jaxpr, compiled)
    assert good["verdict"] == "pass"
    assert "blockwise" in [row["traced"] for row in good["rows"] if row["tensor"] == "attention"]
    bad = written(tmp_path, tiny("f32"), traced.jaxpr, compiled)
    failed = {finding["kind"] for row in bad["rows"] for finding in row["findings"]}
    assert bad["verdict"] == "fail"
    assert "narrowed" in failed


def test_a_program_that_cannot_be_read_holds_up_no_run(tmp_path: Path, tiny: Any) -> None:
    found = written(tmp_path, tiny("f32"), None, None)
    assert found["verdict"] == "opaque"
    assert "error" in found
