"""Every family of models by name, and what is derived of any of them.

`structure` builds the module of a model once to learn the names and shapes of its parameters; from
there on parameters are a plain nested dict of arrays and `apply` is a pure function of them.

Knows Flax, JAX and policies; no mesh, no optimizer, no data.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from typing import Any, Final, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from lmjax.model.assembly import Assembly, Objective
from lmjax.model.attention_form import Form, Situation, form_of
from lmjax.model.config import ModelConfig
from lmjax.model.decoder import Decoder
from lmjax.model.encoder import Encoder
from lmjax.model.layers import ANYWHERE, Constrain
from lmjax.model.layout import BLOCKS
from lmjax.model.parametrisation import parametrisation_of
from lmjax.model.sites import QUIET, Context, Sites, within
from lmjax.precision import paths
from lmjax.precision.backend import Backend
from lmjax.precision.native import Sums
from lmjax.precision.packed import Packed, Pieces, is_stored, pack
from lmjax.precision.policy import Policy, PolicyError, SitePolicy
from lmjax.precision.sites import Kind, Layout, Place

Params = dict[str, Any]
"""Nested dict of arrays; those below `blocks` have a leading axis of length `layers`."""

FAMILIES: Final[dict[str, type[Assembly]]] = {"decoder": Decoder, "encoder": Encoder}
"""How models are put together, by `ModelConfig.family`."""


def layout(config: ModelConfig) -> Layout:
    """The sites of a model, in the order of computation."""
    return FAMILIES[config.family].layout(config)


def objective_of(config: ModelConfig) -> Objective:
    """What a model is trained for, and evaluated by."""
    return FAMILIES[config.family].objective(config)


def assembled(params: Params, config: ModelConfig) -> Assembly:
    """The model with these parameters."""
    return nnx.merge(structure(config)[0], params)


def apply(
    params: Params,
    tokens: jax.Array,
    *,
    config: ModelConfig,
    sites: Sites,
    context: Context = QUIET,
    cotangent_scales: jax.Array | None = None,
    constrain: Constrain = ANYWHERE,
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
    batch = {"inputs": tokens}
    if document_starts is not None:
        batch["document_starts"] = document_starts
    model = assembled(params, config)
    x = model.trunk(
        batch,
        sites=sites,
        context=context,
        cotangent_scales=cotangent_scales,
        constrain=constrain,
    )
    return model.logits(x, sites, context)


def attention_forms(
    config: ModelConfig,
    sites: Sites,
    backend: Backend,
    context: int,
    *,
    documents: bool,
    parts: int = 1,
) -> dict[str, Form]:
    """How each attention of a model is computed in training, by the path of its softmax.

    Args:
      config: the model.
      sites: the formats of every site.
      backend: what its devices are.
      context: number of tokens in a row.
      documents: whether tokens attend within their document.
      parts: into how many parts devices divide a row.
    """
    situation = Situation(
        backend,
        FAMILIES[config.family].mask(documents=documents),
        context,
        context,
        config.head_size,
        parts=parts,
        unit=parametrisation_of(config).unit_products,
        dropout=config.dropout > 0,
    )
    paths = (path for place in layout(config).named("softmax") for path in place.paths)
    return {path: form_of(within(sites, path.rpartition("/")[0]), situation) for path in paths}


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
    abstract = nnx.eval_shape(lambda: FAMILIES[config.family](jax.random.key(0), config))
    graphdef, state = nnx.split(abstract)
    axes = {
        "/".join(map(str, keys)): (("layers",) if keys[0] == BLOCKS else ())
        + param.get_metadata()["axes"]
        for keys, param in nnx.to_flat_state(state)
    }
    return graphdef, nnx.to_pure_dict(state), paths.unflatten(axes)


def block_matrices(config: ModelConfig) -> dict[str, int]:
    """The matrices of the blocks by path, and the number of inputs of each."""
    parameters = paths.flatten(structure(config)[1])
    inside = {path: leaf for path, leaf in parameters.items() if layout(config).stack.holds(path)}
    return {path: leaf.shape[-2] for path, leaf in inside.items() if leaf.ndim == 3}


class Weight(NamedTuple):
    """A parameter that products multiply by.

    Attributes:
      readers: the site that does so in each member of its stack; one, where there is no stack.
      axis: what the product sums over, counted from the last.
    """

    readers: tuple[SitePolicy, ...]
    axis: int


def weights(config: ModelConfig, sites: Sites) -> dict[str, Weight]:
    """The weights of products among the parameters, by path.

    A table that is read by a product too, as with a tied head, is one of its weights.
    """
    found = {}
    for path, leaf in paths.flatten(structure(config)[1]).items():
        place = layout(config).place_of_parameter(path)
        is_matrix = leaf.ndim - (place.stack is not None) == 2
        if is_matrix and place.site.is_product:
            found[path] = Weight(tuple(sites[p] for p in place.paths), -2)
        elif is_matrix and config.tied_head and place.path == "embed":
            found[path] = Weight((sites["head"],), -1)
    return found


Store = Callable[[tuple[SitePolicy, ...], jax.Array, int], Packed]
"""From n sites whose formats are the same, their weights `[n, ., .]` and the axis that products sum
over to how they are stored, with the same leading axis."""


def stored_to_nearest(sites: tuple[SitePolicy, ...], x: jax.Array, axis: int) -> Packed:
    """Weights rounded from what products would read of them: in the compute format."""
    site, *_ = sites
    assert site.stores is not None
    inputs = jnp.ones((), jnp.float32) if site.activations and site.activations.kept else None
    one = functools.partial(pack, quantizer=site.stores, axis=axis, inputs=inputs)
    return jax.vmap(one)(site.to_compute(x))


def stored_weights(
    params: Params, config: ModelConfig, sites: Sites, store: Store = stored_to_nearest
) -> Params:
    """Parameters with the weights that a policy stores as elements and factors in that form.

    Args:
      params: arrays, as `initial_params` gives them.
      config: the model.
      sites: the formats of every site.
      store: how one is made of the other.
    """
    flat = paths.flatten(params)
    for path, weight in weights(config, sites).items():
        if not any(site.stores for site in weight.readers):
            continue
        x = flat[path]
        runs = _stored_runs(x if x.ndim == 3 else x[None], weight, store)
        if x.ndim == 2:
            runs = [jax.tree.map(lambda leaf: leaf[0], runs[0])]
        flat[path] = runs[0] if len(runs) == 1 else Pieces(tuple(runs))
    return paths.unflatten(flat)


def dense_weights(params: Params) -> Params:
    """Parameters with every weight as an array: the numbers that its elements stand for, in f32."""

    def dense(node: Any) -> Any:
        if isinstance(node, Pieces):
            return jnp.concatenate([jnp.asarray(dense(run), jnp.float32) for run in node.runs])
        return node.dense() if isinstance(node, Packed) else node

    return jax.tree.map(dense, params, is_leaf=is_stored)


def _stored_runs(x: jax.Array, weight: Weight, store: Store) -> list[Any]:
    """Runs of a stack that are stored alike, arrays where they stay arrays."""
    runs, first = [], 0
    for stored, run in itertools.groupby(weight.readers, lambda site: site.stored_as):
        alike = list(run)
        part = x[first : first + len(alike)]
        runs.append(store(tuple(alike), part, weight.axis) if stored else part)
        first += len(alike)
    return runs


def initial_params(key: jax.Array, config: ModelConfig, sites: Sites) -> Params:
    """Fresh parameters, drawn in f32 and stored in the format that each site's policy names."""
    params = nnx.to_pure_dict(nnx.split(FAMILIES[config.family](key, config))[1])
    stored = param_sites(config, sites)
    store = lambda keys, leaf: stored[paths.path_string(keys)].to_params(leaf)
    params = jax.tree_util.tree_map_with_path(store, params)
    return stored_weights(params, config, sites)


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


