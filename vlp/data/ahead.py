"""Fetching ahead of use: a few threads, and files that wait for one of them."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable
from typing import Any


class Ahead:
    """Calls `fetch` for addresses that are asked for, at most `n_threads` at once, in their order.

    What fails is left to whoever reads the file, who tries again. Threads are daemons: one that
    waits for a stalled server does not keep its process alive. Other processes get an idle one.
    """

    def __init__(self, fetch: Callable[[str], Any], n_threads: int) -> None:
        self.fetch = fetch
        self.n_threads = n_threads
        self._lock = threading.Lock()
        self._waiting: dict[str, None] = {}  # in the order of asking
        self._running: set[str] = set()
        self._n_at_work = 0

    def __reduce__(self) -> tuple[type, tuple[Any, ...]]:
        return Ahead, (self.fetch, self.n_threads)

    def ask(self, url: str) -> None:
        """Fetch `url` in the background, unless it is being fetched or waits for it."""
        with self._lock:
            if url in self._waiting or url in self._running:
                return
            self._waiting[url] = None
            if self._n_at_work == self.n_threads:
                return
            self._n_at_work += 1
        threading.Thread(target=self._work, name="fetch", daemon=True).start()

    def _work(self) -> None:
        """Fetch until nothing waits."""
        while True:
            with self._lock:
                if not self._waiting:
                    self._n_at_work -= 1
                    return
                url = next(iter(self._waiting))
                del self._waiting[url]
                self._running.add(url)

            with contextlib.suppress(Exception):
                self.fetch(url)
            with self._lock:
                self._running.discard(url)
