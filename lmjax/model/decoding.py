"""The decoder with a memory: a text is read a few tokens at a time, each of them once.

`apply` computes the logits of all positions from all tokens; `extend` computes those of new
positions from new tokens and a cache of keys and values. The blocks are the same code. What differs
is the loop over them: each layer's parameters and cache are arrays of their own, and the loop is
unrolled. Reading parameters is most of the work of a single token, and a scan would copy each
layer's out of the stack before it reads them: three times the traffic, and measured two to five
times slower on CPU.

Where `kv` leaves keys and values in the compute format, the logits are those of `apply` up to the
order in which sums over positions and widths are taken, which depends on shapes. A quantizer whose
factors positions share (`x=...@tensor`) finds them in the tokens of one call and in the cache, in
which later positions are zero, instead of in the whole sequence.

Knows Flax, JAX and policies; no mesh, no data.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
from flax import nnx

from lmjax.model.attention import rotary_angles
from lmjax.model.cache import LayerCache
from lmjax.model.config import ModelConfig
from lmjax.model.decoder import Decoder, check_length
from lmjax.model.families import Params, assembled, layout
from lmjax.model.layout import BLOCKS
from lmjax.model.mask import Position, mask_and_positions
from lmjax.model.parametrisation import parametrisation_of
from lmjax.model.sites import Calibrated, Sites, in_evaluation, within
from lmjax.model.stack import block_groups, block_sites
from lmjax.precision import paths
from lmjax.precision.packed import Packed, is_stored, one_member
from lmjax.precision.policy import SitePolicy

Cache = tuple[LayerCache, ...]
"""Keys and values, one entry a layer: arrays only, to be donated to the call that extends them."""


def decoding_params(
    params: Params | Calibrated, *, config: ModelConfig, sites: Sites
) -> Params | Calibrated:
    """The parameters as `extend` reads them: layers apart, each cast to its compute format.

    The casts are those that `apply` makes in every call, so no value changes; made once, a token
    reads parameters in the compute format, often half of what is stored.

    Args:
      params: as `initial_params` gives them, or with the factors they are evaluated with.
      config: the model.
      sites: the formats of every site.

    Returns:
      The same tree, but for `blocks`, which is a tuple with one entry a layer.
    """
    if isinstance(params, Calibrated):
        own = decoding_params(params.params, config=config, sites=sites)
        return params._replace(params=own)
    readers = {path: [sites[path]] for path in layout(config).paths}
    stack = layout(config).stack
    if config.tied:
        readers["embed"].append(sites["head"])

    def narrowed(part: Params, prefix: str) -> Params:
        flat = paths.flatten(part, is_stored).items()
        site = lambda path: (prefix + path).rpartition("/")[0]
        return paths.unflatten({path: _narrowed(leaf, readers[site(path)]) for path, leaf in flat})

    def layer(index: int) -> Params:
        return one_member(params[BLOCKS], index)

    outside = {name: part for name, part in params.items() if name != BLOCKS}
    layers = tuple(narrowed(layer(i), f"{stack.member(i)}/") for i in range(stack.size))
    return narrowed(outside, "") | {BLOCKS: layers}


def initial_cache(config: ModelConfig, sites: Sites, batch: int, length: int) -> Cache:
    """The cache before the first token, for `batch` texts of at most `length` tokens.

    Raises:
      ValueError: the model has fewer positions.
    """
    check_length(config, length)
    shape = (batch, length, config.kv_head_count, config.head_size)
    return tuple(
        LayerCache.empty(shape, within(sites, f"{layout(config).stack.member(index)}/attention"))
        for index in range(config.layers)
    )


def extend(
    params: Params | Calibrated,
    tokens: jax.Array,
    cache: Cache,
    start: Position,
    *,
    config: ModelConfig,
    sites: Sites,
    document_starts: jax.Array | None = None,
) -> tuple[jax.Array, Cache]:
    """Reads more of a text.

    Args:
      params: as `decoding_params` gives them.
      tokens: `int32[B, T]`, T at least 1.
      cache: of the `start` tokens before; what it holds beyond them is not looked at.
      start: index of the first of these tokens, int32[], or int32[B] where it differs between
        rows; at most the length of the cache less T; being traced, it cannot be checked.
      config: the model.
      sites: the formats of every site.
      document_starts: for a document mask, the index of the first token of each of these tokens'
        document, counted as `start` is, `int32[B, T]`; None: all that is read is one document.

    Returns:
      The logits of the token after each, `[B, T, vocab_size]`, in the output format of `head`; and
      the cache of `start + T` tokens.
    """
    own, context = in_evaluation(params)
    first, *_ = own[BLOCKS]
    # The stack of blocks is built like one block: only the shapes of its parameters differ.
    model = assembled(own | {BLOCKS: first}, config)
    assert isinstance(model, Decoder), "a text is read by decoders only"
    graphdef, _ = nnx.split(model.blocks)
    mask, positions = mask_and_positions(start, tokens.shape[1], document_starts)
    x = model.embedded(tokens, positions, sites, context)
    inside, branches = context.at(BLOCKS), parametrisation_of(config).branches()
    layers = []
    for begin, end in block_groups(config, sites):
        group = block_sites(config, sites, begin, end)
        angles = None
        if config.positions == "rope":
            angles = rotary_angles(config, positions, group["attention/rope"])
        x = group["residual"].to_output(group["residual"].to_compute(x))
        for index in range(begin, end):
            block = nnx.merge(graphdef, own[BLOCKS][index])
            at, ratios = jax.tree.map(lambda leaf, i=index: leaf[i], (inside, branches))
            x, layer = block(x, group, angles, at, mask, ratios, cache=cache[index], start=start)
            assert layer is not None, "a block that was given a cache returns one"
            layers.append(layer)
    return model.logits(x, sites, context), tuple(layers)


def _narrowed(param: jax.Array | Packed, readers: Sequence[SitePolicy]) -> jax.Array | Packed:
    """A parameter in the compute format of the sites that read it, if it takes no more room there.

    Where they compute in different formats, it stays as it is, and so does one that is packed.
    """
    if isinstance(param, Packed) or len({site.compute for site in readers}) > 1:
        return param
    cast = readers[0].to_compute(param)
    return cast if cast.dtype.itemsize <= param.dtype.itemsize else param
