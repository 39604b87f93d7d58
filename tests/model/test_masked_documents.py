"""A document mask: a document in the middle of a window is the document alone, in every way."""

from __future__ import annotations

import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmjax.data import DataConfig, document_starts
from lmjax.model import apply, decoding_params, extend, initial_cache, log_probabilities
from lmjax.model.attention import Attention
from lmjax.model.mask import CausalWithinDocuments
from lmjax.model.sites import QUIET
from lmjax.parallel import sharding
from lmjax.runs.resolved import phase_of
from lmjax.train.step import evaluation, make_scaled_loss

END = 0
"""The end-of-document token here."""

DRAWN = np.random.default_rng(5).permutation(np.arange(1, 64)).astype(np.int32)
FIRST, OTHER_FIRST, SECOND, THIRD = DRAWN[:4], DRAWN[20:24], DRAWN[4:10], DRAWN[10:13]
OPENED = np.concatenate([[END], SECOND])
"""The second document as a scored text is read: behind an end-of-document token."""
WITHIN = slice(len(FIRST), len(FIRST) + len(OPENED))
"""Where it stands in a window."""
WINDOW = np.concatenate([FIRST, OPENED, [END], THIRD, [END]])[None]

MASKED = DataConfig(document_mask=True)


def logits(params: Any, tokens: jax.Array, starts: Any = None, *, config: Any) -> jax.Array:
    return apply(
        params, tokens, config=config.model, sites=phase_of(config).sites, document_starts=starts
    )


@pytest.fixture(scope="module")
def forward(compile_fast) -> Any:
    """`forward(config)`: the compiled `logits`, kept for the next test."""
    return functools.cache(lambda config: compile_fast(functools.partial(logits, config=config)))


def test_an_end_of_document_token_opens_the_document_behind_it():
    tokens = np.array([[5, 6, END, 7, END, END, 8], [END, 5, 5, 5, 5, 5, 5], [5] * 7])
    starts = document_starts(tokens, END)
    assert starts.dtype == np.int32
    np.testing.assert_array_equal(
        starts, [[0, 0, 2, 2, 4, 5, 5], [0, 0, 0, 0, 0, 0, 0], [0, 0, 0, 0, 0, 0, 0]]
    )


@pytest.mark.parametrize(
    ("policy", "family", "parametrisation", "epsilon"),
    [
        ("f32", "gpt2", "standard", 2.0**-23),
        ("f32", "llama", "unit", 2.0**-23),
        ("mixed_f16", "llama", "standard", 2.0**-10),
        ("mixed_bf16; blocks/1: c=f32", "gpt2", "unit", 2.0**-7),
        ("f32,w=e4m3@channel,x=e4m3@channel", "llama", "standard", 2.0**-23),
    ],
)
def test_a_document_in_a_window_is_the_document_alone(
    policy, family, parametrisation, epsilon, tiny, draw_params, forward
):
    """To a few units of the format: sums run over other shapes, so in another order."""
    config = tiny(policy, family, model={"parametrisation": parametrisation})
    params, run = draw_params(config, std=0.3), forward(config)
    starts = document_starts(WINDOW, END)
    found = np.asarray(run(params, WINDOW, starts), np.float64)[0, WITHIN]
    alone = np.asarray(run(params, OPENED[None]), np.float64)[0]
    np.testing.assert_allclose(found, alone, rtol=0, atol=8 * epsilon * np.abs(alone).max())
    leaky = np.asarray(run(params, WINDOW), np.float64)[0, WITHIN]
    assert np.abs(leaky - alone).max() > 0.05, "the comparison would mean little"

    changed = WINDOW.copy()
    changed[0, : len(FIRST)] = OTHER_FIRST
    assert not np.array_equal(run(params, changed, starts)[0, 3], run(params, WINDOW, starts)[0, 3])
    found, again = (run(params, w, starts)[:, WITHIN] for w in (WINDOW, changed))
    np.testing.assert_array_equal(again, found, "what stands before it changes no bit")


