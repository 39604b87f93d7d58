"""What a batch holds, in which order, on any number of hosts. Token i of the corpora here is i."""

from __future__ import annotations

import json

import numpy as np
import pytest

from lmjax.data import DataError, train_iterator, validation_batches


def first_tokens(iterator, batches):
    return [tuple(next(iterator)["inputs"][:, 0].tolist()) for _ in range(batches)]


def test_an_epoch_holds_every_window_once(corpus):
    iterator = train_iterator(corpus(101), length=5, batch_size=4, seed=0)
    starts = np.concatenate(first_tokens(iterator, 10))
    for epoch in (starts[:20], starts[20:]):
        assert sorted(epoch.tolist()) == list(range(0, 100, 5))


def test_a_batch_that_ends_an_epoch_begins_the_next(corpus):
    """20 windows in batches of 8: the third batch has four of each epoch, and none is dropped."""
    iterator = train_iterator(corpus(101), length=5, batch_size=8, seed=0)
    starts = np.concatenate(first_tokens(iterator, 5))
    assert sorted(starts[:20].tolist()) == sorted(starts[20:].tolist()) == list(range(0, 100, 5))


def test_tokens_past_the_last_whole_window_are_left_out(corpus):
    batch = next(train_iterator(corpus(14), length=4, batch_size=3, seed=0))
    assert batch["targets"].max() == 12


def test_targets_are_the_next_tokens(corpus):
    batch = next(train_iterator(corpus(101), length=5, batch_size=4, seed=0))
    for rows in batch.values():
        assert rows.shape == (4, 5)
        assert rows.dtype == np.int32
    np.testing.assert_array_equal(batch["targets"], batch["inputs"] + 1)
    np.testing.assert_array_equal(batch["inputs"][:, 1:], batch["targets"][:, :-1])


def test_the_seed_decides_the_order(corpus):
    def order(seed):
        return first_tokens(train_iterator(corpus(401), length=5, batch_size=4, seed=seed), 40)

    assert order(0) == order(0)
    assert order(0) != order(1)
    # Neighbouring seeds must not be the same sequence of epochs, one epoch apart.
    assert order(0)[20:] != order(1)[:20]


def test_the_whole_seed_decides_the_order(corpus):
    def order(seed):
        return first_tokens(train_iterator(corpus(401), length=5, batch_size=4, seed=seed), 20)

    seeds = (1, 2**32 + 1, 2**33 + 1, 2**63 + 1, 2**64 - 1)
    assert len({tuple(order(seed)) for seed in seeds}) == len(seeds)


def test_each_epoch_is_shuffled_afresh(corpus):
    order = first_tokens(train_iterator(corpus(401), length=5, batch_size=4, seed=0), 40)
    assert order[:20] != order[20:]
    assert sum(order[:20], ()) != tuple(range(0, 400, 5))


def test_a_restored_iterator_continues_exactly(corpus):
    iterator = train_iterator(corpus(101), length=5, batch_size=3, seed=7)
    first_tokens(iterator, 9)
    state = json.loads(json.dumps(iterator.get_state()))
    expected = first_tokens(iterator, 20)

    fresh = train_iterator(corpus(101), length=5, batch_size=3, seed=7)
    fresh.set_state(state)
    assert first_tokens(fresh, 20) == expected


@pytest.mark.parametrize("hosts", [2, 4])
def test_hosts_share_the_same_global_batches(corpus, hosts):
    def iterator(**host):
        return train_iterator(corpus(101), length=5, batch_size=8, seed=3, **host)

    alone = iterator()
    shares = [iterator(process_index=host, process_count=hosts) for host in range(hosts)]
    for _ in range(7):
        whole = next(alone)
        parts = [next(share) for share in shares]
        for name, rows in whole.items():
            np.testing.assert_array_equal(np.concatenate([part[name] for part in parts]), rows)
    assert all(share.get_state() == alone.get_state() for share in shares)


def test_a_run_resumes_on_another_number_of_hosts(corpus):
    alone = train_iterator(corpus(101), length=5, batch_size=8, seed=3)
    first_tokens(alone, 4)
    second_of_two = train_iterator(
        corpus(101), length=5, batch_size=8, seed=3, process_index=1, process_count=2
    )
    second_of_two.set_state(alone.get_state())
    np.testing.assert_array_equal(next(second_of_two)["inputs"], next(alone)["inputs"][4:])


def test_a_batch_that_hosts_cannot_share_is_refused(corpus):
    for batches in (train_iterator, validation_batches):
        arguments = {"length": 5, "batch_size": 6, "process_count": 4}
        if batches is train_iterator:
            arguments["seed"] = 0
        with pytest.raises(DataError, match="6 does not divide among 4 hosts"):
            batches(corpus(101), **arguments)


