"""Work in processes of this machine, which wait for the next round of the call (`waiting`)."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import signal
import sys
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from copy import deepcopy
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from tempfile import TemporaryDirectory
from typing import Any, TypeVar

from vlp.data import stored, stores
from vlp.data_tools._run.waiting import Kind, Waiting
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

    kind = _kind(n)
    kept = [group for group in _waiting.take(kind, 1) if group.is_whole()]
    group = kept[0] if kept else _Group.of(n)
    with TemporaryDirectory() as folder:
        # A file, so that it is not sent again with each item.
        path = os.path.join(folder, "work.pickle")
        with open(path, "wb") as file:
            pickle.dump(do, file)
        try:
            yield from group.finished(path, items)
        except BaseException:
            # What was begun ends, and nothing else begins.
            group.end()
            raise
    _waiting.add(kind, group)


def _kind(n: int) -> Kind:
    """What processes must be like that have waited."""
    surroundings = (os.getcwd(), dict(os.environ), [*sys.path], deepcopy(stores.options))
    return Kind("", n, surroundings)


@dataclass
class _Group:
    """Processes that take items one after another."""

    executor: ProcessPoolExecutor
    n: int
    begun: Any  # shared (process, number of its item), one after another
    others: set[BaseProcess]  # of this machine's children, older ones

    @classmethod
    def of(cls, n: int) -> _Group:
        """New processes, which begin with the first items."""
        # Started afresh: a fork may hang once torch ran.
        context = multiprocessing.get_context("spawn")
        begun = context.Array("q", 2 * n)
        others = set(multiprocessing.active_children())
        return cls(ProcessPoolExecutor(n, context, _begin, (n, begun)), n, begun, others)

    def finished(self, work: str, items: Sequence[Any]) -> Generator[tuple[Any, Any], None, None]:
        """Each item with what the work in a file returned for it, as soon as it is there."""
        with self.begun.get_lock():
            self.begun[:] = [0] * len(self.begun)
        waiting = {}
        workers = self._workers()
        try:
            for number, item in enumerate(items):
                waiting[self.executor.submit(_do_in_worker, work, number, item)] = item
            # Those that have died are no children any more, and it is of them that one tells.
            workers = workers or self._workers()
            for future in as_completed(waiting):
                yield waiting.pop(future), future.result()
        except BrokenProcessPool as error:
            # Past its lock, which the process may have held.
            raise _lost(workers, items, list(self.begun.get_obj())) from error

    def is_whole(self) -> bool:
        """Whether all its processes live."""
        if len(self._workers()) == self.n:
            return True
        self.end()
        return False

    def end(self) -> None:
        """End the processes, and wait for what they have begun."""
        self.executor.shutdown(wait=True, cancel_futures=True)

    def _workers(self) -> list[BaseProcess]:
        return [child for child in multiprocessing.active_children() if child not in self.others]


_waiting = Waiting(_Group.end)


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


_do: Callable[[Any], Any] | None = None  # of a process, for the work of one round
_work = ""  # the file that it was read from
_begun: Any = None  # as `_Group` says


def _begin(n_processes: int, begun: Any) -> None:
    """Prepare a process: it shares the cores, and ends when its parent does, even by SIGKILL."""
    global _begun
    _begun = begun

    # Read when torch is imported; without it every process would use all cores.
    n_threads = max(1, (os.cpu_count() or 1) // n_processes)
    os.environ.setdefault("OMP_NUM_THREADS", str(n_threads))
    end_with_parent()


def _do_in_worker(work: str, number: int, item: Any) -> Any:
    _note_begun(number)
    return sent_back(_work_in(work), item)


def _work_in(path: str) -> Callable[[Any], Any]:
    """The work in a file, which is read once a round."""
    global _do, _work
    if _do is None or path != _work:
        # Others have written since the round before.
        stored.look_again()
        with open(path, "rb") as file:
            _do = pickle.load(file)
        _work = path
    return _do


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
