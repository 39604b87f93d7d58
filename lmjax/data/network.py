"""Checks for a network before TFDS does, which would retry for minutes without one.

Imports the room's errors.
"""

from __future__ import annotations

import queue
import threading
import urllib.error
import urllib.request
from collections.abc import Iterable
from urllib.parse import urlsplit

from lmjax.data.errors import DataError

SECONDS = 10.0
"""Time limit for all hosts together."""
_MOST_HOSTS = 4


def refuse_unreachable(name: str, urls: Iterable[str]) -> None:
    """Raises `DataError` if no host of a dataset's files answers; proxies are used as usual.

    Args:
      name: of the dataset.
      urls: what will be downloaded; if empty, nothing is checked.
    """
    by_host = {urlsplit(url).netloc: url for url in urls}
    asked = dict(list(by_host.items())[:_MOST_HOSTS])
    answers: queue.SimpleQueue[str | None] = queue.SimpleQueue()
    for url in asked.values():
        # Name lookup has no time limit, so it is abandoned when the time is up.
        threading.Thread(target=_ask, args=(url, answers), daemon=True).start()
    reasons = []
    try:
        for _ in asked:
            reason = answers.get(timeout=SECONDS)
            if reason is None:
                return
            reasons.append(reason)
    except queue.Empty:
        reasons.append(f"no answer in {SECONDS:.0f} s")
    if asked:
        raise DataError(
            f"tfds:{name} is downloaded from {', '.join(asked)}, which cannot be reached "
            f"({reasons[0]}): check the network, or prepare it elsewhere and copy the folder"
        )


def _ask(url: str, answers: queue.SimpleQueue[str | None]) -> None:
    """Puts None if anything answers, else the reason."""
    try:
        urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=SECONDS).close()
    except urllib.error.HTTPError:
        answers.put(None)  # an HTTP error is an answer
    except Exception as error:
        answers.put(" ".join(str(getattr(error, "reason", error)).split()))
    else:
        answers.put(None)
