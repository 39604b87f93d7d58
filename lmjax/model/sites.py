"""What a site of the model is: its path, its formats, and what it is given to measure and draw.

A site is a place where a policy can say something. Elementwise sites `take` their input and `give`
their result; products do the same inside `einsum`. A `Context` hands randomness and probes down the
tree of parts, by name.

Knows JAX and policies; no parameters.
"""

from __future__ import annotations

import functools
import zlib
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from lmjax.model.config import ModelConfig
from lmjax.precision.formats import Format, parse_format
from lmjax.precision.matmul import Key
from lmjax.precision.policy import SitePolicy
from lmjax.precision.probes import Probe, Rounded, report, report_cotangent

Sites = Mapping[str, SitePolicy]
"""Formats by the path of their site."""


def within(sites: Sites, prefix: str) -> dict[str, SitePolicy]:
    """The sites below `prefix`, by the rest of their path."""
    start = prefix + "/"
    return {path.removeprefix(start): s for path, s in sites.items() if path.startswith(start)}


class Context(NamedTuple):
    """What a part of the model is given beside parameters, inputs and formats.

    Attributes:
      key: random key of dropout and stochastic rounding; None switches both off.
      factors: what `Probe.factors` is for each site within, nested by the components of its path.
      slots: what `Probe.slots` is, likewise.
    """

    key: Key = None
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


def take(x: jax.Array, site: SitePolicy, probe: Probe | None) -> jax.Array:
    """The input of an elementwise site, in its compute format.

    A probe measures `dx`, the cotangent that the site hands back, before it is rounded to the
    format that the input came in.
    """
    if probe is None or "dx" not in probe.slots:
        return site.to_compute(x)
    rounded = functools.partial(_narrowed, dtype=x.dtype)
    return report_cotangent(site.to_compute(x), probe.slots["dx"], rounded)


def _narrowed(g: jax.Array, *, dtype: Any) -> Rounded:
    return Rounded(g, g, g.astype(dtype), parse_format(jnp.dtype(dtype).name))


def give(y: jax.Array, site: SitePolicy, probe: Probe | None) -> jax.Array:
    """The result of an elementwise site, in its output format; a probe measures `y` before."""
    output = site.to_output(y)
    if probe is None:
        return output
    return report(output, probe.slots.get("y", {}), lambda: Rounded(y, y, output, site.output))


def block_sites(config: ModelConfig) -> list[str]:
    """The sites inside one block: where precision can be chosen, in the order of computation."""
    attention = ["norm", "query", "key", "value"]
    attention += ["query_norm", "key_norm"] if config.qk_norm else []
    attention += ["rope"] if config.positions == "rope" else []
    attention += ["scores", "softmax", "combine", "out"]
    mlp = ["norm", "up", *(["gate"] if config.activation == "swiglu" else []), "activation", "down"]
    return [
        "residual",
        *(f"attention/{site}" for site in attention),
        *(f"mlp/{site}" for site in mlp),
    ]


def input_format(path: str, sites: Sites) -> Format:
    """The format in which an elementwise site's input arrives, and its cotangent leaves.

    Args:
      path: of a site that is no product.
      sites: the formats of every site of the model.
    """
    parent, _, kind = path.rpartition("/")
    if kind in ("embed", "positions"):
        return sites[path].params
    if kind in ("loss", "residual"):
        return sites["head" if kind == "loss" else path].output
    if kind == "norm":
        if not parent:
            blocks = [site for site in sites if site.endswith("/residual")]
            return sites[blocks[-1]].output
        return sites[parent.rpartition("/")[0] + "/residual"].compute
    before = {
        "query_norm": ["query"],
        "key_norm": ["key"],
        "rope": ["query_norm", "query"],
        "softmax": ["scores"],
        "activation": ["up"],
    }
    return next(
        sites[f"{parent}/{name}"].output for name in before[kind] if f"{parent}/{name}" in sites
    )
