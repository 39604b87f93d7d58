"""What backward passes keep of elementwise functions, and that gradients are autodiff's."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmjax.model import recompute
from lmjax.model.block import ACTIVATIONS
from lmjax.model.recompute import recomputed
from lmjax.precision import contraction, parse_policy

SITE = parse_policy("f32").resolve("blocks/0/mlp/activation")


@pytest.fixture(autouse=True)
def one_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (contraction, recompute):
        monkeypatch.setattr(module, "is_one_cpu", lambda: True)


@pytest.mark.parametrize("name", [*ACTIVATIONS, "gated"])
def test_gradients_are_those_of_autodiff_and_arguments_are_all_that_is_kept(name):
    function = ACTIVATIONS.get(name, lambda x, gate: jax.nn.silu(gate) * x)
    draw = np.random.default_rng(0).normal(size=(3, 4, 8)).astype(np.float32)
    *arguments, g = jnp.asarray(draw)[0 if name == "gated" else 1 :]
    y, pull = jax.vjp(lambda *x: recomputed(function, SITE, *x), *arguments)
    expected, reference = jax.vjp(function, *arguments)
    np.testing.assert_array_equal(y, expected)
    for found, wanted in zip(pull(g), reference(g), strict=True):
        np.testing.assert_allclose(found, wanted, rtol=1e-6)
    kept = [leaf for leaf in jax.tree.leaves(pull) if leaf.size > 1]
    assert len(kept) == len(arguments)


def test_a_cotangent_that_is_not_finite_reaches_its_own_elements_alone():
    x = jnp.ones((2, 4), jnp.float32)
    _, pull = jax.vjp(lambda x: recomputed(ACTIVATIONS["gelu"], SITE, x), x)
    (found,) = pull(x.at[0, 0].set(jnp.inf))
    assert jnp.isfinite(found).sum() == 7
