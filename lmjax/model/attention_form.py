"""Which form of attention a policy allows, and why.

Knows policies.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final, NamedTuple

from lmjax.model.sites import Sites, within
from lmjax.precision.policy import SitePolicy
from lmjax.precision.sites import Layout

BLOCKWISE: Final = "blockwise"
WHOLE: Final = "whole matrix"

PRODUCTS: Final = ("scores", "combine")


class Form(NamedTuple):
    """How attention is computed.

    Attributes:
      name: `blockwise`, in memory that grows with the length; or `whole matrix`, where all scores
        of a block of the model exist at once.
      why: what asks for the whole matrix; empty for the other.
    """

    name: str
    why: str = ""

    def __str__(self) -> str:
        return f"{self.name} ({self.why})" if self.why else self.name


def form_of(sites: Sites) -> Form:
    """The form for the sites of one attention, by their names."""
    why = next(_whole_because(sites), "")
    return Form(WHOLE, why) if why else Form(BLOCKWISE)


def attention_forms(layout: Layout, sites: Sites) -> dict[str, Form]:
    """The form of every attention of a model, by the path of its softmax.

    Args:
      layout: the sites of the model.
      sites: the formats of every site.
    """
    paths = (path for place in layout.named("softmax") for path in place.paths)
    return {path: form_of(within(sites, path.rpartition("/")[0])) for path in paths}


def _whole_because(sites: Sites) -> Iterator[str]:
    """What a policy names that blocks cannot do."""
    for name in PRODUCTS:
        site = sites[name]
        for key, operand in _operands(site):
            if operand:
                yield f"{name} has {key}={operand}"
        if site.accum.chunk or site.accum.format.bits < 32:
            yield f"{name} has a={site.accum}"
    scores, softmax = sites["scores"], sites["softmax"]
    if scores.result.name not in ("f32", "f64"):
        yield f"scores are rounded to {scores.result.name}"
    if softmax.compute.name not in ("f32", "f64"):
        yield f"softmax has c={softmax.compute.name}"
    if softmax.output != softmax.compute:
        yield f"softmax has o={softmax.output.name}"


def _operands(site: SitePolicy) -> Iterator[tuple[str, str]]:
    operands = {"x": site.activations, "g": site.grads, "xb": site.backward_activations}
    return ((key, str(operand) if operand else "") for key, operand in operands.items())
