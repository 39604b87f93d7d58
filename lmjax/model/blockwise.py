"""Attention in blocks: softmax(q k^T) v in memory that grows with the length, not with its square.

Forwards, each block of queries visits blocks of keys and keeps a running maximum and sum (online
softmax: Milakov and Gimelshein 2018, arXiv 1805.02867; Dao 2023, arXiv 2307.08691). Backwards, the
weights of a block are computed again from the saved logarithms of the sums. Blocks in which a mask
lets no query see a key are not visited. One block that holds all keys is the plain form; strips of
queries then leave out the keys that come after them all.

What is rounded, with operands in the compute formats of their sites and all else in f32 (f64 for
f64):

    s = sum(k q), e = exp(s - max), l = sum(e)
    y = round( sum( round(e) v ) / l )             to c of combine
    p = exp(s - max - log(l))
    dp = sum(v g), dv = round( sum( round(p) g ) )
    ds = round( p (dp - sum_keys(p dp)) )          to c of scores
    dq = round( sum(ds k) ), dk = round( sum(ds q) )

A fused kernel computes the same, but for one rounding that is left out here: where there are
several blocks of keys, sum_keys(p dp) is taken from y before it is rounded. Kernels read the
rounded y, which biases gradients (Qiu and Yao 2025, arXiv 2510.04212).

Scores stand with keys as rows: all products then multiply operands as XLA's CPU kernels take them,
without a transpose of anything as large as the scores.

Shapes are those of `tiling.py`. Knows JAX, masks and policies.
"""

from __future__ import annotations

import functools
from typing import Any, Final, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from lmjax.model.sheet import INSIDE, Given, Measured, Rules, Sheet, Visible, where
from lmjax.model.tiling import Index, add_to, put, taken
from lmjax.precision.asides import aside
from lmjax.precision.contraction import contract, not_before
from lmjax.precision.exact import at_least_f32
from lmjax.precision.probes import Rounded, measure

SAVED = "attention"
"""The name by which rematerialisation finds what the backward pass needs of the forward pass."""

MEASURED: Final = {
    "scores": ("g", "dx", "dw"),
    "softmax": ("y", "dx"),
    "combine": ("x", "dx", "dw"),
}
"""Roles that `attend` measures."""


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def attend(
    rules: Rules, q: jax.Array, k: jax.Array, v: jax.Array, given: Given, slots: Measured
) -> jax.Array:
    """What each query reads: `[B, T, K, G, H]`, in the compute format of `combine`.

    Args:
      rules: the formats and constants.
      q: queries `[B, T, K, G, H]`, in the compute format of `scores`.
      k: keys `[B, S, K, H]`, likewise.
      v: values `[B, S, K, H]`, in the compute format of `combine`.
      given: mask, position and random keys.
      slots: what to measure in the backward pass: `g`, `dx` and `dw` of `scores`, `y` and `dx` of
        `softmax`, `x`, `dx` and `dw` of `combine`. Weights are those divided by their sum; what no
        query sees counts as zeros.
    """
    return _forward(rules, q, k, v, given, slots)[0]


