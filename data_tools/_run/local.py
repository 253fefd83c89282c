"""Work in processes of this machine."""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.process import BaseProcess
from typing import Any, TypeVar

from vlp.lifetime import end_with_parent
from vlp.sendable import sendable

Item = TypeVar("Item")
Done = TypeVar("Done")


class WorkerLost(RuntimeError):
    """A process of the pool ended without an exception of its own. `item`: what it was at, where
    that is known.
    """

    def __init__(self, message: str, item: Any = None) -> None:
        super().__init__(message)
        self.item = item


def finished(
    do: Callable[[Item], Done], items: Sequence[Item], processes: int
) -> Generator[tuple[Item, Done], None, None]:
    """Each item with what `do` returned for it, as soon as it is there; `do` is sent to each
    process once. Raises its exception, or WorkerLost.
    """
    n = min(processes, len(items))
    if n <= 1:
        for item in items:
            yield item, do(item)
        return

    # Processes are started afresh: a fork may hang once torch ran.
    context = multiprocessing.get_context("spawn")
    begun = context.Array("q", 2 * n)
    others = set(multiprocessing.active_children())
    with ProcessPoolExecutor(n, context, _begin, (do, n, begun)) as executor:
        waiting = {}
        for number, item in enumerate(items):
            waiting[executor.submit(_do_in_worker, number, item)] = item
        workers = [child for child in multiprocessing.active_children() if child not in others]
        try:
            for future in as_completed(waiting):
                yield waiting.pop(future), future.result()
        except BrokenProcessPool as error:
            # Past its lock, which the process may have held.
            raise _lost(workers, items, list(begun.get_obj())) from error
        finally:
            # After an exception what was begun ends, and nothing else begins.
            executor.shutdown(wait=True, cancel_futures=True)


def _lost(workers: Sequence[BaseProcess], items: Sequence[Any], begun: list[Any]) -> WorkerLost:
    """What to say of the process that ended first: the pool ends the others by SIGTERM."""
    ended = [worker for worker in workers if worker.exitcode not in (None, 0, -signal.SIGTERM)]
    reason, item = "most often for want of memory", None
    if ended:
        reason = _reason(ended[0].exitcode or 0)
        # (process, number of its item) for each that has begun one.
        at = dict(zip(begun[::2], begun[1::2]))
        item = items[at[ended[0].pid or 0]] if ended[0].pid in at else None
    return WorkerLost(
        f"a process ended without a word ({reason}); call again, with fewer --processes: "
        "what is finished stays",
        item,
    )


def _reason(exitcode: int) -> str:
    """Why a process ended, in words; a negative exit code is a signal."""
    if exitcode == -signal.SIGKILL:
        return "SIGKILL, most often for want of memory"
    if exitcode < 0:
        name = signal.Signals(-exitcode).name
        return f"{name}: a library failed at what it read"
    return f"exit code {exitcode}"


_do: Callable[[Any], Any] | None = None  # of a pool's process
_begun: Any = None  # the pool's shared (process, number of its item), one after another


def _begin(do: Callable[[Any], Any], n_processes: int, begun: Any) -> None:
    """Prepare a process: it knows the work, shares the cores, and ends when its parent does, even
    by SIGKILL.
    """
    global _do, _begun
    _do, _begun = do, begun

    # Read when torch is imported; without it every process would use all cores.
    n_threads = max(1, (os.cpu_count() or 1) // n_processes)
    os.environ.setdefault("OMP_NUM_THREADS", str(n_threads))
    end_with_parent()


def _do_in_worker(number: int, item: Any) -> Any:
    assert _do is not None  # the pool's initializer has set it
    _note_begun(number)
    return sent_back(_do, item)


def _note_begun(number: int) -> None:
    """Leave word of what this process is at, for a message if it ends there."""
    pid = os.getpid()
    with _begun.get_lock():
        pids = _begun[::2]
        # Its own place, else the first that is free.
        place = 2 * pids.index(pid if pid in pids else 0)
        _begun[place : place + 2] = [pid, number]


def sent_back(do: Callable[[Item], Done], item: Item) -> Done:
    """What `do` returns for an item; its exception in a form that reaches the call's process."""
    try:
        return do(item)
    except Exception as error:
        arriving = sendable(error)
        if arriving is error:
            raise  # with its own cause, which a traceback shows
        raise arriving from None
