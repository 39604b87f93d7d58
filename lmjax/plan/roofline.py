"""Bounds the time of a step: the roofline of a plan on a given chip, which may be absent.

Arithmetic, memory and network each take a time at the chip's peak rate. A step takes at least the
longest of the three, if everything overlaps, and at most their sum, if nothing does (Williams et
al. 2009, "Roofline"). `ASSUMPTIONS` states what is counted.

Knows configs, collectives and data sheets.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Final

from lmjax.chips import Chip
from lmjax.hlo.collectives import Collective
from lmjax.model import parameter_count, structure
from lmjax.plan.arithmetic import tokens_on_device
from lmjax.precision import paths
from lmjax.precision.native import multiplied
from lmjax.precision.policy import SitePolicy, carrier
from lmjax.precision.sites import Kind, Place
from lmjax.train import Config, Phase

ASSUMPTIONS: Final = (
    "every rate is the peak of the data sheet; real programs reach 35% to 60% of it",
    "arithmetic: each product once forwards and twice backwards, and once more where blocks are "
    "rematerialised; attention whole, not half for being causal; nothing but products",
    "memory: each product reads its operands and writes its result once, attention scores "
    "included, all elementwise operations are fused into them; the optimizer reads and writes "
    "parameters, gradients and moments once a step",
    "network: the bytes of the compiled program, by ring algorithms, one collective after another; "
    "a group that leaves a node sends through the ports of all its members in the node",
    "mesh axes are laid over devices in their order, the last one nearest",
    "least: arithmetic, memory and network overlap completely; most: not at all",
)


@dataclass(frozen=True)
class Roofline:
    """Lower bounds on the time of one step on one kind of chip, in seconds.

    Attributes:
      chip: name of the chip.
      devices: number of chips.
      compute: time of the products.
      memory: time of memory reads and writes.
      network: time of the collectives, by mesh axes.
      tokens: of a step, on all devices.
    """

    chip: str
    devices: int
    compute: float
    memory: float
    network: dict[str, float]
    tokens: int

    @property
    def sent(self) -> float:
        """Time of all collectives."""
        return sum(self.network.values())

    @property
    def least(self) -> float:
        """With everything overlapped."""
        return max(self.compute, self.memory, self.sent)

    @property
    def most(self) -> float:
        """With nothing overlapped."""
        return self.compute + self.memory + self.sent

    @property
    def bound(self) -> str:
        """What takes longest."""
        times = {"compute": self.compute, "memory": self.memory, "network": self.sent}
        return max(times, key=lambda name: times[name])


@dataclass(frozen=True)
class _Product:
    """A forward product of one micro-batch on one device.

    Attributes:
      site: its formats.
      flops: two for each multiply-add.
      values: elements of both operands and of the result.
      repeated: whether rematerialisation recomputes it.
    """

    site: SitePolicy
    flops: float
    values: float
    repeated: bool


def roofline(
    phase: Phase, mesh: Mapping[str, int], sent: Iterable[Collective], chip: Chip
) -> Roofline:
    """Computes the bounds of a step.

    Args:
      phase: the phase of a run.
      mesh: the size of every axis.
      sent: the collectives of its compiled step.
      chip: the chip to run on.
    """
    config = phase.config
    compute = memory = 0.0
    for product in _products(phase, mesh):
        times = config.micro_batches * (4 if product.repeated else 3)
        compute += times * product.flops / _rate(product.site, chip)
        memory += times * product.values * _width(product.site) / chip.memory_bandwidth
    devices = math.prod(mesh.values())
    parameters = parameter_count(config.model) / (mesh["fsdp"] * mesh["tensor"])
    # Parameters and two moments are read and written, the gradient is read: at most 4 bytes each.
    memory += parameters * 7 * 4 / chip.memory_bandwidth
    network: dict[str, float] = {}
    for collective in sent:
        rate = _network_rate(collective.axes, mesh, chip)
        name = " x ".join(collective.axes)
        network[name] = network.get(name, 0.0) + collective.sent / rate
    return Roofline(
        chip.name, devices, compute, memory, network, config.batch_size * config.context
    )


def _products(phase: Phase, mesh: Mapping[str, int]) -> Iterator[_Product]:
    config, sites = phase.config, phase.sites
    model = config.model
    tokens, cut = tokens_on_device(config, mesh), mesh["tensor"]
    scores = tokens * model.heads / cut * config.context
    for place in phase.layout.places:
        repeated = place.stack is not None and model.remat in ("attention", "full", "offload")
        for site in (sites[path] for path in place.paths):
            if place.site.kind is Kind.ACTIVATION_PRODUCT:
                again = model.remat not in ("none", "attention")
                yield _Product(site, 2 * scores * model.head_size, scores, again)
            elif place.site.is_product:
                inward, outward = _fans(config, place, cut)
                yield _linear(site, tokens, inward, outward, repeated)


def _fans(config: Config, place: Place, cut: int) -> tuple[float, float]:
    """Number of terms that a product sums, and of sums per token, on one device.

    `tensor` divides whichever of the two is not the width of the residual stream.
    """
    if place.site.logits:
        return config.model.width, config.model.vocab_size / cut
    kernel = paths.flatten(structure(config.model)[1])[f"{place.path}/kernel"]
    axes = paths.flatten(structure(config.model)[2], lambda node: isinstance(node, tuple))
    names = axes[f"{place.path}/kernel"]
    fans = dict(zip(names, kernel.shape, strict=True))
    inward, outward = (fans[name] if name == "embed" else fans[name] / cut for name in names[-2:])
    return inward, outward


def _linear(
    site: SitePolicy, tokens: float, inward: float, outward: float, repeated: bool
) -> _Product:
    values = tokens * (inward + outward) + inward * outward
    return _Product(site, 2 * tokens * inward * outward, values, repeated)


def _rate(site: SitePolicy, chip: Chip) -> float:
    """FLOP/s of a product: by the narrowest format that holds both of its operands."""
    operands = [multiplied(one, site.compute) for one in (site.second, site.activations)]
    if all(one.bits <= 8 for one in operands) and "fp8" in chip.flops:
        return chip.flops["fp8"]
    if site.compute.name == "f32" and site.matmul == "tf32":
        return chip.flops.get("tf32", chip.flops["f32"])
    return chip.flops.get(site.compute.name, chip.flops["f32"])


def _width(site: SitePolicy) -> int:
    """Bytes of an element of the compute format, in which operands and results are kept."""
    return carrier(site.compute)(0).dtype.itemsize


def _network_rate(axes: tuple[str, ...], mesh: Mapping[str, int], chip: Chip) -> float:
    """Bytes per second that one device of a group along these mesh axes sends.

    A group with k members in a node and others outside sends through k ports what a single device
    would send through its own (hierarchical rings).
    """
    places = [[0]]
    stride = math.prod(mesh.values())
    for name, size in mesh.items():
        stride //= size
        places.append([place * stride for place in range(size if name in axes else 1)])
    members = [0]
    for steps in places[1:]:
        members = [member + step for member in members for step in steps]
    inside = sum(member < chip.node for member in members)
    return chip.near if inside == len(members) else min(chip.near, inside * chip.far)
