"""Computes the expected traffic of a step from the config and the sizes of the mesh.

With d, f, t, s the sizes of the mesh axes data, fsdp, tensor and sequence, m micro-batches, L
blocks of width D, N = rows x positions of a micro-batch on one device, and ring(n) = (n - 1) / n,
one device sends in a step, in bytes:

parameters    all-gather over fsdp of each weight P, in its compute format c, forwards and again
              backwards:

                  2 m ring(f) P/t bytes(c)

              The head only once, because the gradients of its product follow immediately; likewise
              blocks that are neither scanned (`unroll`) nor rematerialised: XLA keeps them.

              This is ZeRO's third stage (Rajbhandari et al. 2020, section 7.2.2: two of its three
              parameter volumes). Nothing without fsdp.
gradients     reduce-scatter over fsdp and all-reduce of the slice over data and sequence:

                  m (ring(f) P/t + 2 ring(d s) P/(t f)) bytes

              in f32, before weight gradients are rounded; with a policy that reduces in another
              format (key `r`), one all-reduce over data and fsdp in that format. This is ZeRO's
              third volume; for f = 1, plain data parallelism. Every micro-batch is reduced. With
              `deterministic_reductions`, each device gathers all parameters in their stored format
              for each micro-batch and once for the update, and sends its f32 sum of all gradients
              log2(d f) times; nothing else:

                  (m + 1) ring(f) P bytes(p) + m log2(d f) 4 P

embedding     tokens go to the devices that hold columns of the table, and rows come back in the
              compute format; their cotangents take the opposite way:

                  m ring(f) N (4 f + 2 D bytes(c))

              The rows of a table that is sharded over tensor are summed over it in their stored
              format: 2 m ring(t) N D bytes(p). The table's gradient then lacks only a sum over
              data and one over sequence.
activations   a product whose weight is sharded along the summed axis is summed over tensor, in
              its accumulator. Forwards, two per block: `out` and `down` (Shoeybi et al. 2019,
              section 3, g). Backwards, one for each product that reads the residual stream:
              `query`, `key`, `value`, `up`, `gate` and the head. Shoeybi et al. need only two,
              because they add these up first; here each is first rounded to its compute format,
              and so must be complete. Fully rematerialised blocks repeat `out`. For a Llama:

                  2 m ring(t) N D bytes(a) (L (2 + 5 + 1) + 1)

positions     keys and values are gathered over sequence, forwards and backwards, and their
              gradients are summed over it and scattered:

                  2 m L ring(s) (2 bytes(c) + bytes(a)) N s K/t

              for keys of width K.

Scalars (losses, norms and flags) are not counted.

Knows configs, the names of parameters, and policies.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp

from lmjax.model import structure
from lmjax.parallel.sharding import RULES
from lmjax.precision import paths
from lmjax.precision.formats import Format
from lmjax.precision.policy import F32, SitePolicy, carrier
from lmjax.precision.sites import Kind
from lmjax.train import Config, Phase


@dataclass(frozen=True)
class Traffic:
    """The traffic of one device in a step for one purpose.

    Attributes:
      purpose: `parameters`, `gradients`, `embedding`, `activations` or `positions`.
      kind: the collective.
      dtype: HLO name of the dtype.
      axes: the mesh axes along which it runs.
      sent: bytes sent.
    """

    purpose: str
    kind: str
    dtype: str
    axes: tuple[str, ...]
    sent: float


@dataclass(frozen=True)
class _Weight:
    """A parameter and how many ways each mesh axis divides it.

    Attributes:
      path: path of the parameter.
      size: number of values.
      site: the site that it belongs to.
      copies: number of blocks stacked in it; 0 outside blocks.
      product: the site that multiplies by it, if any; for a tied table, the head.
      fsdp, tensor: by how much these mesh axes divide it.
    """

    path: str
    size: int
    site: SitePolicy
    copies: int
    product: SitePolicy | None
    fsdp: int
    tensor: int

    @property
    def is_table(self) -> bool:
        """Whether it is the embedding of tokens."""
        return self.site.site.name == "embed"


def expected_traffic(phase: Phase, mesh: Mapping[str, int]) -> list[Traffic]:
    """Computes the traffic of a step on a mesh of these sizes.

    Args:
      phase: the phase of a run.
      mesh: the size of every axis.

    Returns:
      One entry for each purpose, kind, dtype and axes with nonzero traffic.
    """
    total: dict[tuple[str, str, str, tuple[str, ...]], float] = {}
    config, weights = phase.config, list(_weights(phase, mesh))
    usual = (_parameters, _gradients, _embedding, _activations, _positions)
    for part in (_in_order,) if config.reductions.in_order else usual:
        for one in part(phase, mesh, weights):
            key = (one.purpose, one.kind, one.dtype, one.axes)
            total[key] = total.get(key, 0.0) + config.micro_batches * one.sent
    return [Traffic(*key, sent) for key, sent in total.items() if sent]


def tokens_on_device(config: Config, mesh: Mapping[str, int]) -> float:
    """Tokens of a micro-batch whose activations one device holds."""
    devices = mesh["data"] * mesh["fsdp"] * mesh["sequence"]
    parts = max(devices, config.reductions.parts)
    return config.batch_size / config.micro_batches * config.context / parts


def _weights(phase: Phase, mesh: Mapping[str, int]) -> Iterator[_Weight]:
    _, shapes, axes = structure(phase.config.model)
    sites = phase.param_sites
    named = paths.flatten(axes, lambda node: isinstance(node, tuple))
    for path, leaf in paths.flatten(shapes).items():
        cut = {"fsdp": 1, "tensor": 1}
        for axis, size in zip(named[path], leaf.shape, strict=True):
            for name in RULES.get(axis, ()):
                cut[name] = mesh[name] if size % mesh[name] == 0 else 1
        stack = phase.layout.place_of_parameter(path).stack
        copies = 0 if stack is None else stack.size
        product = _product(phase, path, leaf.ndim - bool(copies), sites[path])
        yield _Weight(path, leaf.size, sites[path], copies, product, cut["fsdp"], cut["tensor"])


def _product(phase: Phase, path: str, dimensions: int, site: SitePolicy) -> SitePolicy | None:
    """The site that multiplies by a parameter of this rank, if there is one."""
    if site.site.name == "embed":
        return phase.sites["head"] if phase.config.model.tied_head else None
    return site if site.site.is_product and dimensions == 2 else None


def _in_order(phase: Phase, mesh: Mapping[str, int], weights: list[_Weight]) -> Iterator[Traffic]:
    """The traffic of `sharding.in_order`, which exchanges at distances 1, 2, 4 and so on."""
    for weight in weights:
        stored = carrier(weight.site.params)
        times = 1 + 1 / phase.config.micro_batches  # once per micro-batch and once for the update
        sent = times * _ring(weight.fsdp) * weight.size * _bytes(stored)
        yield Traffic("parameters", "all-gather", _hlo(stored), ("fsdp",), sent)
        for axis in RULES["batch"]:
            sent = math.log2(mesh[axis]) * weight.size * 4
            yield Traffic("gradients", "collective-permute", "f32", (axis,), sent)


def _parameters(phase: Phase, mesh: Mapping[str, int], weights: list[_Weight]) -> Iterator[Traffic]:
    model = phase.config.model
    loop = model.unroll < model.layers or model.remat != "none"
    for weight in weights:
        if weight.product is not None:
            dtype = carrier(weight.product.compute)
            times = 2 if loop and weight.copies else 1
            sent = times * _ring(weight.fsdp) * weight.size / weight.tensor * _bytes(dtype)
            yield Traffic("parameters", "all-gather", _hlo(dtype), ("fsdp",), sent)


def _gradients(phase: Phase, mesh: Mapping[str, int], weights: list[_Weight]) -> Iterator[Traffic]:
    narrow = mesh["data"] * mesh["fsdp"] > 1 and any(w.site.reduce != F32 for w in weights)
    for weight in weights:
        if narrow:
            yield from _reduced_narrow(mesh, weight)
        else:
            yield from _reduced(mesh, weight)


def _reduced(mesh: Mapping[str, int], weight: _Weight) -> Iterator[Traffic]:
    size = weight.size / weight.tensor
    cut = size / weight.fsdp
    if weight.product is not None:
        sent = _ring(weight.fsdp) * size * 4
        yield Traffic("gradients", "reduce-scatter", "f32", ("fsdp",), sent)
        yield _all_reduced(mesh, ("data", "sequence"), cut)
    # Rows and biases are summed along one axis after another.
    if weight.is_table:
        yield _all_reduced(mesh, ("data",), cut)
        yield _all_reduced(mesh, ("sequence",), cut)
    elif weight.product is None:
        yield _all_reduced(mesh, ("data", "fsdp") if weight.fsdp == 1 else ("data",), cut)
        yield _all_reduced(mesh, ("sequence",), cut)


def _all_reduced(mesh: Mapping[str, int], names: tuple[str, ...], size: float) -> Traffic:
    axes = tuple(name for name in names if mesh[name] > 1)
    group = math.prod(mesh[name] for name in axes)
    return Traffic("gradients", "all-reduce", "f32", axes, 2 * _ring(group) * size * 4)


def _reduced_narrow(mesh: Mapping[str, int], weight: _Weight) -> Iterator[Traffic]:
    axes = tuple(name for name in RULES["batch"] if mesh[name] > 1)
    dtype = carrier(weight.site.reduce)
    size = weight.size / weight.tensor * _bytes(dtype)
    group = math.prod(mesh[name] for name in axes)
    if weight.fsdp == group:
        sent = _ring(group) * size
        yield Traffic("gradients", "reduce-scatter", _hlo(dtype), axes, sent)
    else:
        sent = 2 * _ring(group) * size
        yield Traffic("gradients", "all-reduce", _hlo(dtype), axes, sent)


def _embedding(phase: Phase, mesh: Mapping[str, int], weights: list[_Weight]) -> Iterator[Traffic]:
    config = phase.config
    table = next(weight for weight in weights if weight.is_table)
    tokens = tokens_on_device(config, mesh)
    rows = tokens * config.model.width
    stored, computed = carrier(table.site.params), carrier(table.site.compute)
    fsdp, ring = ("fsdp",), _ring(table.fsdp)
    # With a document mask, learned positions are looked up in a table, as tokens are.
    lookups = 2 if config.data.document_mask and config.model.positions == "learned" else 1
    sent = lookups * ring * tokens * table.fsdp * 4
    yield Traffic("embedding", "all-gather", "s32", fsdp, sent)
    sent = 2 * ring * rows * _bytes(computed)
    yield Traffic("embedding", "all-to-all", _hlo(computed), fsdp, sent)
    sent = 2 * _ring(table.tensor) * rows * _bytes(stored)
    yield Traffic("embedding", "all-reduce", _hlo(stored), ("tensor",), sent)


def _activations(
    phase: Phase, mesh: Mapping[str, int], weights: list[_Weight]
) -> Iterator[Traffic]:
    config = phase.config
    rows = tokens_on_device(config, mesh) * config.model.width
    for weight in weights:
        if weight.product is None:
            continue
        times = max(weight.copies, 1)
        if weight.product.site.name == "out" and config.model.remat in (
            "attention",
            "full",
            "offload",
        ):
            times *= 2
        dtype = _summed_in(weight.product.accum.format)
        sent = times * 2 * _ring(weight.tensor) * rows * _bytes(dtype)
        yield Traffic("activations", "all-reduce", _hlo(dtype), ("tensor",), sent)


def _positions(phase: Phase, mesh: Mapping[str, int], weights: list[_Weight]) -> Iterator[Traffic]:
    config = phase.config
    model, sequence = config.model, mesh["sequence"]
    heads = model.kv_head_count
    cut = mesh["tensor"] if heads % mesh["tensor"] == 0 else 1
    whole = tokens_on_device(config, mesh) * sequence * heads * model.head_size / cut
    products = [p for p in phase.layout.places if p.site.kind is Kind.ACTIVATION_PRODUCT]
    for product in products:
        for site in (phase.sites[path] for path in product.paths):
            computed, summed = carrier(site.compute), _summed_in(site.accum.format)
            gathered = 2 * _ring(sequence) * whole * _bytes(computed)
            yield Traffic("positions", "all-gather", _hlo(computed), ("sequence",), gathered)
            reduced = _ring(sequence) * whole * _bytes(summed)
            yield Traffic("positions", "reduce-scatter", _hlo(summed), ("sequence",), reduced)


def _summed_in(accum: Format) -> Any:
    """The dtype that holds sums of products: f32, or f64."""
    return jnp.float64 if accum.bits == 64 else jnp.float32


def _ring(group: int) -> float:
    return (group - 1) / group


def _bytes(dtype: Any) -> int:
    return jnp.dtype(dtype).itemsize


def _hlo(dtype: Any) -> str:
    """The HLO name of a dtype."""
    name = jnp.dtype(dtype).name
    return {"bfloat16": "bf16"}.get(name, name.replace("float", "f").replace("int", "s"))
