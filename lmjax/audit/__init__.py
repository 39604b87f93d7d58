"""Audits a run: what its policy asked, what was traced, what was compiled, side by side.

    from lmjax.audit import audit
    report = audit(experiments.quickstart.config())
    report.verdict, report.failures

The comparison itself is `lmjax/inspection`, which reads programs and shares no code with what
builds them; this room makes the programs of a run and shows what was found.
"""

from lmjax.audit.audit import audit
from lmjax.audit.report import AuditReport
from lmjax.inspection.rows import AuditFinding, AuditRow, AuditVerdict

__all__ = ["AuditFinding", "AuditReport", "AuditRow", "AuditVerdict", "audit"]
