"""What a number is, and where each is used."""

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