def test_a_factor_of_a_whole_tensor_is_shared_by_documents(tiny, draw_params, forward):
    """The one way on which documents still meet: `@tensor` finds its factor in all of a batch."""
    config = tiny("p=f32,w=e4m3@tensor,x=e4m3@tensor", "gpt2")
    params, run = draw_params(config, std=0.3), forward(config)
    starts = document_starts(WINDOW, END)
    found = np.asarray(run(params, WINDOW, starts))[0, WITHIN]
    alone = np.asarray(run(params, OPENED[None]))[0]
    assert 0 < np.abs(found - alone).max() < 0.2 * np.abs(alone).max()


@pytest.mark.parametrize(("policy", "family"), [("f32", "gpt2"), ("mixed_f16", "llama")])
def test_no_gradient_leaves_a_document(policy, family, tiny, draw_params, compile_fast):
    config = tiny(policy, family, model={"tied": False})
    params = draw_params(config, std=0.3)
    mixed = np.random.default_rng(0).normal(size=64).astype(np.float32)
    starts = document_starts(WINDOW, END)

    def of_table(table: jax.Array) -> jax.Array:
        found = logits(params | {"embed": {"table": table}}, WINDOW, starts, config=config)
        return found[0].astype(jnp.float32) @ mixed

    jacobian = np.asarray(compile_fast(jax.jacrev(of_table))(params["embed"]["table"]))
    assert np.isfinite(jacobian).all()
    influence = np.abs(jacobian).sum(-1)  # of each row of the table on each position
    second = influence[WITHIN]
    assert not second[:, [*FIRST, *THIRD]].any()
    for place, token in enumerate(SECOND, start=1):
        assert second[place:, token].all(), "every earlier token of its own is seen"
        assert not second[:place, token].any()


def test_what_is_masked_may_overflow(tiny, compile_fast):
    """Scores of another document are infinite in f16: weights and gradients stay what they are."""
    config = tiny("pure_f16", "gpt2")
    attention = Attention(jax.random.key(0), config.model)
    name = "blocks/0/attention/"
    sites = {
        p.removeprefix(name): s for p, s in phase_of(config).sites.items() if p.startswith(name)
    }
    q, k = (
        jnp.asarray(x, jnp.float16) for x in np.random.default_rng(0).normal(size=(2, 1, 6, 2, 8))
    )
    huge = k.at[:, :3].set(6e4)
    mask = CausalWithinDocuments(jnp.full((1, 3), 3))

    @compile_fast
    def weights_and_gradients(k: jax.Array) -> Any:
        weights = lambda q, k: attention.weights(q[:, 3:, :, None], k, sites, QUIET, mask, 3)
        return weights(q, k), jax.grad(lambda q, k: jnp.sum(weights(q, k) ** 2), (0, 1))(q, k)

    assert not np.isfinite(np.einsum("btkh,bskh->bkts", q, huge)).all(), "in f16 they overflow"
    found, expected = weights_and_gradients(huge), weights_and_gradients(k)
    assert not found[0][..., :3].any()
    np.testing.assert_allclose(np.sum(found[0], axis=-1, dtype=np.float32), 1, atol=2**-9)
    jax.tree.map(np.testing.assert_array_equal, found, expected)
    assert np.any(found[1][0])


@pytest.mark.parametrize(("policy", "family"), [("f32", "gpt2"), ("mixed_bf16", "llama")])
def test_a_cache_holds_several_documents(policy, family, tiny, draw_params, forward, compile_fast):
    """A prompt of three documents, read some tokens at a time and then one by one."""
    config = tiny(policy, family)
    params, starts = draw_params(config, std=0.3), document_starts(WINDOW, END)
    expected = np.asarray(forward(config)(params, WINDOW, starts), np.float64)
    given = {"config": config.model, "sites": phase_of(config).sites}
    read = compile_fast(functools.partial(extend, **given))
    cache, found, start = initial_cache(config.model, phase_of(config).sites, 1, 16), [], 0
    prepared = decoding_params(params, **given)
    for length in (6, 6, *[1] * (WINDOW.size - 12)):
        part = slice(start, start + length)
        here = {"document_starts": starts[:, part]}
        more, cache = read(prepared, WINDOW[:, part], cache, np.int32(start), **here)
        found.append(np.asarray(more, np.float64))
        start += length
    epsilon = 2.0**-23 if policy == "f32" else 2.0**-7
    limit = 8 * epsilon * np.abs(expected).max()
    assert np.abs(np.concatenate(found, axis=1) - expected).max() <= limit


