"""What a site of the model is: its path, its formats, and what it is given to measure and draw.

A site is a place where a policy can say something. Elementwise sites `take` their input and `give`
their result; products do the same inside `einsum`. A `Context` hands randomness and probes down the
tree of parts, by name.

Knows JAX and policies; no parameters.
"""

from __future__ import annotations

import functools
import zlib
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, NamedTuple, ParamSpec, TypeVar

import jax
import jax.numpy as jnp

from lmjax.precision.formats import parse_format
from lmjax.precision.matmul import RandomKey
from lmjax.precision.policy import SitePolicy
from lmjax.precision.probes import (
    Probe,
    Rounded,
    report,
    report_cotangent,
    tap,
    tap_cotangent,
)
from lmjax.precision.taps import taps_in

P = ParamSpec("P")
R = TypeVar("R")

Sites = Mapping[str, SitePolicy]
"""Formats by the path of their site."""


def within(sites: Sites, prefix: str, called: str = "") -> dict[str, SitePolicy]:
    """The sites below `prefix`, by the rest of their path.

    Args:
      sites: the formats of every site.
      prefix: path of a part of the model.
      called: what the part is called in compiled programs, if it stands for others too: the blocks
        of one scan are one piece of program.
    """
    start = prefix + "/"
    inside = {path.removeprefix(start): s for path, s in sites.items() if path.startswith(start)}
    if not called:
        return inside
    return {rest: replace(site, path=f"{called}/{rest}") for rest, site in inside.items()}


class Context(NamedTuple):
    """What a part of the model is given beside parameters, inputs and formats.

    Attributes:
      key: random key of dropout and stochastic rounding; None switches both off.
      factors: what `Probe.factors` is for each site within, nested by the components of its path.
      slots: what `Probe.slots` is, likewise.
    """

    key: RandomKey = None
    factors: Any = None
    slots: Any = None

    def at(self, name: str) -> Context:
        """The context of the part called `name`, with a key of its own."""
        key = None if self.key is None else jax.random.fold_in(self.key, zlib.crc32(name.encode()))
        return Context(key, (self.factors or {}).get(name), (self.slots or {}).get(name))

    @property
    def probe(self) -> Probe | None:
        """The probe of this part, which must be a site."""
        return Probe(self.factors or {}, self.slots or {}) if self.factors or self.slots else None


QUIET = Context()
"""No randomness, nothing measured: evaluation."""


class Calibrated(NamedTuple):
    """Parameters together with the scale factors that they are evaluated with.

    Attributes:
      params: the parameters.
      factors: observed and learned factors, as in `Context`.
    """

    params: Any
    factors: Any


def in_evaluation(params: Any) -> tuple[Any, Context]:
    """Parameters that may be `Calibrated`, and the context to apply them in."""
    if isinstance(params, Calibrated):
        return params.params, Context(None, params.factors)
    return params, QUIET


def at_site(function: Callable[P, R]) -> Callable[P, R]:
    """Decorates what a site computes: it is traced in the scope of its `SitePolicy` argument."""

    @functools.wraps(function)
    def entered(*arguments: P.args, **options: P.kwargs) -> R:
        given = (*arguments, *options.values())
        site = next(value for value in given if isinstance(value, SitePolicy))
        with site.scope:
            return function(*arguments, **options)

    return entered


def take(x: jax.Array, site: SitePolicy, probe: Probe | None) -> jax.Array:
    """The input of an elementwise site, in its compute format.

    A probe measures `dx`, the cotangent that the site hands back, before it is rounded to the
    format that the input came in; a tap takes it after that. Another measures the input, `x`.
    """
    if probe is None:
        return site.to_compute(x)
    x = tap(x, probe.slots, "x", site.compute)
    if "dx" not in probe.slots:
        return site.to_compute(x)
    slots, taps = probe.slots["dx"], taps_in(probe.slots["dx"])
    counted = {who: slot for who, slot in slots.items() if who not in taps}
    rounded = functools.partial(_narrowed, dtype=x.dtype)
    x = tap_cotangent(x, {"dx": taps}, "dx", site.compute)
    return report_cotangent(site.to_compute(x), counted, rounded)


def _narrowed(g: jax.Array, *, dtype: Any) -> Rounded:
    return Rounded(g, g, g.astype(dtype), parse_format(jnp.dtype(dtype).name))


def give(y: jax.Array, site: SitePolicy, probe: Probe | None) -> jax.Array:
    """The result of an elementwise site, in its output format.

    A probe measures `y` before, and `dy`, its cotangent as it arrives.
    """
    output = site.to_output(y)
    if probe is None:
        return output
    given = report(output, probe.slots.get("y", {}), lambda: Rounded(y, y, output, site.output))
    return tap_cotangent(given, probe.slots, "dy", site.output)


def within_site(x: jax.Array, site: SitePolicy, probe: Probe | None, role: str) -> jax.Array:
    """Another tensor that a site hands on, in its compute format; a probe taps it as `role`."""
    return x if probe is None else tap(x, probe.slots, role, site.compute)
