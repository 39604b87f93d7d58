"""Attention in blocks computes what the plain form does, whatever the blocks, and skips what no
query sees.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmjax.model import blockwise, tiling
from lmjax.model.attention import Attention
from lmjax.model.attention_form import BLOCKWISE, Form
from lmjax.model.mask import CAUSAL, Bidirectional, CausalWithinDocuments, Padded, indices_from
from lmjax.model.sheet import Given, Rules
from lmjax.model.sites import Context, within
from lmjax.precision.grammar import parse_policy
from lmjax.precision.probes import FullCensus
from lmjax.train import phase_of

CUTS = {"whole": {}, "blocks of 8": {"block": 8}, "strips of 8": {"strip": 8}}
"""How 24 queries and keys are cut."""
SITES = "scores", "softmax", "combine"
STARTS = np.stack([np.repeat([0, 5], [5, 19]), np.repeat([0, 3, 21], [3, 18, 3])]).astype(np.int32)
MASKS = {
    "causal": CAUSAL,
    "documents": CausalWithinDocuments(STARTS),
    "padded": Padded(np.int32([5, 20])),
    "bidirectional": Bidirectional(),
}


def rules_of(policy: str, **changes: Any) -> Rules:
    parsed = parse_policy(policy)
    sites = (parsed.resolve(f"blocks/0/attention/{name}") for name in SITES)
    return Rules(*sites, **{"score_factor": 0.3} | changes)


def drawn(dtype: Any, queries: int = 24, keys: int = 24) -> list[Any]:
    """q, k, v and a cotangent: two rows, two key/value heads of two queries each, heads 4 wide."""
    generator = np.random.default_rng(0)
    shapes = [(2, queries, 2, 2, 4), *[(2, keys, 2, 4)] * 2, (2, queries, 2, 2, 4)]
    return [jnp.asarray(generator.normal(size=shape), dtype) for shape in shapes]


def plain(q: Any, k: Any, v: Any, mask: Any, start: int) -> Any:
    visible = mask.visible(indices_from(start, q.shape[1]), indices_from(0, k.shape[1]))
    scores = jnp.einsum("btkgh,bskh->bkgts", q, k, precision="highest") * 0.3
    weights = jax.nn.softmax(jnp.where(visible, scores, -jnp.inf), axis=-1)
    return jnp.einsum("bkgts,bskh->btkgh", weights, v, precision="highest")


def gradients(function: Any, arrays: Any, compile_fast: Any) -> list[np.ndarray]:
    """The result and the three gradients, in f64."""

    def both(q: Any, k: Any, v: Any, g: Any) -> Any:
        y, back = jax.vjp(function, q, k, v)
        return y, *back(g)

    return [np.asarray(x, np.float64) for x in compile_fast(both)(*arrays)]


def worst(found: list[np.ndarray], expected: list[np.ndarray]) -> float:
    return max(np.abs(a - b).max() / np.abs(b).max() for a, b in zip(found, expected, strict=True))


@pytest.fixture
def x64() -> Any:
    with jax.enable_x64(True):
        yield


@pytest.mark.parametrize(
    "sizes", [{"block": 8}, {"block": 7}, {"block": 512}, {"strip": 8}], ids=str
)
@pytest.mark.parametrize("mask", MASKS)
def test_blocks_and_the_plain_form_agree_in_f64(mask, sizes, x64, compile_fast):
    arrays, chosen = drawn(jnp.float64), MASKS[mask]
    rules, given = rules_of("f64", **sizes), Given(chosen, 0, None)
    found = gradients(
        lambda q, k, v: blockwise.attend(rules, q, k, v, given, {}), arrays, compile_fast
    )
    expected = gradients(lambda q, k, v: plain(q, k, v, chosen, 0), arrays, compile_fast)
    assert worst(found, expected) < 1e-12


@pytest.mark.parametrize(("known", "parts"), [(True, 1), (False, 1), (True, 2)])
def test_queries_may_start_anywhere_and_be_divided(known, parts, x64, compile_fast):
    arrays = drawn(jnp.float64, queries=10)
    rules = rules_of("f64", block=4, start=14 if known else None, parts=parts)

    def at(q: Any, k: Any, v: Any) -> Any:
        given = Given(CAUSAL, 14 if known else jnp.int32(14), None)
        return blockwise.attend(rules, q, k, v, given, {})

    expected = gradients(lambda q, k, v: plain(q, k, v, CAUSAL, 14), arrays, compile_fast)
    assert worst(gradients(at, arrays, compile_fast), expected) < 1e-12


@pytest.mark.parametrize(
    ("policy", "dtype", "epsilon"),
    [("mixed_bf16", "bfloat16", 2.0**-8), ("mixed_f16", "float16", 2.0**-11)],
)
def test_blocks_round_like_the_plain_form(policy, dtype, epsilon, compile_fast):
    arrays = drawn(dtype)
    given = Given(CAUSAL, 0, None)
    wide = [x.astype(jnp.float32) for x in arrays]
    expected = gradients(lambda q, k, v: plain(q, k, v, CAUSAL, 0), wide, compile_fast)
    for cut in CUTS.values():
        rules = rules_of(policy, **cut)
        run = lambda q, k, v, r=rules: blockwise.attend(r, q, k, v, given, {})
        assert worst(gradients(run, arrays, compile_fast), expected) < 4 * epsilon


def test_strips_leave_out_the_keys_after_them(equations):
    """Of 24 x 24 scores, those of three strips with 8, 16 and 24 keys."""
    arrays = drawn(jnp.float32)[:3]
    for mask, keys in (("causal", [8, 16, 24]), ("bidirectional", [24, 24, 24])):
        rules, given = rules_of("f32", strip=8), Given(MASKS[mask], 0, None)
        run = lambda *x, r=rules, g=given: blockwise.attend(r, *x, g, {})
        exponentials = equations(jax.make_jaxpr(run)(*arrays), "exp")
        shapes = [e.outvars[0].aval.shape for e in exponentials]
        assert [shape[-2] for shape in shapes if shape[-2] > 1] == keys


@pytest.mark.parametrize("mask", MASKS)
def test_what_masks_say_of_blocks_is_so(mask):
    """Exactly so where a mask has no arrays."""
    one, indices = MASKS[mask], jnp.arange(24)
    visible = np.asarray(one.visible(indices, indices)).reshape(-1, 24, 24)
    ranges = [range(start, start + size) for start in (0, 3, 8) for size in (1, 2, 8)]
    for queries, keys in itertools.product(ranges, ranges):
        block = visible[:, queries.start : queries.stop, keys.start : keys.stop]
        must, may = one.must_see(queries, keys), one.may_see(queries, keys)
        if jax.tree.leaves(one):
            assert block.all() or not must
            assert may or not block.any()
        else:
            assert (must, may) == (block.all(), block.any())


def test_masks_are_applied_to_the_blocks_that_they_cut(equations):
    """Statically where a mask alone says what is seen, at run time where its arrays do."""
    arrays = drawn(jnp.float32)[:3]

    def scanned(mask: Any, length: int = 24) -> list[tuple[int, int, bool]]:
        """Of each loop over blocks: their number, conditions in a step, and whether it masks."""
        rules, given = rules_of("f32", block=8), Given(mask, 0, None)
        jaxpr = jax.make_jaxpr(lambda *x: blockwise.attend(rules, *x, given, {}))(
            *(x[:, :length] for x in arrays)
        )
        found = []
        for loop in equations(jaxpr, "scan"):
            step = loop.params["jaxpr"]
            selected = [e.outvars[0].aval.shape for e in equations(step, "select_n")]
            masks = any(len(shape) == 4 and shape[-2] == 8 for shape in selected)
            found.append((loop.params["length"], len(equations(step, "cond")), masks))
        return found

    assert scanned(MASKS["causal"]) == [(3, 0, False), (3, 0, True)]
    assert scanned(MASKS["documents"]) == [(6, 1, True)]
    assert scanned(MASKS["bidirectional"]) == [(9, 0, False)]
    assert scanned(MASKS["bidirectional"], 23) == [(6, 0, False), (3, 0, True)]
    assert scanned(MASKS["padded"]) == [(9, 1, True)]


def test_what_is_not_visited_has_no_effect(compile_fast):
    """Infinite keys of another document: skipped blocks do not even see them."""
    q, k, v, g = drawn(jnp.float32)
    starts = np.full((2, 24), 8, np.int32)
    rules = rules_of("f32", block=8, start=8)
    given = Given(CausalWithinDocuments(starts[:, 8:]), 8, None)
    run = lambda q, k, v: blockwise.attend(rules, q, k, v, given, {})
    found = gradients(run, (q[:, 8:], k.at[:, :8].set(jnp.inf), v, g[:, 8:]), compile_fast)
    assert all(np.isfinite(x).all() for x in found)
    assert not found[2][:, :8].any()


def test_memory_grows_with_the_length(compile_fast):
    """Of forward and backward pass together, in blocks of 64."""
    rules, given = rules_of("f32", block=64), Given(CAUSAL, 0, None)

    def temporaries(length: int) -> int:
        q, k = (1, length, 1, 1, 8), (1, length, 1, 8)
        shapes = [jax.ShapeDtypeStruct(s, jnp.float32) for s in (q, k, k)]
        total = lambda q, k, v: jnp.sum(blockwise.attend(rules, q, k, v, given, {}))
        compiled = compile_fast(jax.grad(total, (0, 1, 2))).lower(*shapes).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    assert temporaries(2048) < 2.2 * temporaries(1024) < 1024 * 1024 * 4


@pytest.mark.parametrize("cut", list(CUTS)[1:])
@pytest.mark.parametrize("mask", ["causal", "documents"])
def test_measurements_are_those_of_one_block(mask, cut, compile_fast):
    """The census of weights and cotangents, added up over blocks, the skipped ones as zeros."""
    arrays = drawn(jnp.bfloat16)
    given = Given(MASKS[mask], 0, None)
    slots = {
        site: {role: {"test": FullCensus.empty()} for role in roles}
        for site, roles in blockwise.MEASURED.items()
    }

    def measured(cut: str) -> Any:
        rules = rules_of("mixed_bf16", **CUTS[cut])

        def loss(slots: Any) -> Any:
            y = blockwise.attend(rules, *arrays[:3], given, slots)
            return jnp.sum((y * arrays[3]).astype(jnp.float32))

        return compile_fast(jax.grad(loss))(slots)

    one, many = measured("whole"), measured(cut)
    for site, roles in blockwise.MEASURED.items():
        for role in roles:
            first, second = one[site][role]["test"], many[site][role]["test"]
            assert first.size == second.size == first.table.sum()
            np.testing.assert_allclose(first.maximum, second.maximum, rtol=2e-2)
            moved = np.abs(first.histogram - second.histogram).sum() / first.size
            assert moved < 0.03, (site, role)
    assert one["softmax"]["y"]["test"].size == 2 * 4 * 24 * 24


def test_dropout_drops_the_same_weights_in_both_passes(compile_fast):
    """The function is linear in v: its value is the gradient's product with v."""
    q, k, v, g = drawn(jnp.float32)
    keys = jax.random.split(jax.random.key(1), (2, 2))
    for cut in CUTS.values():
        rules = rules_of("f32", dropout=0.4, **cut)
        run = lambda q, k, v, r=rules: blockwise.attend(r, q, k, v, Given(CAUSAL, 0, keys), {})
        y, *_, dv = gradients(run, (q, k, v, g), compile_fast)
        assert np.sum(y * np.asarray(g)) == pytest.approx(np.sum(dv * np.asarray(v)), rel=1e-4)
        ones = np.asarray(compile_fast(run)(q, k, jnp.ones_like(v)))
        assert 0.85 < ones[:, 8:].mean() < 1.15
        assert np.ptp(ones) > 0.2