def losses_alone(params: Any, config: Any, run: Any) -> np.ndarray:
    """The cross entropies of `WINDOW`, each document read by itself and without a mask."""
    found = []
    ends = [0, *np.flatnonzero(WINDOW[0] == END)]
    for first, last in itertools.pairwise(ends):
        inputs, targets = WINDOW[:, first:last], WINDOW[:, first + 1 : last + 1]
        site = phase_of(config).sites["loss"]
        found.append(-log_probabilities(run(params, inputs), targets, site)[0])
    return np.concatenate(found).astype(np.float64)


def batch_of_window(rows: int) -> dict[str, jax.Array]:
    """`WINDOW`, so many times."""
    inputs, targets = (np.repeat(w, rows, axis=0) for w in (WINDOW[:, :-1], WINDOW[:, 1:]))
    batch = {"inputs": inputs, "targets": targets, "document_starts": document_starts(inputs, END)}
    return jax.tree.map(jnp.asarray, batch)


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("gpt2", {}),
        ("llama", {"remat": "full", "dropout": 0.5}),
        ("gpt2", {"parametrisation": "unit", "remat": "dots"}),
    ],
)
def test_the_loss_is_that_of_each_document_alone(
    family, changes, tiny, draw_params, compile_fast, forward
):
    """In training, whose gradient is finite, and in evaluation."""
    config = tiny("f32", family, model=changes, data=MASKED, context=WINDOW.size - 1).resolved()
    params, batch = draw_params(config, std=0.3), batch_of_window(2)
    mesh = sharding.make_mesh(config.mesh, jax.devices()[:1])
    expected = losses_alone(params, config, forward(config))
    weights = jnp.ones(batch["inputs"].shape, jnp.float32)
    nats, tokens = compile_fast(evaluation(phase_of(config), mesh))(
        params, batch | {"weights": weights}
    )
    assert float(nats) / float(tokens) == pytest.approx(expected.mean(), rel=1e-5)
    value = compile_fast(jax.value_and_grad(make_scaled_loss(phase_of(config), mesh), has_aux=True))
    key = jax.random.key(0)
    (_, loss), gradient = value(params, batch, key, jnp.ones((), jnp.float32))
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))
    if not config.model.dropout:
        assert float(loss) == pytest.approx(expected.mean(), rel=1e-5)


def test_a_batch_that_does_not_say_where_documents_start_is_refused(tiny, draw_params, draw_batch):
    config = tiny(data=MASKED).resolved()
    mesh = sharding.make_mesh(config.mesh, jax.devices()[:1])
    with pytest.raises(ValueError, match=r"add document_starts=lmjax\.data\.document_starts"):
        jax.eval_shape(
            make_scaled_loss(phase_of(config), mesh),
            draw_params(config),
            draw_batch(config),
            None,
            1.0,
        )


def test_gradients_of_learned_positions_are_summed_in_f32(tiny, draw_params, compile_fast):
    """Every token is a document of its own, at position 0: in bf16 the sum would stop at 256."""
    config = tiny("mixed_bf16", "gpt2")
    params = draw_params(config, std=0.3)

    def gradient(rows: int) -> np.ndarray:
        tokens = np.full((rows, 16), END, np.int32)
        starts = document_starts(tokens, END)

        def total(table: jax.Array) -> jax.Array:
            given = params | {"positions": {"table": table}}
            found = logits(given, tokens, starts, config=config)
            return jnp.sum(found[..., 1].astype(jnp.float32))

        return np.asarray(compile_fast(jax.grad(total))(params["positions"]["table"]))

    one, many = gradient(1), gradient(256)
    assert one[0].any()
    assert not many[1:].any()
    np.testing.assert_allclose(many, 256 * one, rtol=0.02, atol=0.02 * np.abs(256 * one).max())
