"""Work in processes of this machine."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from typing import Any, TypeVar

from vlp.lifetime import end_with_parent
from vlp.sendable import sendable

Item = TypeVar("Item")
Done = TypeVar("Done")


class WorkerLost(RuntimeError):
    """A process of the pool ended without an exception of its own."""


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
    with ProcessPoolExecutor(n, context, _begin, (do, n)) as executor:
        waiting = {executor.submit(_do_in_worker, item): item for item in items}
        try:
            for future in as_completed(waiting):
                yield waiting.pop(future), future.result()
        except BrokenProcessPool as error:
            raise WorkerLost(
                "a process ended without a word, most often for want of memory; "
                "call again, with fewer --processes: the shards that are finished stay"
            ) from error
        finally:
            # After an exception what was begun ends, and nothing else begins.
            executor.shutdown(wait=True, cancel_futures=True)


_do: Callable[[Any], Any] | None = None  # of a pool's process


def _begin(do: Callable[[Any], Any], n_processes: int) -> None:
    """Prepare a process: it knows the work, shares the cores, and ends when its parent does, even
    by SIGKILL.
    """
    global _do
    _do = do

    # Read when torch is imported; without it every process would use all cores.
    n_threads = max(1, (os.cpu_count() or 1) // n_processes)
    os.environ.setdefault("OMP_NUM_THREADS", str(n_threads))
    end_with_parent()


def _do_in_worker(item: Any) -> Any:
    assert _do is not None  # the pool's initializer has set it
    return sent_back(_do, item)


def sent_back(do: Callable[[Item], Done], item: Item) -> Done:
    """What `do` returns for an item; its exception in a form that reaches the call's process."""
    try:
        return do(item)
    except Exception as error:
        arriving = sendable(error)
        if arriving is error:
            raise  # with its own cause, which a traceback shows
        raise arriving from None
