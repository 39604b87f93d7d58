"""The gradients of GPUs: those of autodiff, from less that is kept."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmjax.model import loss, normalisation, recompute
from lmjax.model.block import ACTIVATIONS
from lmjax.precision import parse_policy
from lmjax.precision.backend import Backend

NORM = parse_policy("mixed_bf16").resolve("blocks/0/mlp/norm")


@pytest.fixture
def pretend(monkeypatch: pytest.MonkeyPatch) -> Any:
    """`pretend(platform)`: this code is traced for the platform from now on."""

    def to_be(platform: str) -> None:
        for module in (loss, normalisation, recompute):
            monkeypatch.setattr(module, "this_backend", lambda: Backend(platform, (9, 0)))

    return to_be


def drawn(*shape: int, dtype: Any = jnp.bfloat16, seed: int = 0) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


def kept(pull: Any) -> list[tuple[tuple[int, ...], str]]:
    """Shapes and dtypes of large arrays that a gradient keeps, the same one once."""
    leaves = {id(leaf): leaf for leaf in jax.tree.leaves(pull) if leaf.size > 16}
    return sorted((leaf.shape, leaf.dtype.name) for leaf in leaves.values())


@pytest.mark.parametrize("layer", [True, False], ids=["layer", "rms"])
@pytest.mark.parametrize("values", ["ordinary", "huge", "equal"])
def test_the_gradient_of_a_norm_is_that_of_autodiff_and_keeps_rows_as_they_came(
    layer: bool, values: str, pretend: Any
):
    x = drawn(4, 8, 32) + 3
    x = {"ordinary": x, "huge": x * 2.0**100, "equal": x.at[1].set(2.0)}[values]
    gamma, beta = drawn(32, dtype=jnp.float32) + 1, drawn(32, dtype=jnp.float32, seed=1)
    run = lambda x, gamma, beta: normalisation.normalise(
        x, gamma, beta if layer else None, NORM, layer=layer, epsilon=0.0 if layer else 1e-5
    )
    g = drawn(4, 8, 32, dtype=jnp.float32, seed=2)
    results = {}
    for platform in ("cpu", "gpu"):
        pretend(platform)
        with jax.numpy_dtype_promotion("strict"):
            y, pull = jax.vjp(run, x, gamma, beta)
            results[platform] = (y, *pull(g))
    assert ((4, 8, 32), "float32") not in kept(pull)
    assert [leaf.dtype for leaf in results["gpu"]] == [leaf.dtype for leaf in results["cpu"]]
    for found, expected in zip(results["gpu"], results["cpu"], strict=True):
        wide = np.asarray(expected, np.float64)
        assert np.isfinite(wide).all()
        tolerance = 2**-8 if expected.dtype == jnp.bfloat16 else 1e-5
        bound = tolerance * np.abs(wide).max()
        np.testing.assert_allclose(np.asarray(found, np.float64), wide, atol=bound, rtol=0)


@pytest.mark.parametrize("name", [*ACTIVATIONS, "gated"])
def test_activations_keep_only_what_they_were_given(name: str, pretend: Any):
    wide = lambda x: x.astype(jnp.float32)
    gated = lambda x, gate: jax.nn.silu(wide(gate)) * wide(x)
    function = gated if name == "gated" else lambda x: ACTIVATIONS[name](wide(x))
    arguments = [drawn(4, 32, seed=seed) for seed in range(2 if name == "gated" else 1)]
    g = drawn(4, 32, dtype=jnp.float32, seed=5)
    pretend("gpu")
    y, pull = jax.vjp(lambda *x: recompute.recomputed(function, *x), *arguments)
    expected, reference = jax.vjp(function, *arguments)
    np.testing.assert_array_equal(y, expected)
    for found, wanted in zip(pull(g), reference(g), strict=True):
        np.testing.assert_array_equal(found, wanted)
    assert kept(pull) == [((4, 32), "bfloat16")] * len(arguments)


def test_what_an_activation_closes_over_has_its_gradient(pretend: Any):
    pretend("gpu")
    run = lambda x, factor: recompute.recomputed(lambda x: jnp.tanh(x) * factor, x)
    x, factor = drawn(4, 32, dtype=jnp.float32), jnp.float32(2)
    found = jax.grad(lambda *a: jnp.sum(run(*a)), (0, 1))(x, factor)
    expected = jax.grad(lambda x, f: jnp.sum(jnp.tanh(x) * f), (0, 1))(x, factor)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), found, expected)


def test_the_gradient_of_the_targets_logits_is_that_of_an_index(pretend: Any):
    logits = drawn(3, 4, 16, dtype=jnp.float32)
    targets = jnp.asarray(np.random.default_rng(1).integers(0, 16, (3, 4)), jnp.int32)
    site = parse_policy("mixed_bf16").resolve("loss")
    results = {}
    for platform in ("cpu", "gpu"):
        pretend(platform)
        value = lambda x: jnp.sum(loss.token_losses(x, targets, site).cross_entropy)
        results[platform] = jax.value_and_grad(value)(logits)
    np.testing.assert_array_equal(results["gpu"][0], results["cpu"][0])
    np.testing.assert_allclose(results["gpu"][1], results["cpu"][1], atol=1e-7)
    pretend("gpu")
    assert "scatter" not in str(jax.make_jaxpr(jax.grad(value))(logits))