def _forward(
    rules: Rules, q: jax.Array, k: jax.Array, v: jax.Array, given: Given, slots: Measured
) -> tuple[jax.Array, Any]:
    sheet = Sheet(rules, q, k, given, slots)
    tiling, dtype = sheet.tiling, sheet.dtype
    with rules.scores.scope:
        queries, keys = tiling.split_queries(q), tiling.split_keys(k)
    with rules.combine.scope:
        values = tiling.split_keys(v, turned=True)
    column = (*queries.shape[:3], 1, tiling.rows)
    nothing = _State(
        jnp.full(column, -jnp.inf, dtype),
        jnp.zeros(column, dtype),
        jnp.zeros((*column[:3], v.shape[-1], tiling.rows), at_least_f32(v.dtype)),
    )

    def step(state: _State, i: Index, j: Index, visible: Visible) -> _State:
        before = taken(state, i)
        query, key, value = taken(queries, i), taken(keys, j), taken(values, j)
        key, value = key[..., : sheet.seen(i), :], value[..., : sheet.seen(i)]
        read = lambda: _read(sheet, before, (query, key, value), visible, sheet.keep(i, j))
        return put(state, sheet.when(visible, read, lambda: before), i)

    top, total, read = sheet.visit(step, nothing)
    with rules.combine.scope:
        with aside("sum"):
            factor = rules.weight_factor * rules.divisor(tiling.keys)
            wide = tiling.join_queries(read * factor / total.astype(read.dtype))
        if tiling.key_blocks > 1:
            wide = checkpoint_name(wide, SAVED)
            y = rules.combine.to_compute(wide)
        else:
            y = checkpoint_name(rules.combine.to_compute(wide), SAVED)
    with rules.softmax.scope:
        logarithms = checkpoint_name(top + jnp.log(total), SAVED)
    return y, (q, k, v, given, slots, logarithms, wide if tiling.key_blocks > 1 else None)


class _State(NamedTuple):
    """What the queries of a block have seen: largest score, sum and weighted values.

    Attributes:
      top: `[B, L, 1, R]`.
      total: `[B, L, 1, R]`.
      read: `[B, L, H, R]`.
    """

    top: jax.Array
    total: jax.Array
    read: jax.Array


def _read(
    sheet: Sheet,
    before: _State,
    blocks: tuple[jax.Array, jax.Array, jax.Array],
    visible: Visible,
    keep: jax.Array | None,
) -> _State:
    """What queries have seen after one more block of keys."""
    rules, (query, key, value) = sheet.rules, blocks
    scores = sheet.scores(query, key, visible)
    first = sheet.tiling.key_blocks == 1
    with rules.softmax.scope:
        top = jnp.max(scores, -2, keepdims=True)
        top = top if first else jnp.maximum(before.top, top)
        sees_none = top == -jnp.inf
        weights = jnp.exp(scores - jnp.where(sees_none, jnp.zeros_like(top), top))
        total = jnp.sum(weights, -2, keepdims=True)
        weights = sheet.dropped(weights, keep)
        kept = jnp.where(sees_none, jnp.ones_like(top), jnp.exp(before.top - top))
    with rules.combine.scope:
        weights = rules.combine.to_compute(weights)
    read = rules.product("bkhc,bkcr->bkhr", value, weights, rules.combine)
    if first:
        return _State(top, total, read)
    with rules.combine.scope, aside("sum"):
        read = before.read * kept.astype(read.dtype) + read
    return _State(top, before.total * kept + total, read)


