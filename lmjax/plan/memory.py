"""Estimates the peak memory of a step on one device, as a sum of parts.

With rematerialised blocks, a language model peaks between the forward and backward pass: every
block's saved values are live, and so are the logits of a chunk of rows, twice in f32. With c bytes
in the compute format, N tokens of a micro-batch on this device, n of them in a chunk
(`lmjax/model/head.py`), V/t columns of logits, and P values of parameters on it:

    parameters, optimizer     as the state stores them
    gradients                 2 P 4: their sum over micro-batches and the current one
    saved activations         L N D c, one residual stream per block (Korthikanti et al. 2022,
                              section 5, "full recomputation"); without rematerialisation, the
                              inputs and outputs of a block's products and, where they exist as
                              a whole, its attention weights
    head                      2 n V/t 4; the gradient of the whole head and that of a chunk, which
                              is added to it; and the gathered weights, V/t D c
    attention                 3 B heads/t T^2 4 + B heads/t T^2 c if that exceeds the head: scores,
                              weights and their cotangents of one block, for B rows of the batch
                              and T tokens of a row that attention takes at once: 512 where it
                              runs in blocks, else the whole context
    rows                      3 N D 4: around the last norm
    fixed order               with `deterministic_reductions`, of all P values: the gradients of the
                              parts on this device, one or two sums, the sum over micro-batches
                              before and after one, and, if fsdp shards them, parameters

XLA's CPU compiler, whose figure is reported alongside, holds saved activations of narrow formats in
f32 once the backward pass begins, and a transposed copy of the head; other backends need neither.

Knows configs, the train state and meshes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import jax

from lmjax.model import ModelConfig
from lmjax.model.attention_form import WHOLE
from lmjax.model.head import rows_at_once
from lmjax.model.sheet import BLOCK
from lmjax.parallel import sharding
from lmjax.plan.arithmetic import tokens_on_device
from lmjax.precision.policy import carrier
from lmjax.train import Config, Phase, abstract_state

CPU_ONLY = "widened on CPU"
"""The part that only XLA's CPU compiler needs."""


def expected_memory(phase: Phase, devices: int) -> dict[str, float]:
    """Returns the bytes on one device, by part.

    Args:
      phase: the phase of a run.
      devices: number of devices in its mesh.
    """
    config = phase.config
    mesh = sharding.abstract_mesh(config.mesh, devices)
    sizes = dict(mesh.shape)
    state = abstract_state(phase, mesh)
    parameters = _on_device(state.params)
    values = sum(math.prod(_shard(leaf)) for leaf in jax.tree.leaves(state.params))
    tokens, width = tokens_on_device(config, sizes), config.model.width
    compute = _bytes(phase, "residual")
    saved = config.model.layers * tokens * _saved_values(phase, sizes) * compute
    head = _head_weights(config.model, sizes) * _bytes(phase, "head")
    return {
        "parameters": parameters,
        "optimizer": _on_device((state.opt_state, state.residuals, state.scaling)),
        "gradients": 2.0 * values * 4,
        "saved activations": saved,
        "head or attention": head + max(_head(phase, sizes), _attention(phase, sizes)),
        "rows": 3.0 * tokens * width * 4,
        "fixed order": _fixed_order(config, sizes, state.params),
        CPU_ONLY: (
            saved * (4 / compute - 1) if config.model.remat in ("full", "attention") else 0.0
        )
        + head,
    }


def _fixed_order(config: Config, mesh: Mapping[str, int], params: object) -> float:
    """Additional bytes for `deterministic_reductions`."""
    if not config.reductions.in_order:
        return 0.0
    leaves = jax.tree.leaves(params)
    held = config.reductions.parts // math.prod(mesh[axis] for axis in sharding.RULES["batch"])
    gathered = sum(leaf.size * leaf.dtype.itemsize for leaf in leaves) if mesh["fsdp"] > 1 else 0
    sums = 2 if held > 1 else 1
    return float((held + sums + 2) * sum(leaf.size for leaf in leaves) * 4 + gathered)


def _on_device(tree: object) -> float:
    return float(
        sum(math.prod(_shard(leaf)) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))
    )


def _shard(leaf: jax.ShapeDtypeStruct) -> tuple[int, ...]:
    assert leaf.sharding is not None
    return leaf.sharding.shard_shape(leaf.shape)


def _saved_values(phase: Phase, mesh: Mapping[str, int]) -> float:
    """Number of values that one block saves per token."""
    config = phase.config
    model, cut = config.model, mesh["tensor"]
    if model.remat == "offload":
        return 0.0
    if model.remat in ("full", "attention"):  # what attention read is kept in f32
        read = model.heads * model.head_size / cut * 4 / _bytes(phase, "residual")
        return model.width + (read if model.remat == "attention" else 0.0)
    inside = (model.heads + 2 * model.kv_head_count) * model.head_size
    hidden = (3 if model.activation == "swiglu" else 2) * model.mlp_size
    products = 3 * model.width + (inside + hidden) / cut
    if model.remat == "dots":
        return products
    weights = model.heads * config.context / cut if _whole(phase) else 0.0
    return products + 2 * model.width + model.heads * model.head_size / cut + 3 * weights


def _head(phase: Phase, mesh: Mapping[str, int]) -> float:
    config = phase.config
    tokens = tokens_on_device(config, mesh)
    rows = rows_at_once()
    logits = min(tokens, rows) * _columns(config.model, mesh)
    gradients = (2 if tokens > rows else 1) * _head_weights(config.model, mesh) * 4
    return 2 * logits * 4 + gradients


def _attention(phase: Phase, mesh: Mapping[str, int]) -> float:
    config = phase.config
    heads = config.model.heads / mesh["tensor"]
    block = config.context if _whole(phase) else min(config.context, BLOCK)
    scores = tokens_on_device(config, mesh) / config.context * block * heads * block
    return scores * (3 * 4 + _bytes(phase, "combine"))


def _head_weights(model: ModelConfig, mesh: Mapping[str, int]) -> float:
    return _columns(model, mesh) * model.width


def _columns(model: ModelConfig, mesh: Mapping[str, int]) -> float:
    divisible = model.vocab_size % mesh["tensor"] == 0
    return model.vocab_size / mesh["tensor"] if divisible else model.vocab_size


def _bytes(phase: Phase, name: str) -> int:
    """Bytes of an element of the compute format of the first site of this name."""
    path = phase.layout.named(name)[0].paths[0]
    return jax.numpy.dtype(carrier(phase.sites[path].compute)).itemsize


def _whole(phase: Phase) -> bool:
    """Whether an attention of the model has all its scores at once."""
    return any(form.name == WHOLE for form in phase.attention_forms().values())
