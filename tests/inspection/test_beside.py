"""Several targets in one table."""

from __future__ import annotations

from lmjax.inspection.beside import side_by_side
from lmjax.inspection.inspection import Inspection, Share
from lmjax.inspection.rows import TRACED, AuditRow, AuditVerdict

OPAQUE = AuditVerdict.OPAQUE


def inspected(target: str, *rows: AuditRow) -> Inspection:
    for row in rows:
        row.compiled[target] = f"as {target} does"
    return Inspection("train", list(rows), {target: Share(1.0, 1.0, ())}, (target,))


def test_targets_stand_side_by_side() -> None:
    alike, other = (AuditRow("up", "forward", "y", "f32", traced) for traced in ("f32", "bf16"))
    same = [AuditRow("down", "forward", "y", "f32", "f32") for _ in range(2)]
    kernel = AuditRow("up", "forward", "kernel", "", "pallas_call")
    for row in same:
        row.note("emulated", "as f32", TRACED, AuditVerdict.PASS)
    other.note("narrowed", "bf16 where f32 was asked", TRACED)
    kernel.note("kernel", "a kernel", "tpu", OPAQUE)
    one, two = inspected("cpu", alike, same[0]), inspected("tpu", other, kernel, same[1])
    alone = inspected("cpu")
    alone.name = "decode"

    both, decode = side_by_side([one, alone, two])
    assert decode is alone
    assert both.targets == ("cpu", "tpu")
    assert set(both.shares) == {"cpu", "tpu"}
    assert [(row.site, row.tensor) for row in both.rows] == [
        ("up", "y"), ("up", "kernel"), ("down", "y")
    ]  # fmt: skip
    product, custom, down = both.rows
    assert (product.asked, product.traced) == ("f32", "cpu: f32; tpu: bf16")
    assert product.compiled == {"cpu": "as cpu does", "tpu": "as tpu does"}
    assert [finding.column for finding in product.findings] == ["tpu traced"]
    assert product.verdict_for("cpu") is AuditVerdict.PASS
    assert product.verdict_for("tpu") is AuditVerdict.FAIL
    assert (custom.traced, custom.verdict_for("tpu")) == ("pallas_call", OPAQUE)
    assert [(f.kind, f.column) for f in down.findings] == [("emulated", TRACED)]