def _backward(rules: Rules, saved: Any, g: jax.Array) -> tuple[Any, ...]:
    q, k, v, given, slots, logarithms, wide = saved
    # Else XLA would compute the scores again early, or not at all, and keep those of every block.
    with rules.scores.scope, aside("entering"):
        q, k = not_before(g, q), not_before(g, k)
    with rules.combine.scope, aside("entering"):
        v = not_before(g, v)
    sheet = Sheet(rules, q, k, given, slots)
    tiling = sheet.tiling
    with rules.scores.scope:
        queries, keys = tiling.split_queries(q), tiling.split_keys(k)
        turned = tiling.split_keys(k, turned=True)
    with rules.combine.scope:
        g = rules.combine.to_cotangent(g)
        values, cotangents = tiling.split_keys(v), tiling.split_queries(g)
    sums = None
    if wide is not None:
        with rules.softmax.scope:
            sums = _sum_of_each_head(wide, g.astype(wide.dtype))
            sums = sums * (rules.divisor(q.shape[-1]) / rules.divisor(tiling.keys))
            sums = jnp.swapaxes(tiling.split_queries(sums), -1, -2).astype(sheet.dtype)
    inside = {
        site: {role: slot for role, slot in asked.items() if role in INSIDE[site]}
        for site, asked in slots.items()
    }
    zeros = lambda x: jnp.zeros(x.shape, at_least_f32(x.dtype))
    nothing = (zeros(jnp.swapaxes(queries, -1, -2)), zeros(keys), zeros(values), inside)

    def step(state: Any, i: Index, j: Index, visible: Visible) -> Any:
        """Adds the gradients of one block of queries `i` and keys `j` to those so far."""
        *before, measured = state
        own = taken((queries, cotangents, logarithms, sums), i)
        whole = _Blocks(*own, *taken((keys, turned, values), j))
        blocks, unseen = whole.cut(sheet.seen(i))
        compute = lambda: _returned(sheet, blocks, visible, sheet.keep(i, j), inside)
        skip = lambda: _returned_unseen(sheet, blocks, inside)
        *parts, new = sheet.when(visible, compute, skip)
        places = zip(before, parts, (i, j, j), strict=True)
        summed = [add_to(total, part, n) for total, part, n in places]
        if inside and unseen.key.shape[2]:
            new = _combined(new, _returned_unseen(sheet, unseen, inside)[-1])
        return (*summed, new if sheet.is_one_block else _combined(measured, new))

    dq, dk, dv, measured = sheet.visit(step, nothing)
    of_queries = rules.divisor(tiling.queries * tiling.groups)
    with rules.scores.scope, aside("sum"):
        dq = tiling.join_queries(dq) * rules.divisor(tiling.keys)
        dk = tiling.join_keys(dk) * of_queries
    with rules.combine.scope, aside("sum"):
        dv = tiling.join_keys(dv) * of_queries
    gradients, returned = [], {site: dict(found) for site, found in measured.items()}
    for site, role, wide in (("scores", "dx", dq), ("scores", "dw", dk), ("combine", "dw", dv)):
        formats = getattr(rules, site)
        with formats.scope:
            rounded = formats.to_cotangent(wide)
            if role in slots.get(site, {}):
                tensor = Rounded(wide, wide, rounded, formats.compute)
                returned[site][role] = measure(slots[site][role], tensor)
        gradients.append(rounded)
    return (*gradients, None, returned)


def _sum_of_each_head(x: jax.Array, y: jax.Array) -> jax.Array:
    """Of `x * y` over the last axis, `[..., 1]`.

    A contraction: XLA's CPU backend would reduce the product in another order of its axes, of
    which some have length 1, and take fifty times as long.
    """
    highest = jax.lax.Precision.HIGHEST
    spec = "btkgh,btkgh->btkg"
    return contract(spec, x, y, precision=highest, accumulate=x.dtype)[..., None]


class _Blocks(NamedTuple):
    """What the backward pass reads for one block of scores: its queries' and its keys'.

    Attributes:
      query, cotangent: `[B, L, R, H]`.
      logarithm: of the sum of exponentials, `[B, L, 1, R]`.
      sums: `sum_keys(p dp)`, likewise; None where the block holds all keys.
      key, value: `[B, L, C, H]`.
      turned: the keys as `[B, L, H, C]`.
    """

    query: jax.Array
    cotangent: jax.Array
    logarithm: jax.Array
    sums: jax.Array | None
    key: jax.Array
    turned: jax.Array
    value: jax.Array

    def cut(self, keys: int) -> tuple[_Blocks, _Blocks]:
        """The same with the first so many keys alone, and with the others."""
        first, rest = (
            (self.key[..., part, :], self.turned[..., part], self.value[..., part, :])
            for part in (slice(keys), slice(keys, None))
        )
        return _Blocks(*self[:4], *first), _Blocks(*self[:4], *rest)


