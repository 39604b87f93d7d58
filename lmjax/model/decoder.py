"""The decoder: embedding, scanned blocks, final norm, head.

`structure` builds the module once to learn the names and shapes of its parameters; from there on
parameters are a plain nested dict of arrays and `apply` is a pure function of them. The blocks'
parameters are stacked along a leading axis, and consecutive blocks whose sites have the same
formats are scanned together: depth costs no compile time, whatever the policy.

Knows Flax, JAX and policies; no mesh, no optimizer, no data.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from lmjax.model import unit_scaling
from lmjax.model.config import ModelConfig
from lmjax.model.layers import (
    Block,
    Constrain,
    Dense,
    Embedding,
    Norm,
    dropout,
    rotary_angles,
)
from lmjax.model.layout import BLOCKS, layout
from lmjax.model.mask import Mask, mask_and_positions
from lmjax.model.sites import QUIET, Context, Sites, within
from lmjax.precision import paths
from lmjax.precision.broadcast import add_to_rows
from lmjax.precision.matmul import einsum, hand_on
from lmjax.precision.policy import Policy, PolicyError, SitePolicy
from lmjax.precision.probes import rescale_cotangent
from lmjax.precision.sites import Layout, Place

Params = dict[str, Any]
"""Nested dict of arrays; those below `blocks` have a leading axis of length `layers`."""


class Decoder(nnx.Module):
    """A decoder-only Transformer's parameters, by name."""

    def __init__(self, key: jax.Array, config: ModelConfig):
        c = config
        embed_key, position_key, block_key, head_key = jax.random.split(key, 4)
        table = functools.partial(Embedding, width=c.width, std=c.weight_std, unit=c.unit)
        self.embed = table(embed_key, c.vocab_size, axes=("vocab", "embed"))
        self.positions = (
            table(position_key, c.max_positions, axes=("positions", "embed"))
            if c.positions == "learned"
            else None
        )
        self.blocks = _stacked(lambda k: Block(k, c), jax.random.split(block_key, c.layers))
        self.norm = Norm(c.width, c)
        self.head = (
            None
            if c.tied
            else Dense(
                head_key,
                c.width,
                c.vocab_size,
                axes=("embed", "vocab"),
                std=c.weight_std,
                bias=False,
                unit=c.unit,
            )
        )


def apply(
    params: Params,
    tokens: jax.Array,
    *,
    config: ModelConfig,
    sites: Sites,
    context: Context = QUIET,
    cotangent_scales: jax.Array | None = None,
    constrain: Constrain = lambda x, axes: x,
    document_starts: jax.Array | None = None,
) -> jax.Array:
    """The logits of every next token.

    Args:
      params: as `initial_params` gives them.
      tokens: `int32[B, T]`, T at most `config.max_positions` for learned positions.
      config: the model.
      sites: the formats of every site, from `resolve_sites`.
      context: random key of dropout and stochastic rounding, and probes, laid out by `site_tree`;
        by default, as in evaluation, nothing is random and nothing is measured.
      cotangent_scales: f32[layers + 1], powers of two: by what the cotangents inside each block are
        multiplied, and last those outside of the blocks, which the logits' cotangent already is.
      constrain: places an activation, given the logical names of its axes.
      document_starts: for a document mask, the index in its row of the first token of each token's
        document, `int32[B, T]`: tokens attend within their document, whose positions count from 0.
        None: each row is one document.

    Returns:
      `[B, T, vocab_size]`, in the output format of the site `head`.
    """
    check_length(config, tokens.shape[1])
    model = nnx.merge(structure(config)[0], params)
    mask, positions = mask_and_positions(0, tokens.shape[1], document_starts)
    x = embedded(model, tokens, positions, sites, context, constrain)
    x = constrain(x, ("batch", "length", "width"))
    with sites["embed"].scope:
        x = dropout(x, config.dropout, context.at("dropout").key)
    x = _scan_blocks(
        model.blocks,
        x,
        config,
        sites,
        context.at("blocks"),
        mask,
        positions,
        cotangent_scales,
        constrain,
    )
    return logits_of(model, x, sites, context)


def check_length(config: ModelConfig, length: int) -> None:
    """Refuses more tokens than the model has positions.

    Raises:
      ValueError: positions are learned, and there are fewer.
    """
    if config.positions == "learned" and length > config.max_positions:
        raise ValueError(f"{length} tokens, but the model has {config.max_positions} positions")


