"""A claim on a run in an object store: which process trains there.

A store has no locks, so the process that trains keeps an object, `owner.json`, and renews it as
long as it lives. Whoever finds one watches whether it is renewed, and so compares no clocks: if it
is, the newcomer is refused; if it is not for `SILENCE_SECONDS`, its owner is taken for dead. A
process that ends by itself removes its claim.

What this cannot do: a process that hears nothing from the store for that long, while another
machine does, may be taken for dead and is not. It notices when it looks at the claim, which it does
before it writes any checkpoint and again before it seals one, and stops. Between such a look and
the write after it there is no lock: two that write a checkpoint of the same step at the same moment
can leave one that does not match its manifest, and the one before is used then.

Knows stores; nothing of runs.
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


class Claim:
    """The claim of this process. It must be renewed with `beat` every `BEAT_SECONDS`."""

    def __init__(self, store: Store, memory: Path, note: Callable[[str], None]):
        """Claims what is below the URL of a store.

        Args:
          store: where.
          memory: a file of this machine in which the last claim made here is remembered, and which
            no other process uses: that claim is known to be dead.
          note: is told if this has to wait.

        Raises:
          InputError: another process has it.
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
        """Renews it; raises as `confirm`."""
        self.confirm()
        self._beats += 1
        self._store.write(NAME, self._record())

    def confirm(self) -> None:
        """Returns if the claim is still this process's.

        Raises:
          StorageFailed: another process has taken over.
          StoreError: the store does not work.
        """
        found = _read(self._store)
        if not self._is_mine(found):
            raise StorageFailed(
                f"{_words(found)} has taken over {self._store.url}, for nothing was heard from "
                "this process; nothing more is written there"
            )

    def release(self) -> None:
        """Gives it up, if it still is this process's."""
        if self._is_mine(_read(self._store)):
            self._store.remove([NAME])

    def _is_mine(self, owner: dict[str, Any] | None) -> bool:
        return owner is not None and owner.get("token") == self._token

    def _record(self) -> bytes:
        """The beats tell a renewed claim from an old one; the time is for people."""
        record = {
            "token": self._token,
            "process": os.getpid(),
            "machine": platform.node(),
            "beats": self._beats,
            "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        }
        return strict_json.dumps(record).encode()


def _watch(store: Store, found: dict[str, Any], note: Callable[[str], None]) -> None:
    """Returns when a claim has been given up or not been renewed for long enough."""
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