def _returned(
    sheet: Sheet, blocks: _Blocks, visible: Visible, keep: jax.Array | None, slots: Measured
) -> tuple[jax.Array, jax.Array, jax.Array, Measured]:
    """What one block adds to dq `[B, L, H, R]`, dk and dv `[B, L, C, H]`, and its measurements."""
    rules, dtype = sheet.rules, sheet.dtype
    scores = sheet.scores(blocks.query, blocks.key, visible)
    of_weights = rules.product("bkch,bkrh->bkcr", blocks.value, blocks.cotangent, rules.combine)
    with rules.softmax.scope:
        share = jnp.exp(scores - blocks.logarithm)
        of_weights = of_weights.astype(dtype) * rules.divisor(blocks.query.shape[-1])
        weights = sheet.dropped(share, keep) * rules.weight_factor
    with rules.combine.scope:
        narrow = rules.combine.to_compute(weights)
    dv = rules.product("bkcr,bkrh->bkch", narrow, blocks.cotangent, rules.combine)
    with rules.softmax.scope:
        of_share = sheet.dropped(of_weights, keep) * rules.weight_factor
        sums = blocks.sums
        if sums is None:
            sums = jnp.sum(where(visible, share * of_share, 0.0), -2, keepdims=True)
        of_scores = share * (of_share - sums) * rules.score_factor
        of_scores = where(visible, of_scores, 0.0)
    with rules.scores.scope:
        g = rules.scores.to_cotangent(of_scores)
    dk = rules.product("bkcr,bkrh->bkch", g, blocks.query, rules.scores)
    dq = rules.product("bkhc,bkcr->bkhr", blocks.turned, g, rules.scores)
    if not slots:
        return dq, dk, dv, {}
    seen = where(visible, of_weights, 0.0)
    shares = share * rules.weight_factor
    return dq, dk, dv, _looked_at(rules, slots, of_scores, shares, weights, seen)


def _returned_unseen(
    sheet: Sheet, blocks: _Blocks, slots: Measured
) -> tuple[jax.Array, jax.Array, jax.Array, Measured]:
    """The same of a block in which no query sees a key."""
    zeros = lambda x: jnp.zeros(x.shape, at_least_f32(x.dtype))
    nothing = jnp.zeros((*blocks.key.shape[:3], blocks.query.shape[2]), sheet.dtype)
    measured = _looked_at(sheet.rules, slots, *[nothing] * 4) if slots else {}
    return (
        zeros(jnp.swapaxes(blocks.query, -1, -2)),
        zeros(blocks.key),
        zeros(blocks.value),
        measured,
    )


def _looked_at(
    rules: Rules,
    slots: Measured,
    of_scores: jax.Array,
    shares: jax.Array,
    weights: jax.Array,
    of_weights: jax.Array,
) -> Measured:
    """What slots measure of one block: cotangents of scores, weights before and after dropout, and
    the cotangents of the latter, `[B, L, C, R]` each.
    """
    scores, softmax, product = rules.scores, rules.softmax, rules.combine
    tensors = {
        "scores": {
            "g": Rounded(of_scores, of_scores, scores.to_cotangent(of_scores), scores.compute)
        },
        "softmax": {
            "y": Rounded(shares, shares, shares, softmax.output),
            "dx": Rounded(of_scores, of_scores, of_scores, scores.result),
        },
        "combine": {
            "x": Rounded(weights, weights, product.to_compute(weights), product.compute),
            "dx": Rounded(of_weights, of_weights, of_weights, softmax.output),
        },
    }
    return {
        site: {role: measure(slot, tensors[site][role]) for role, slot in asked.items()}
        for site, asked in slots.items()
    }


def _combined(first: Measured, second: Measured) -> Measured:
    """The measurements of two blocks."""
    both = lambda asked, site, role: {
        who: slot.combine(second[site][role][who]) for who, slot in asked.items()
    }
    return {
        site: {role: both(asked, site, role) for role, asked in roles.items()}
        for site, roles in first.items()
    }


attend.defvjp(_forward, _backward)