def test_a_split_without_a_window_is_refused(corpus):
    with pytest.raises(DataError, match="5 tokens, fewer than one window of 6"):
        train_iterator(corpus(5), length=5, batch_size=1, seed=0)


@pytest.mark.parametrize("tokens", [2, 5, 6, 21, 22, 40, 41, 42])
def test_validation_predicts_every_token_but_the_first_once_in_order(corpus, tokens):
    """Splits that end just before, at and just after a window and a batch (4 rows of 5)."""
    predicted = []
    for batch in validation_batches(corpus(9, tokens), length=5, batch_size=4):
        assert {name: rows.shape for name, rows in batch.items()} == dict.fromkeys(
            ("inputs", "targets", "weights"), (4, 5)
        )
        assert batch["weights"].dtype == np.float32
        real = batch["weights"] == 1.0
        np.testing.assert_array_equal(batch["weights"][~real], 0.0)
        np.testing.assert_array_equal(batch["targets"][real], batch["inputs"][real] + 1)
        predicted += batch["targets"][real].tolist()
    assert predicted == list(range(1, tokens))


def test_a_limited_validation_spreads_over_the_split(corpus):
    batches = list(validation_batches(corpus(9, 1001), length=5, batch_size=4, max_batches=2))
    starts = np.concatenate([batch["inputs"][:, 0] for batch in batches])
    assert starts.tolist() == [0, 125, 250, 375, 500, 625, 750, 875]


def test_a_limit_beyond_the_split_changes_nothing(corpus):
    limited, whole = (
        list(validation_batches(corpus(9, 42), length=5, batch_size=4, max_batches=limit))
        for limit in (100, 0)
    )
    assert len(limited) == len(whole) == 3
    for one, other in zip(limited, whole, strict=True):
        for name, rows in one.items():
            np.testing.assert_array_equal(rows, other[name])


@pytest.mark.parametrize("limit", [0, 2])
def test_batches_are_filled_up_to_a_multiple_with_copies_that_do_not_count(corpus, limit):
    plain, padded = (
        list(
            validation_batches(
                corpus(9, 42), length=5, batch_size=3, max_batches=limit, multiple=multiple
            )
        )
        for multiple in (1, 8)
    )
    assert len(plain) == len(padded) == (limit or 3)
    for one, other in zip(plain, padded, strict=True):
        for name, rows in one.items():
            assert other[name].shape == (8, 5)
            np.testing.assert_array_equal(other[name][:3], rows)
        np.testing.assert_array_equal(other["weights"][3:], 0)
        np.testing.assert_array_equal(other["inputs"][3:], np.tile(one["inputs"][:1], (5, 1)))


def test_hosts_share_padded_batches(corpus):
    def batches(**host):
        split = corpus(9, 42)
        return list(validation_batches(split, length=5, batch_size=3, multiple=8, **host))

    shares = [batches(process_index=host, process_count=4) for host in range(4)]
    for whole, *parts in zip(batches(), *shares, strict=True):
        for name, rows in whole.items():
            np.testing.assert_array_equal(np.concatenate([part[name] for part in parts]), rows)


def test_hosts_share_the_same_validation_batches(corpus):
    def batches(**host):
        return list(validation_batches(corpus(9, 42), length=5, batch_size=4, **host))

    shares = [batches(process_index=host, process_count=2) for host in range(2)]
    for whole, *parts in zip(batches(), *shares, strict=True):
        for name, rows in whole.items():
            np.testing.assert_array_equal(np.concatenate([part[name] for part in parts]), rows)


@pytest.mark.parametrize("hosts", [1, 2])
def test_a_document_mask_says_where_documents_start(corpus, hosts):
    """Token 255 ends a document; the next one starts with it, in the window that reads it."""
    starts, ends = {}, 0
    for host in range(hosts):
        iterator = train_iterator(
            corpus(401), length=8, batch_size=10, seed=0, document_mask=True,
            process_index=host, process_count=hosts,
        )  # fmt: skip
        for _ in range(5):
            batch = next(iterator)
            assert batch["document_starts"].dtype == np.int32
            for first, row in zip(batch["inputs"][:, 0], batch["document_starts"], strict=True):
                starts[int(first)] = row.tolist()
                ends += 255 in range(first, first + 8)
    assert len(starts) == 50
    assert ends == 1
    assert starts.pop(248) == [0, 0, 0, 0, 0, 0, 0, 7]
    assert all(row == [0] * 8 for row in starts.values())


def test_validation_batches_say_where_documents_start(corpus):
    batches = validation_batches(corpus(9, 300), length=10, batch_size=4, document_mask=True)
    starts = np.concatenate([batch["document_starts"] for batch in batches])
    assert starts[25].tolist() == [0] * 5 + [5] * 5
    assert not np.delete(starts, 25, axis=0).any()
