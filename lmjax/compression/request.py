"""What to quantize a run to: its settings, and the policy of the run that comes of it.

Knows policies, their grammar and their settings.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

from lmjax.checks import at_least, validate
from lmjax.compression.observers import Observer
from lmjax.errors import InputError
from lmjax.model import Sites
from lmjax.precision.grammar import KEYS, parse_policy
from lmjax.precision.policy import Policy, PolicyError, Rule
from lmjax.precision.quantizer import Quantizer
from lmjax.precision.settings import Operand

Method = Literal["nearest", "gptq", "awq", "smoothquant"]


@dataclass(frozen=True)
class QuantizeConfig:
    """How a run is quantized."""

    policy: str
    """What tensors become, such as w=int8@channel; keys that it leaves out are the run's own."""
    calibrate: Path | None = None
    """Calibration text in UTF-8, for a classifier one text per line; default: the training text."""
    method: Method = "nearest"
    """How weights are rounded: to nearest, or by GPTQ, AWQ or SmoothQuant."""
    observer: Observer = "minmax"
    """What factors cover: minmax all of a group; percentile 99.9% of its non-zeros; mse what errs
    least."""
    windows: Annotated[int, at_least(1)] = 64
    """The most windows of the calibration text, each as long as the context; or texts of it."""
    keep_worst: Annotated[int, at_least(0)] = 0
    """Products that stay in the compute format: those that cost most on the calibration text."""

    def __post_init__(self) -> None:
        """Rejects values out of range."""
        validate(self)


def quantized_policy(own: Policy, text: str) -> Policy:
    """The policy of a quantized run.

    Args:
      own: the policy of the run.
      text: what was asked for. If it begins with a preset or a format it is a whole policy;
        otherwise its keys and rules come on top of the run's.

    Returns:
      A policy under which every quantized weight is `.stored`.

    Raises:
      InputError: it cannot be read, or has phases.
    """
    try:
        given = parse_policy(text)
    except PolicyError as error:
        raise InputError(str(error)) from error
    if given.later:
        raise InputError(f"the policy '{text}' has phases; a quantized run has none")
    names = [part.partition("=") for part in text.partition(";")[0].split(",")]
    if all(equals for _, equals, _ in names):
        short = {name: key for key, row in KEYS.items() for name in (key, row.long)}
        asked = {short[name.strip()] for name, _, _ in names}
        base = dict(own.base) | {key: given.base[key] for key in asked}
        given = replace(given, base={key: base[key] for key in KEYS if key in base})
        given = replace(given, rules=(*own.rules, *given.rules))
    return Policy(
        _storing(given.base), tuple(replace(r, settings=_storing(r.settings)) for r in given.rules)
    )


def _storing(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings whose quantized weights are stored."""
    return {key: _stored(value) if key == "w" else value for key, value in settings.items()}


def _stored(operand: Operand) -> Operand:
    if operand.quantizer.groups == "none":
        return operand
    if operand.rotation:
        raise InputError(f"w={operand}: weights that are stored are not rotated; leave out .rht")
    return Operand(operand.quantizer.of_the_tensor, kept="stored")


def keeping(policy: Policy, kept: Sequence[str], sites: Sites) -> Policy:
    """A policy under which the products at some paths keep their weights in the compute format."""

    def rule(path: str) -> Rule:
        of_x = sites[path].activations
        wide: dict[str, Any] = {"w": Operand(Quantizer(sites[path].compute))}
        if of_x is not None and of_x.kept:
            wide["x"] = replace(of_x, kept="")
        return Rule(path, wide)

    return replace(policy, rules=(*policy.rules, *map(rule, kept)))
