"""Arithmetic is counted as in papers, in loops as often as they run."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from lmjax.hlo.operations import operations
from lmjax.precision import exact


def counted(function, *arguments) -> dict[str, float]:
    """Floating-point operations by opcode, of the compiled function."""
    found: dict[str, float] = {}
    for one in operations(exact.jit(function).lower(*arguments).compile().as_text()):
        found[one.op] = found.get(one.op, 0.0) + one.flops
    return found


def test_a_product_counts_two_for_each_term_of_each_sum():
    x, w = jnp.ones((2, 3, 5)), jnp.ones((2, 5, 7))
    product = functools.partial(jnp.einsum, "bik,bkj->bij")
    assert counted(product, x, w)["dot"] == 2 * 2 * 3 * 7 * 5


def test_a_loop_counts_as_often_as_it_runs():
    step = lambda x, _: (jnp.tanh(x @ x), None)
    found = counted(lambda x: jax.lax.scan(step, x, None, length=4)[0], jnp.ones((8, 8)))
    assert found["dot"] == 4 * 2 * 8**3
    assert found["tanh"] == 4 * 8**2


def test_a_reduction_counts_what_it_reads_and_integers_do_not_count():
    assert counted(lambda x: jnp.sum(x, axis=1), jnp.ones((4, 6))) == {"reduce": 24}
    assert counted(lambda x: x * 3 + 1, jnp.ones((4, 6), jnp.int32)) == {}


def test_an_operation_knows_its_formats_and_where_it_comes_from():
    def product(x, w):
        with jax.named_scope("here"):
            return jnp.dot(x, w, preferred_element_type=jnp.float32)

    x = jnp.ones((4, 4), jnp.float16)
    dots = [
        o for o in operations(jax.jit(product).lower(x, x).compile().as_text()) if o.op == "dot"
    ]
    assert [(one.dtype, "here" in one.source) for one in dots] == [("f32", True)]
