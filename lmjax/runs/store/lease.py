"""A lease on a run in an object store: it says which process trains there.

A store has no locks, so the training process keeps an object, `owner.json`, and renews it while it
lives. A newcomer that finds one watches whether it is renewed, which needs no synchronized clocks:
if it is, the newcomer is rejected; if not for `SILENCE_SECONDS`, the owner counts as dead. A normal
exit removes the lease.

Limits: a live process that cannot reach the store for that long, while another machine can, may
count as dead. It notices when it next checks the lease, which it does before it writes a checkpoint
and again before it seals one, and stops. Nothing locks the time between a check and the write after
it: two processes that write a checkpoint of the same step at once can leave one that does not match
its manifest, and the previous one is used then.

Knows stores, not runs.
"""

from __future__ import annotations

import os
import platform
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lmjax import strict_json
from lmjax.errors import InputError, StorageFailed
from lmjax.runs.store.object_store import Store

NAME = "owner.json"
BEAT_SECONDS = 15.0
SILENCE_SECONDS = 60.0
LOOK_SECONDS = 1.0


class Lease:
    """The lease of this process. Renew it with `beat` every `BEAT_SECONDS`."""

    def __init__(self, store: Store, memory: Path, note: Callable[[str], None]):
        """Acquires the lease of everything below the URL of a store.

        Args:
          store: where.
          memory: a local file, used by no other process, that remembers the last lease acquired
            here; that lease is known to be dead.
          note: receives a line if this has to wait.

        Raises:
          InputError: another process holds the lease.
          StoreError: the store does not work.
        """
        self._store = store
        self._beats = 0
        self._token = uuid.uuid4().hex
        found = _read(store)
        if found is not None:
            remembered = memory.read_text(encoding="utf-8") if memory.exists() else ""
            if found.get("token") != remembered:
                _watch(store, found, note)
            store.remove([NAME])
        memory.write_text(self._token, encoding="utf-8")
        if not store.create(NAME, self._record()) and not self._is_mine(owner := _read(store)):
            raise InputError(_refusal(store, owner))

    def beat(self) -> None:
        """Renews the lease; raises as `confirm`."""
        self.confirm()
        self._beats += 1
        self._store.write(NAME, self._record())

    def confirm(self) -> None:
        """Checks that this process still holds the lease.

        Raises:
          StorageFailed: another process has taken over.
          StoreError: the store does not work.
        """
        found = _read(self._store)
        if not self._is_mine(found):
            raise StorageFailed(
                f"{_words(found)} has taken over {self._store.url}, because nothing was heard from "
                "this process; nothing more is written there"
            )

    def release(self) -> None:
        """Releases the lease if this process still holds it."""
        if self._is_mine(_read(self._store)):
            self._store.remove([NAME])

    def _is_mine(self, owner: dict[str, Any] | None) -> bool:
        return owner is not None and owner.get("token") == self._token

    def _record(self) -> bytes:
        """The beats distinguish a renewed lease from an old one; the time is informational."""
        record = {
            "token": self._token,
            "process": os.getpid(),
            "machine": platform.node(),
            "beats": self._beats,
            "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        }
        return strict_json.dumps(record).encode()


def _watch(store: Store, found: dict[str, Any], note: Callable[[str], None]) -> None:
    """Waits until a lease is released or has not been renewed for long enough."""
    note(
        f"{_words(found)} was training in {store.url}, last at {found.get('time')}; waiting for up "
        f"to {SILENCE_SECONDS:.0f} s to see whether it still is"
    )
    end = time.monotonic() + SILENCE_SECONDS
    while time.monotonic() < end:
        time.sleep(LOOK_SECONDS)
        now = _read(store)
        if now is None:
            return
        if now != found:
            raise InputError(_refusal(store, now))


def _refusal(store: Store, owner: dict[str, Any] | None) -> str:
    return (
        f"{_words(owner)} is training in {store.url}; stop that one or wait for it, or choose "
        "another --workdir"
    )


def _read(store: Store) -> dict[str, Any] | None:
    content = store.read(NAME)
    if content is None:
        return None
    try:
        record = strict_json.loads(content)
    except ValueError:
        record = None
    return record if isinstance(record, dict) else {}


def _words(owner: dict[str, Any] | None) -> str:
    if not owner:
        return "another process"
    return f"process {owner.get('process')} on {owner.get('machine')}"