def embedded(
    model: Decoder,
    tokens: jax.Array,
    positions: jax.Array,
    sites: Sites,
    context: Context,
    constrain: Constrain = lambda x, axes: x,
) -> jax.Array:
    """What enters the first block, `[B, T, D]`.

    Args:
      model: the parameters.
      tokens: `int32[B, T]`.
      positions: of each, `int32[T]`, or `int32[B, T]` where they differ between rows.
      sites: the formats of every site.
      context: randomness and probes.
      constrain: that of `apply`.
    """
    # Where a mesh cuts the table, tokens travel to its columns and rows travel back, in the compute
    # format. Left to itself, XLA gathers the whole table on some meshes.
    tokens = constrain(tokens, ("replicas", "length"))
    x = model.embed(tokens, sites["embed"], context.at("embed"))
    x = constrain(x, ("replicas", "length", "columns"))
    if model.positions is None:
        return x
    by_row = positions.ndim > 1
    if by_row:
        positions = constrain(positions, ("replicas", "length"))
    rows = model.positions(positions, sites["positions"], context.at("positions"))
    if by_row:
        rows = constrain(rows, ("replicas", "length", "columns"))
    with sites["embed"].scope:
        rows = sites["embed"].to_output(rows)
        if model.embed.unit:
            return unit_scaling.sum_of_embeddings(x, rows)
        return add_to_rows(x, rows)


def logits_of(model: Decoder, x: jax.Array, sites: Sites, context: Context) -> jax.Array:
    """The logits `[B, T, V]` of what left the last block, `[B, T, D]`."""
    x = model.norm(x, sites["norm"], context.at("norm"))
    site, head = sites["head"], context.at("head")
    if model.head is not None:
        return model.head(x, site, head)
    table, unit = model.embed.table[...], model.embed.unit
    y = einsum("btd,vd->btv", x, table, site, key=head.key, probe=head.probe, unit=unit)
    return hand_on(y, site, head.probe)


def _scan_blocks(
    blocks: Block,
    x: jax.Array,
    config: ModelConfig,
    sites: Sites,
    context: Context,
    mask: Mask,
    positions: jax.Array,
    cotangent_scales: jax.Array | None,
    constrain: Constrain,
) -> jax.Array:
    graphdef, stacked = nnx.split(blocks)
    keys = None if context.key is None else jax.random.split(context.key, config.layers)
    ratios = None
    if cotangent_scales is not None:
        # Going back, a cotangent leaves the block above (or the head) and enters this one.
        ratios = cotangent_scales[:-1] / cotangent_scales[1:]
        x = rescale_cotangent(x, cotangent_scales[-1] / cotangent_scales[0])
    weights = unit_scaling.branch_weights(config) if config.unit else None
    for first, last in block_groups(config, sites):
        group = block_sites(config, sites, first, last)
        angles = None
        if config.positions == "rope":
            angles = rotary_angles(config, positions, group["attention/rope"])

        def body(x: jax.Array, layer: Any, group: Sites = group, angles: Any = angles) -> Any:
            layer_params, *inside, ratio, weights = layer
            x = constrain(x, ("batch", "length", "width"))
            block = nnx.merge(graphdef, layer_params)
            x, _ = block(x, group, angles, Context(*inside), mask, weights)
            return x if ratio is None else rescale_cotangent(x, ratio), None

        with group["residual"].scope:
            x = group["residual"].to_output(group["residual"].to_compute(x))
        everything = (stacked, keys, context.factors, context.slots, ratios, weights)
        layers = jax.tree.map(lambda leaf, f=first, s=last: leaf[f:s], everything)
        x, _ = jax.lax.scan(_rematerialised(body, config), x, layers, unroll=config.unroll)
    return constrain(x, ("batch", "length", "width"))


def _rematerialised(body: Callable[..., Any], config: ModelConfig) -> Callable[..., Any]:
    if config.remat == "none":
        return body
    saved = {
        "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
        "full": jax.checkpoint_policies.nothing_saveable,
    }
    return jax.checkpoint(body, policy=saved[config.remat], prevent_cse=False)


def block_groups(config: ModelConfig, sites: Sites) -> Iterator[tuple[int, int]]:
    """Runs `(first, last + 1)` of consecutive blocks whose sites have the same formats."""
    stack = layout(config).stack
    formats = [within(sites, stack.member(index)) for index in range(stack.size)]
    first = 0
    for _, run in itertools.groupby(formats):
        size = len(list(run))
        yield first, first + size
        first += size


