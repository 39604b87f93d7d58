"""Plans a run on devices that may be absent; start from `make_plan` and `roofline`."""

from lmjax.chips import CHIPS, Chip
from lmjax.hlo.collectives import Collective, collectives
from lmjax.hlo.kernels import Product
from lmjax.plan.arithmetic import Traffic, expected_traffic
from lmjax.plan.fitting import TRIES, ChipPlan, Suggestion, plan_for_chips, suggestion
from lmjax.plan.memory import CPU_ONLY, expected_memory
from lmjax.plan.plan import Cut, Plan, cuts, make_plan, scaled
from lmjax.plan.program import Compiled, DoesNotFit, PlanError, Program, compiled_for, partitioned
from lmjax.plan.roofline import ASSUMPTIONS, Roofline, roofline
from lmjax.plan.targets import Target, parse_target
from lmjax.plan.traffic import TrafficRow, compared

__all__ = [
    "ASSUMPTIONS",
    "CHIPS",
    "CPU_ONLY",
    "TRIES",
    "Chip",
    "ChipPlan",
    "Collective",
    "Compiled",
    "Cut",
    "DoesNotFit",
    "Plan",
    "PlanError",
    "Product",
    "Program",
    "Roofline",
    "Suggestion",
    "Target",
    "Traffic",
    "TrafficRow",
    "collectives",
    "compared",
    "compiled_for",
    "cuts",
    "expected_memory",
    "expected_traffic",
    "make_plan",
    "parse_target",
    "partitioned",
    "plan_for_chips",
    "roofline",
    "scaled",
    "suggestion",
]
