"""Number formats, rounding and scaling, and the policy that assigns formats to sites."""

from lmjax.precision.formats import Format, parse_format
from lmjax.precision.grammar import parse_policy
from lmjax.precision.policy import Policy, PolicyError, SitePolicy
from lmjax.precision.rounding import quantize

__all__ = [
    "Format",
    "Policy",
    "PolicyError",
    "SitePolicy",
    "parse_format",
    "parse_policy",
    "quantize",
]