@pytest.mark.parametrize("mask", MASKS)
def test_heads_are_attended_to_in_groups_whose_scores_fit_the_cache(
    mask, monkeypatch, compile_fast
):
    """To the bit as all at once, and dropout drops the same."""
    arrays, keys = drawn(jnp.float32), jax.random.split(jax.random.key(1), (2, 2))
    rules, given = rules_of("f32", block=8, dropout=0.4), Given(MASKS[mask], 0, keys)
    cut = lambda: tiling.Tiling.of(*arrays[:2], block=8, strip=8, parts=1, start=0)
    run = lambda q, k, v: blockwise.attend(rules, q, k, v, given, {})
    together = gradients(run, arrays, compile_fast)
    assert cut().head_groups == 1
    of_a_head = 2 * 8 * 2 * 8  # rows, keys, query heads of a key head, queries
    monkeypatch.setattr(tiling, "CACHED_SCORES", of_a_head)
    monkeypatch.setattr(tiling, "is_one_cpu", lambda: False)
    assert cut().head_groups == 1  # devices may divide the heads
    monkeypatch.setattr(tiling, "is_one_cpu", lambda: True)
    assert cut().head_groups == 2
    jax.clear_caches()
    for found, expected in zip(gradients(run, arrays, compile_fast), together, strict=True):
        np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize(
    ("policy", "why"),
    [
        ("mixed_bf16", ""),
        ("fp8", ""),
        ("pure_f16; **/combine: c=e5m2", ""),
        ("mixed_bf16; **/softmax: c=bf16", "softmax has c=bf16"),
        ("mixed_bf16; **/scores: c=bf16", "scores are rounded to bf16"),
        ("mixed_bf16; **/combine: x=e4m3@tensor", "combine has x=e4m3@tensor"),
        ("f32,a=bf16@block16", "scores has a=bf16@block16"),
    ],
)
def test_the_form_is_what_the_policy_allows(policy, why, tiny):
    config = tiny(policy)
    forms = phase_of(config).attention_forms()
    assert list(forms) == [f"blocks/{i}/attention/softmax" for i in range(2)]
    assert {form.why for form in forms.values()} == {why}


@pytest.mark.parametrize(
    "policy", ["f32", "mixed_bf16,w=int8@channel", "p=f32,c=e6m7", "mixed_f16"]
)
@pytest.mark.parametrize("parametrisation", ["standard", "unit"])
def test_the_whole_matrix_gives_the_same(policy, parametrisation, tiny, compile_fast):
    """The two forms of one attention, to the rounding of the compute format."""
    config = tiny(policy, "llama", model={"parametrisation": parametrisation})
    part = Attention(jax.random.key(0), dataclasses.replace(config.model, kv_heads=2, heads=4))
    sites = within(phase_of(config).sites, "blocks/0/attention")
    q, k, v, g = drawn(sites["scores"].compute.dtype or jnp.float32, 16, 16)

    def run(form: Any) -> list[np.ndarray]:
        read = lambda q, k, v: form(q, k, v, sites, Context(), CAUSAL)
        return gradients(read, (q, k, v, g), compile_fast)

    in_blocks = functools.partial(part.read, Form(BLOCKWISE))
    epsilon = 2.0 ** -sites["scores"].compute.mantissa_bits
    assert worst(run(in_blocks), run(part.read_whole)) < 8 * epsilon