def block_sites(config: ModelConfig, sites: Sites, first: int, last: int) -> dict[str, SitePolicy]:
    """The sites, by their path in a block, of blocks `first` to `last - 1`, which are all alike."""
    stack = layout(config).stack
    called = str(first) if last == first + 1 else f"{first}-{last - 1}"
    return within(sites, stack.member(first), stack.member(called))


def site_tree(layout: Layout, make: Callable[[Place], Any]) -> dict[str, Any]:
    """Something for every site, laid out as the parts of a `Context` are.

    Args:
      layout: the sites of the model.
      make: from a place to a pytree of arrays, or None for places that get nothing. What a place
        inside blocks gets is stacked for all blocks.
    """
    tree = {}
    for place in layout.places:
        made = make(place)
        if made is not None:
            size = 0 if place.stack is None else place.stack.size
            stack = lambda leaf, n=size: jnp.stack([leaf] * n) if n else leaf
            tree[place.path] = jax.tree.map(stack, made)
    return paths.unflatten(tree)


def resolve_sites(config: ModelConfig, policy: Policy) -> dict[str, SitePolicy]:
    """The formats of every site of a model under a policy.

    Raises:
      PolicyError: a rule matches no site, or stores the parameters of some blocks unlike others'.
    """
    sites = policy.resolve_all(layout(config).paths, depth=config.layers)
    for place in layout(config).places:
        stored = {(s.params, s.update, s.mu, s.nu) for s in (sites[path] for path in place.paths)}
        if len(stored) > 1:
            raise PolicyError(
                f"the parameters of all blocks are stored in one array, but p, mu or nu of {place} "
                "differs between blocks; give every block the same",
                text=policy.text or str(policy),
            )
    return sites


@functools.cache
def structure(config: ModelConfig) -> tuple[Any, Params, Params]:
    """What the model's parameters are, without computing any.

    Returns:
      Flax's graph definition; the parameters as `jax.ShapeDtypeStruct`s (f32); the logical axis
      names of each, as a tree of tuples, `layers` first for the stacked blocks.
    """
    abstract = nnx.eval_shape(lambda: Decoder(jax.random.key(0), config))
    graphdef, state = nnx.split(abstract)
    axes = {
        "/".join(map(str, keys)): (("layers",) if keys[0] == BLOCKS else ())
        + param.get_metadata()["axes"]
        for keys, param in nnx.to_flat_state(state)
    }
    return graphdef, nnx.to_pure_dict(state), paths.unflatten(axes)


def initial_params(key: jax.Array, config: ModelConfig, sites: Sites) -> Params:
    """Fresh parameters, drawn in f32 and stored in the format that each site's policy names."""
    params = nnx.to_pure_dict(nnx.split(Decoder(key, config))[1])
    stored = param_sites(config, sites)
    store = lambda keys, leaf: stored[paths.path_string(keys)].to_params(leaf)
    return jax.tree_util.tree_map_with_path(store, params)


def param_sites(config: ModelConfig, sites: Sites) -> dict[str, SitePolicy]:
    """The formats of every parameter's site, by the parameter's path; of blocks the first one's.

    What decides how parameters are stored and updated is the same in all blocks; see
    `resolve_sites`.
    """
    parameters = paths.flatten(structure(config)[1])
    return {path: sites[layout(config).place_of_parameter(path).paths[0]] for path in parameters}


def parameter_count(config: ModelConfig) -> int:
    """Number of values in all parameters; a tied head counts once."""
    return sum(leaf.size for leaf in jax.tree.leaves(structure(config)[1]))


def learning_rate_factors(config: ModelConfig) -> dict[str, float]:
    """By what the learning rate of each parameter is multiplied, by its path; nothing at 1."""
    if not config.unit:
        return {}
    shapes = {path: leaf.shape for path, leaf in paths.flatten(structure(config)[1]).items()}
    return {p: unit_scaling.learning_rate_factor(p, shape, config) for p, shape in shapes.items()}


def _stacked(make: Callable[[jax.Array], Block], keys: jax.Array) -> Block:
    """As many modules as there are keys, their parameters stacked along a new leading axis."""
    graphdef, _ = nnx.split(nnx.eval_shape(lambda: make(keys[0])))
    return nnx.merge(graphdef, jax.vmap(lambda key: nnx.split(make(key))[1])(keys))