def product_sums(config: ModelConfig, rows: int, length: int) -> dict[str, Sums]:
    """What each product site sums over, forwards and backwards, by path.

    Args:
      config: the model.
      rows: of a micro-batch.
      length: positions of a row.
    """
    shapes, sums = paths.flatten(structure(config)[1]), {}
    groups = config.heads // config.kv_head_count
    for place in layout(config).places:
        if place.site.kind is Kind.ACTIVATION_PRODUCT:
            inside, over = (config.head_size,), (length,)
            scores = Sums(y=inside, dx=over, dw=(length, groups))
            found = scores if place.site.name == "scores" else Sums(over, inside, (groups, length))
        elif place.site.is_product:
            kernel = shapes.get(f"{place.path}/kernel")
            head = config.width, config.vocab_size
            inward, outward = head if kernel is None else kernel.shape[-2:]
            found = Sums((inward,), (outward,), (rows, length))
        else:
            continue
        sums.update(dict.fromkeys(place.paths, found))
    return sums


def learning_rate_factors(config: ModelConfig) -> dict[str, float]:
    """By what the learning rate of each parameter is multiplied, by its path; nothing at 1."""
    shapes = {path: leaf.shape for path, leaf in paths.flatten(structure(config)[1]).items()}
    return parametrisation_of(config).learning_rate_factors(shapes)
