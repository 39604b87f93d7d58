"""Which sites a model has, and where: the one place that says so.

Families with the same blocks share `stack_of` and `block_places`.

Knows the config and how sites are declared.
"""

from __future__ import annotations

import functools

from lmjax.model.config import ModelConfig
from lmjax.precision.sites import Layout, Place, Source, Stack, site_at

BLOCKS = "blocks"
RESIDUAL = f"{BLOCKS}/residual"


def stack_of(config: ModelConfig) -> Stack:
    """The blocks of a model."""
    return Stack(BLOCKS, config.layers)


def block_places(config: ModelConfig) -> list[Place]:
    """The sites inside the blocks, in the order of computation."""
    stack = stack_of(config)
    return [Place(path, site_at(path), stack, source) for path, source in _inside(config)]


@functools.cache
def decoder_layout(config: ModelConfig) -> Layout:
    """The sites of a decoder, in the order of computation."""
    outside = lambda path, source=None: Place(path, site_at(path), None, source)
    before = [outside("embed", Source("embed", "params"))]
    if config.positions == "learned":
        before.append(outside("positions", Source("positions", "params")))
    after = [
        outside("norm", Source(RESIDUAL)),
        outside("head"),
        outside("loss", Source("head")),
    ]
    return Layout((*before, *block_places(config), *after), stack_of(config))


@functools.cache
def encoder_layout(config: ModelConfig) -> Layout:
    """The sites of an encoder, in the order of computation."""
    outside = lambda path, source=None: Place(path, site_at(path), None, source)
    tables = ["embed"]
    tables += ["positions"] if config.positions == "learned" else []
    tables += ["types"] if config.token_types else []
    before = [outside(table, Source(table, "params")) for table in tables]
    part = "pool" if config.pooled else "transform"
    after = [outside(f"{part}/dense"), outside(f"{part}/activation", Source(f"{part}/dense"))]
    if not config.pooled:
        after.append(outside("transform/norm", Source("transform/activation")))
    if not config.headless:
        after += [outside("head"), outside("loss", Source("head"))]
    places = (*before, outside("norm", Source("embed")), *block_places(config), *after)
    return Layout(places, stack_of(config))


def is_of_objective(config: ModelConfig, path: str) -> bool:
    """Whether a parameter belongs to what an encoder is trained for, and may be new in another."""
    return config.family == "encoder" and path.startswith(("transform/", "pool/", "head/"))


def _inside(config: ModelConfig) -> list[tuple[str, Source | None]]:
    """The sites inside a block, and where those that are no products read."""
    names = ["residual", "attention/norm", "attention/query", "attention/key", "attention/value"]
    names += ["attention/query_norm", "attention/key_norm"] if config.qk_norm else []
    names += ["attention/rope"] if config.positions == "rope" else []
    names += [f"attention/{name}" for name in ("scores", "softmax", "combine", "out")]
    names += ["mlp/norm", "mlp/up", *(["mlp/gate"] if config.activation == "swiglu" else [])]
    names += ["mlp/activation", "mlp/down"]
    stream = Source(RESIDUAL, "compute")
    rotated = "query_norm" if config.qk_norm else "query"
    sources = {
        "residual": Source(RESIDUAL),
        "attention/norm": stream,
        "attention/query_norm": Source(f"{BLOCKS}/attention/query"),
        "attention/key_norm": Source(f"{BLOCKS}/attention/key"),
        "attention/rope": Source(f"{BLOCKS}/attention/{rotated}"),
        "attention/softmax": Source(f"{BLOCKS}/attention/scores"),
        "mlp/norm": stream,
        "mlp/activation": Source(f"{BLOCKS}/mlp/up"),
    }
    return [(f"{BLOCKS}/{name}", sources.get(name)) for name in names]
