"""Scanned, unrolled, grouped or recomputed: the same numbers by another schedule."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmjax.model import apply, block_groups, param_sites, resolve_sites, stack, structure
from lmjax.precision import PolicyError, exact, parse_policy, paths
from lmjax.precision.backend import Backend, planned_for
from lmjax.runs.resolved import phase_of


def forward(config: Any, **options: Any) -> Any:
    return functools.partial(apply, config=config.model, sites=phase_of(config).sites, **options)


def groups(config: Any) -> list[tuple[int, int]]:
    return list(block_groups(config.model, phase_of(config).sites))


@pytest.mark.parametrize(
    ("policy", "expected"),
    [
        ("mixed_bf16", [(0, 5)]),
        ("mixed_bf16; blocks/0: c=f32", [(0, 1), (1, 5)]),
        ("mixed_bf16; blocks/-1: c=f32; blocks/0: c=f32", [(0, 1), (1, 4), (4, 5)]),
        ("mixed_bf16; blocks/2/attention/softmax: c=bf16", [(0, 2), (2, 3), (3, 5)]),
        ("mixed_bf16; blocks/[02]: c=f16", [(0, 1), (1, 2), (2, 3), (3, 5)]),
        ("mixed_bf16; blocks/*: c=f32", [(0, 5)]),
        ("f32; blocks/3: c=f32", [(0, 5)]),
    ],
)
def test_consecutive_blocks_of_equal_formats_are_one_group(policy, expected, tiny):
    assert groups(tiny(policy, model={"layers": 5})) == expected


def test_each_group_is_traced_once_in_its_own_formats(tiny, draw_params, draw_batch, equations):
    config = tiny("mixed_bf16; blocks/0: c=f32", model={"layers": 4})
    jaxpr = jax.make_jaxpr(forward(config))(draw_params(config), draw_batch(config)["inputs"])
    found = [
        (scan.params["length"], {d.invars[0].aval.dtype.name for d in dots})
        for scan in equations(jaxpr, "scan")
        if (dots := equations(scan.params["jaxpr"], "dot_general"))
    ]
    assert found == [(1, {"float32"}), (3, {"bfloat16"})]


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_scanned_unrolled_and_grouped_blocks_give_the_same_numbers(
    family, tiny, draw_params, draw_batch, compile_fast, monkeypatch
):
    config = tiny(family=family, model={"layers": 3})
    params, tokens = draw_params(config, std=0.2), draw_batch(config)["inputs"]
    scanned = compile_fast(forward(config))(params, tokens)
    unrolled = compile_fast(forward(tiny(family=family, model={"layers": 3, "unroll": 3})))
    np.testing.assert_allclose(unrolled(params, tokens), scanned, rtol=1e-5, atol=1e-5)
    monkeypatch.setattr(stack, "block_groups", lambda *_: iter([(0, 1), (1, 3)]))
    grouped = compile_fast(forward(config))(params, tokens)
    np.testing.assert_allclose(grouped, scanned, rtol=1e-5, atol=1e-5)
    swapped = jax.tree.map(lambda leaf: leaf[::-1], params["blocks"])
    other = compile_fast(forward(config))(params | {"blocks": swapped}, tokens)
    assert np.abs(other - scanned).max() > 1e-2, "the order of blocks matters"


@pytest.mark.parametrize("setting", ["p=bf16", "p=f32.sr", "mu=bf16", "nu=int8@block16"])
def test_blocks_stored_in_different_formats_are_refused(setting: str, tiny):
    with pytest.raises(PolicyError, match="give every block the same"):
        tiny(f"f32; blocks/0: {setting}")
    assert tiny(f"f32; blocks/*: {setting}")
    assert tiny("f32; blocks/0: w=e4m3,a=bf16@block4"), "how a block computes is its own affair"


def test_recomputation_changes_memory_and_not_gradients(
    tiny, draw_params, draw_batch, compile_fast
):
    stored, gradients = {}, {}
    for remat in ("none", "dots", "attention", "full"):
        config = tiny(model={"remat": remat})
        params, tokens = draw_params(config, std=0.2), draw_batch(config)["inputs"]
        loss = lambda p, config=config, tokens=tokens: jnp.sum(
            jnp.square(forward(config)(p, tokens))
        )
        residuals = jax.eval_shape(lambda p, loss=loss: jax.vjp(loss, p)[1], params)
        stored[remat] = sum(r.size * r.dtype.itemsize for r in jax.tree.leaves(residuals))
        gradients[remat] = compile_fast(jax.grad(loss))(params)
    assert stored["dots"] < 0.5 * stored["none"]
    assert stored["full"] < 0.6 * stored["dots"]
    assert stored["full"] < stored["attention"] < stored["dots"]
    for remat in ("dots", "attention", "full"):
        close = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-4)
        jax.tree.map(close, gradients[remat], gradients["none"])


@pytest.mark.parametrize("unroll", [1, 2, 3])
def test_recomputation_survives_unrolled_blocks(unroll: int, tiny, draw_params, draw_batch):
    """XLA would find what the backward pass computes again among what it has already."""
    taken = {}
    for remat in ("none", "full"):
        config = tiny(
            model={"remat": remat, "unroll": unroll, "layers": 3, "width": 64}, batch_size=32
        )
        params, tokens = draw_params(config), draw_batch(config)["inputs"]
        loss = lambda p, config=config, tokens=tokens: jnp.sum(
            jnp.square(forward(config)(p, tokens))
        )
        compiled = exact.jit(jax.grad(loss)).lower(params).compile()
        taken[remat] = compiled.memory_analysis().temp_size_in_bytes
    assert taken["full"] < 0.8 * taken["none"]


def test_accelerators_keep_barriers_between_unrolled_blocks_and_what_is_computed_again(
    tiny, draw_params, draw_batch, equations
):
    barriers = {}
    for unroll in (1, 2):
        config = tiny(model={"remat": "full", "unroll": unroll})
        params, tokens = draw_params(config), draw_batch(config)["inputs"]
        loss = lambda p, config=config, tokens=tokens: jnp.sum(forward(config)(p, tokens))
        with planned_for(Backend("gpu", (9, 0))):
            traced = jax.make_jaxpr(jax.grad(loss))(params)
        barriers[unroll] = any(
            equation.params["prevent_cse"] for equation in equations(traced, "remat2", "checkpoint")
        )
    assert barriers == {1: False, 2: True}


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_every_parameter_belongs_to_a_site_and_has_axes(family, tiny):
    config = tiny(family=family)
    _, shapes, axes = structure(config.model)
    sites = resolve_sites(config.model, parse_policy("f32"))
    owners = param_sites(config.model, sites)
    named = paths.flatten(jax.tree.map(lambda _, a: "/".join(a), shapes, axes))
    for path, shape in paths.flatten(shapes).items():
        assert owners[path] in sites.values()
        names = named[path].split("/")
        assert len(names) == shape.ndim
        assert (names[0] == "layers") == path.startswith("blocks/")
