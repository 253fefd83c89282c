"""Processes, of this machine or a cluster, that have done their round of work and wait for the next
one of the call: they have started, imported their libraries and loaded their models.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, NamedTuple

from vlp.lifetime import when_done

# Longer than a tool mostly needs between two rounds; a core that waits is nobody's.
KEPT_S = 30.0


class Kind(NamedTuple):
    """What makes one process as good as another for a round of work."""

    job: str  # of the connection to the cluster, without which they cannot be asked for anything
    size: Any  # cores and GPUs of one, or how many processes there are together
    surroundings: Any  # working directory, environment, stores: what a process takes over once


class Waiting:
    """The processes that wait, at most to the end of the command. `end`: how one is ended."""

    def __init__(self, end: Callable[[Any], None]) -> None:
        self._end = end
        self._lock = threading.Lock()
        self._actors: list[tuple[Kind, Any]] = []
        self._timer: threading.Timer | None = None
        when_done(self.end)

    def add(self, kind: Kind, actor: Any) -> None:
        """Let a process wait. All that wait end KEPT_S after the last one has begun to."""
        with self._lock:
            self._actors.append((kind, actor))
            self._stop_timer()
            self._timer = threading.Timer(KEPT_S, self.end)
            self._timer.daemon = True
            self._timer.start()

    def take(self, kind: Kind, most: int) -> list[Any]:
        """Some that wait, of this kind; those of other kinds end, since they may hold the cores
        that this round needs.
        """
        with self._lock:
            fitting = [actor for its_kind, actor in self._actors if its_kind == kind]
            others = [
                actor
                for its_kind, actor in self._actors
                if its_kind != kind and its_kind.job == kind.job
            ]
            taken = fitting[:most]
            self._actors = [(kind, actor) for actor in fitting[most:]]
        for actor in others:
            self._end(actor)
        return taken

    def end(self) -> None:
        """End all that wait."""
        with self._lock:
            actors, self._actors = self._actors, []
            self._stop_timer()
        for _, actor in actors:
            self._end(actor)

    def forget(self) -> None:
        """Let them be: nobody answers who could end them."""
        with self._lock:
            self._actors = []
            self._stop_timer()

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
