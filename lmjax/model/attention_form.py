"""Which form of attention a policy and the devices allow, and why.

Knows policies, masks and what devices are.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final, NamedTuple

from lmjax.model.mask import Bidirectional, Causal, CausalWithinDocuments, Mask
from lmjax.model.sites import Sites
from lmjax.precision.backend import Backend
from lmjax.precision.formats import Format
from lmjax.precision.policy import SitePolicy

BLOCKWISE: Final = "blockwise"
WHOLE: Final = "whole matrix"
CUDNN: Final = "cuDNN"
SPLASH: Final = "splash attention"

LANES: Final = 128
"""Splash attention cuts queries and keys into multiples of this."""

PRODUCTS: Final = ("scores", "combine")


class Form(NamedTuple):
    """How attention is computed.

    Attributes:
      name: `cuDNN` or `splash attention`, fused kernels; `blockwise`, also in memory that grows
        with the length; `whole matrix`, where all scores of a layer exist at once.
      why: what keeps it from being one of those before; empty where nothing does, and for
        `blockwise` on devices without a kernel.
    """

    name: str
    why: str = ""

    def __str__(self) -> str:
        return f"{self.name} ({self.why})" if self.why else self.name


@dataclass(frozen=True)
class Situation:
    """What decides beside the policy.

    Attributes:
      backend: what the devices are.
      mask: the class of the mask.
      queries, keys, head_size: T, S and H.
      parts: into how many parts devices divide the queries.
      from_start: whether the first query has index 0.
      unit: whether products are divided by roots of their numbers of terms.
      dropout: whether weights are dropped.
      watched: whether tensors inside attention are measured.
    """

    backend: Backend
    mask: type[Mask]
    queries: int
    keys: int
    head_size: int
    parts: int = 1
    from_start: bool = True
    unit: bool = False
    dropout: bool = False
    watched: bool = False


def form_of(sites: Sites, situation: Situation) -> Form:
    """The form for the sites of one attention, by their names."""
    why = next(_whole_because(sites), "")
    if why:
        return Form(WHOLE, why)
    kernel = {"gpu": CUDNN, "tpu": SPLASH}.get(situation.backend.platform)
    if kernel is None:
        return Form(BLOCKWISE)
    why = next(_no_kernel_because(sites, situation), "")
    return Form(BLOCKWISE, why) if why else Form(kernel)


def unrounded_in(sites: Sites, site: str, role: str) -> Format | None:
    """The format in which attention hands on a measured gradient that its product does not round.

    Args:
      sites: of one attention, by their names.
      site: the name of a product.
      role: of the gradient: `dx` or `dw`.

    Returns:
      None where the gradient is rounded to the compute format of the product.
    """
    inside = (site, role) == ("combine", "dx") and not any(_whole_because(sites))
    return sites["softmax"].output if inside else None


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


def _no_kernel_because(sites: Sites, s: Situation) -> Iterator[str]:
    """What keeps a fused kernel from being used."""
    compute = {sites[name].compute.name for name in PRODUCTS}
    gpu = s.backend.platform == "gpu"
    if len(compute) > 1 or not compute <= ({"bf16", "f16"} if gpu else {"bf16"}):
        yield f"operands in {' and '.join(sorted(compute))}"
    if {sites["scores"].result.name, sites["softmax"].compute.name} != {"f32"}:
        yield "softmax in f64"
    if s.unit:
        yield "unit scaling"
    if s.dropout:
        yield "dropout"
    if s.watched:
        yield "measured inside"
    if not s.from_start or s.queries != s.keys:
        yield "a cache"
    yield from _not_cudnn(s) if gpu else _not_splash(s)


def _not_cudnn(s: Situation) -> Iterator[str]:
    if s.backend.capability < (8, 0):
        yield "cuDNN needs compute capability 8.0"
    if s.mask not in (Causal, Bidirectional):
        yield "cuDNN knows no documents" if s.mask is CausalWithinDocuments else "padding"
    if s.parts > 1:
        yield "the context is divided"
    widest = 256 if s.backend.capability >= (9, 0) else 128
    if s.head_size % 8 or s.head_size > widest:
        yield f"heads {s.head_size} wide"


def _not_splash(s: Situation) -> Iterator[str]:
    if s.mask not in (Causal, CausalWithinDocuments, Bidirectional):
        yield "padding"
    if s.queries // s.parts % LANES or s.keys % LANES:
        yield f"a context that is not a multiple of {LANES * s.parts}"
