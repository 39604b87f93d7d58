"""The stack of blocks: scanned, in groups of equal formats, recomputed as the config says.

The blocks' parameters are stacked along a leading axis, and consecutive blocks whose sites have the
same formats are scanned together: depth costs no compile time, whatever the policy.

Knows Flax, JAX, backends and policies; no mesh, no optimizer, no data.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import jax
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from lmjax.model.attention import rotary_angles
from lmjax.model.block import Block
from lmjax.model.blockwise import SAVED
from lmjax.model.config import ModelConfig
from lmjax.model.layers import Constrain
from lmjax.model.layout import stack_of
from lmjax.model.mask import Mask
from lmjax.model.parametrisation import parametrisation_of
from lmjax.model.sites import Context, Sites, within
from lmjax.precision.backend import this_backend
from lmjax.precision.packed import members
from lmjax.precision.policy import SitePolicy
from lmjax.precision.probes import rescale_cotangent

_STREAM = "stream"
"""The name of what enters a block, for rematerialisation."""


def stacked(make: Callable[[jax.Array], Block], keys: jax.Array) -> Block:
    """As many blocks as there are keys, their parameters stacked along a new leading axis."""
    graphdef, _ = nnx.split(nnx.eval_shape(lambda: make(keys[0])))
    return nnx.merge(graphdef, jax.vmap(lambda key: nnx.split(make(key))[1])(keys))


def scan_blocks(
    blocks: Block,
    x: jax.Array,
    *,
    config: ModelConfig,
    sites: Sites,
    context: Context,
    mask: Mask,
    positions: jax.Array,
    cotangent_scales: jax.Array | None,
    constrain: Constrain,
) -> jax.Array:
    """What leaves the last block, `[B, T, D]`, of what enters the first.

    Args:
      blocks: from `stacked`.
      x: `[B, T, D]`.
      config: the model.
      sites: the formats of every site.
      context: randomness and probes of the blocks.
      mask: which keys each token attends to.
      positions: of the tokens, for rotary embeddings: `int32[T]` or `int32[B, T]`.
      cotangent_scales: f32[layers + 1], powers of two: by what the cotangents inside each block are
        multiplied, and last those outside of the blocks; None: by nothing.
      constrain: places an activation, given the logical names of its axes.
    """
    graphdef, params = nnx.split(blocks)
    keys = None if context.key is None else jax.random.split(context.key, config.layers)
    ratios = None
    if cotangent_scales is not None:
        # Going back, a cotangent leaves the block above (or the head) and enters this one.
        ratios = cotangent_scales[:-1] / cotangent_scales[1:]
        x = rescale_cotangent(x, cotangent_scales[-1] / cotangent_scales[0])
    branches = parametrisation_of(config).branches()
    for first, last in block_groups(config, sites):
        group = block_sites(config, sites, first, last)
        angles = None
        if config.positions == "rope":
            angles = rotary_angles(config, positions, group["attention/rope"])

        def body(x: jax.Array, layer: Any, group: Sites = group, angles: Any = angles) -> Any:
            layer_params, *inside, ratio, branches = layer
            x = constrain(x, ("batch", "length", "width"))
            if config.remat == "offload":
                x = checkpoint_name(x, _STREAM)
            block = nnx.merge(graphdef, layer_params)
            x, _ = block(x, group, angles, Context(*inside), mask, branches, constrain)
            return x if ratio is None else rescale_cotangent(x, ratio), None

        with group["residual"].scope:
            x = group["residual"].to_output(group["residual"].to_compute(x))
        everything = (params, keys, context.factors, context.slots, ratios, branches)
        layers = members(everything, first, last)
        unroll = _unrolled(config)
        body = _rematerialised(body, config, in_loop=unroll < last - first)
        x, _ = jax.lax.scan(body, x, layers, unroll=unroll)
    return constrain(x, ("batch", "length", "width"))


def _unrolled(config: ModelConfig) -> int:
    """How many blocks a turn of the loop computes.

    One on CPUs with recomputation, which XLA would otherwise undo: its CPU pipeline removes the
    barriers that tell a value from the same value computed again.
    """
    undone = config.remat != "none" and this_backend().platform == "cpu"
    return 1 if undone else config.unroll


def _rematerialised(
    body: Callable[..., Any], config: ModelConfig, *, in_loop: bool
) -> Callable[..., Any]:
    """The body with recomputation; both passes being loops, XLA finds no common subexpressions."""
    if config.remat == "none":
        return body
    policies = jax.checkpoint_policies
    saved = {
        "dots": policies.dots_with_no_batch_dims_saveable,
        "attention": policies.save_only_these_names(SAVED),
        "full": policies.nothing_saveable,
        "offload": policies.save_and_offload_only_these_names(
            names_which_can_be_saved=[],
            names_which_can_be_offloaded=[_STREAM],
            offload_src="device",
            offload_dst="pinned_host",
        ),
    }
    return jax.checkpoint(body, policy=saved[config.remat], prevent_cse=not in_loop)


def block_groups(config: ModelConfig, sites: Sites) -> Iterator[tuple[int, int]]:
    """Runs `(first, last + 1)` of consecutive blocks whose sites have the same formats."""
    stack = stack_of(config)
    formats = [within(sites, stack.member(index)) for index in range(stack.size)]
    first = 0
    for _, run in itertools.groupby(formats):
        size = len(list(run))
        yield first, first + size
        first += size


def block_sites(config: ModelConfig, sites: Sites, first: int, last: int) -> dict[str, SitePolicy]:
    """The sites, by their path in a block, of blocks `first` to `last - 1`, which are all alike."""
    stack = stack_of(config)
    called = str(first) if last == first + 1 else f"{first}-{last - 1}"
    return within(sites, stack.member(first), stack.member(called))
