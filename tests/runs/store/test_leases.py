"""Only one machine trains in a store."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable

import pytest
from store_helpers import URL, Machine, checkpoint, sealed, until

from lmjax.errors import StorageFailed
from lmjax.runs.store import lease as leases
from lmjax.runs.store import remote
from lmjax.runs.store.object_store import Store
from lmjax.train import InputError


def test_a_second_machine_is_refused_while_the_first_trains(
    machine: Callable[[], Machine],
) -> None:
    here, there = machine(), machine()
    with here.training() as (workdir, mirror):
        with pytest.raises(InputError, match="is training in memory://bucket/run"):
            there.starts(10)
        checkpoint(workdir, 10)
        mirror([10])
    assert leases.NAME not in Store(URL).names()
    there.starts(20)
    assert sealed() == [10, 20]


@pytest.fixture
def killed(machine: Callable[[], Machine], monkeypatch: pytest.MonkeyPatch) -> Machine:
    """A machine whose process ended without another word, after a checkpoint."""
    here = machine()
    with contextlib.suppress(KeyboardInterrupt), here.training() as (workdir, mirror):
        checkpoint(workdir, 10)
        mirror([10])
        raise KeyboardInterrupt
    assert leases.NAME in Store(URL).names()
    return here


def test_the_lease_of_a_dead_process_lasts_for_a_while(
    killed: Machine, machine: Callable[[], Machine]
) -> None:
    there = machine()
    there.starts(20)
    assert "waiting for up to" in there.said[0]
    assert sealed() == [10, 20]


def test_the_same_machine_need_not_wait(killed: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(leases, "SILENCE_SECONDS", 20.0)
    killed.starts(20)
    assert not any("waiting" in line for line in killed.said)


def taken_over(machine: Machine) -> bool:
    """Whether it has said that another one trains in its place."""
    return any("has taken over" in line for line in machine.said)


def test_who_was_taken_for_dead_writes_no_more(
    machine: Callable[[], Machine], monkeypatch: pytest.MonkeyPatch
) -> None:
    here, there = machine(), machine()
    beat = leases.Lease.beat
    with contextlib.suppress(StorageFailed), here.training() as (copy, mirror):
        monkeypatch.setattr(leases.Lease, "beat", lambda self: None)
        time.sleep(0.1)  # a beat may be on its way
        with there.training() as (workdir, other):
            monkeypatch.setattr(leases.Lease, "beat", beat)
            checkpoint(copy, 15)
            with pytest.raises(StorageFailed, match="has taken over"):
                mirror([15])
            checkpoint(workdir, 20)
            other([20])
            end = time.monotonic() + 20  # the heart of a busy machine may be slow
            while not taken_over(here) and time.monotonic() < end:
                time.sleep(0.05)
    assert taken_over(here)
    assert sealed() == [20]


def test_of_two_at_the_same_moment_one_is_refused(
    machine: Callable[[], Machine], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before it writes its own lease, the second sees none of the first."""
    read = leases._read
    with machine().training():
        seen = iter([lambda store: None])
        monkeypatch.setattr(leases, "_read", lambda store: next(seen, read)(store))
        with pytest.raises(InputError, match="is training in memory://bucket/run; stop"):
            machine().starts(10)
    assert sealed() == []


def test_a_failing_heartbeat_is_reported_once(
    machine: Callable[[], Machine], monkeypatch: pytest.MonkeyPatch
) -> None:
    here = machine()
    beats: list[None] = []

    def fail(self: leases.Lease) -> None:
        beats.append(None)
        raise remote.StoreError("no route to host")

    monkeypatch.setattr(leases.Lease, "beat", fail)
    with here.training():
        until(lambda: len(beats) > 3)
    assert here.said.count("warning: no route to host") == 1
