"""Work in processes on a Ray cluster.

A process is an actor. It is sent the work once and given one item after another, as a process of
this machine is (`local`), so that a model is loaded once a process. It has one core and, where the
work runs a model and the cluster has GPUs, one GPU. More processes are asked for than there is room
for, so that a cluster that scales grows. An item whose process is lost, with its node or alone,
goes to another process, which begins it anew (`tries`). At the end of a round processes wait for
the next (`waiting`), which sends them other work.
"""

from __future__ import annotations

import pickle
import socket
import time
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from contextlib import suppress
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from vlp import log
from vlp.data import stored, stores
from vlp.data_tools._run import cluster, nodes
from vlp.data_tools._run.local import WorkerLost, sent_back
from vlp.data_tools._run.nodes import ClusterError
from vlp.data_tools._run.progress import say
from vlp.data_tools._run.tries import TRIES, Task
from vlp.data_tools._run.waiting import Kind, Waiting

Item = TypeVar("Item")
Done = TypeVar("Done")

_SPARE = 4  # processes that are asked for beyond those that work, at least
_NOTICE_S = 30  # without a process that works, until that is said
_AGAIN_S = 60  # until it is said again
_END_S = 20  # for processes to be gone


def finished(
    do: Callable[[Item], Done], items: Sequence[Item], most: int | None, device: str | None
) -> Generator[tuple[Item, Done], None, None]:
    """Each item with what `do` returned for it, as soon as it is there.

    most: processes at the same time; None: as many as there is room for. device: of the model that
    `do` runs; None: none. Raises the exception of `do`, WorkerLost, and ClusterError for a node
    that does not see the files.
    """
    # Nothing is started for nothing.
    if not items:
        return

    ray = cluster.import_ray()
    on_gpu = device in ("auto", "cuda") and cluster.has_gpus()
    if device == "auto" and not on_gpu:
        log.warn("no node of the cluster has a GPU; what would run on one runs on CPUs")
    paths: list[Path] = []
    # One by one: all captions of a pack, as bytes, would take its memory twice.
    for item in items:
        paths += nodes.pickled(item)[1]
    work, paths_of_work = nodes.pickled(do)
    with nodes.call([*paths, *paths_of_work]) as call:
        options = {"num_cpus": 1, "num_gpus": int(on_gpu), "scheduling_strategy": "SPREAD"}
        workers = _Workers(ray, call, ray.put(work), options, most or len(items))
        try:
            yield from workers.results(deque(Task(item) for item in items))
        except cluster.HeadLost:
            # Nothing that is asked of the cluster would be answered, and Ray is about to end this.
            _waiting.forget()
            raise
        except BaseException:
            workers.end()
            _waiting.end()
            raise
        workers.wait_for_next()


def _end(actor: Any) -> None:
    ray = cluster.import_ray()
    with suppress(ray.exceptions.RayError):
        ray.kill(actor)


_waiting = Waiting(_end)


class Worker:
    """A process on a node."""

    def __init__(self) -> None:
        self.do: Callable[[Any], Any] | None = None

    def prepare(self, call: nodes.Call, work: bytes) -> tuple[str, str]:
        """Take over the call; returns this node's id, and what the node lacks, in words."""
        name = f"node {socket.gethostname()}"
        # A node may have come since the call began.
        nodes.refuse_differing(call.versions, {name: nodes.versions()})
        # It may have worked for an earlier round, since which others have written.
        stored.look_again()
        call.adopt()
        node: str = cluster.import_ray().get_runtime_context().get_node_id()
        missing = call.missing()
        if missing:
            return node, f"{name} {missing}"

        self.do = pickle.loads(work)
        return node, ""

    def work(self, item: Any) -> Any:
        """Do one item."""
        assert self.do is not None  # `prepare` has returned
        return sent_back(self.do, item)


@dataclass
class _Workers:
    """The processes of one run, and what each is doing."""

    ray: Any
    call: nodes.Call
    work: Any  # a reference to its bytes
    options: dict[str, Any]
    most: int  # processes at the same time
    preparing: dict[Future[Any], Any] = field(default_factory=dict)  # to its actor
    working: dict[Future[Any], tuple[Any, Task]] = field(default_factory=dict)
    kept: set[Any] = field(default_factory=set)  # those of `preparing` that had waited
    node_of: dict[Any, str] = field(default_factory=dict)  # by actor, once it has said
    n_lost_starts: int = 0  # since one has succeeded, or a node was lost
    lost_nodes: set[str] = field(default_factory=set)  # of the cluster, when it last looked

    @property
    def kind(self) -> Kind:
        """What a process must be like that has waited."""
        surroundings = (
            self.call.folder,
            self.call.environment,
            self.call.import_path,
            stores.options,
        )
        job = self.ray.get_runtime_context().get_job_id()
        return Kind(job, self.options, deepcopy(surroundings))

    def results(self, waiting: deque[Task]) -> Iterator[tuple[Any, Any]]:
        """The items with what became of them; `waiting`: all of them."""
        head = cluster.Head(self.ray)
        self.lost_nodes = cluster.nodes_of(self.ray, alive=False)
        to_say_at = time.monotonic() + _NOTICE_S
        while waiting or self.working:
            head.check()
            self._ask_for_more(len(waiting))
            futures = [*self.preparing, *self.working]
            ended, _ = wait(futures, cluster.LOOK_S, FIRST_COMPLETED)
            # A start that has ended is no work: all may be lost, one after another.
            if self.working:
                to_say_at = time.monotonic() + _NOTICE_S
            elif time.monotonic() > to_say_at and head.answers:
                to_say_at = time.monotonic() + _AGAIN_S
                say(self._what_is_waited_for(len(waiting)))

            for future in ended:
                if future in self.preparing:
                    self._begin(future, waiting)
                    continue
                actor, task = self.working.pop(future)
                if self._is_lost(future):
                    # It may be out of reach for a moment only.
                    _end(actor)
                    task.lost_at.append(self.node_of.pop(actor))
                    self._put_back(task, waiting)
                else:
                    self._give(actor, waiting)
                    yield task.item, future.result()

    def end(self) -> None:
        """End all processes, and wait until nothing writes any more."""
        for actor in self.preparing.values():
            _end(actor)
        for actor, _ in self.working.values():
            _end(actor)
        wait(self.working, _END_S)

    def wait_for_next(self) -> None:
        """Let those wait that have started, or are about to, when all items are done."""
        for actor in self.preparing.values():
            _waiting.add(self.kind, actor)

    def _ask_for_more(self, n_waiting: int) -> None:
        """Start processes, some more than there is room for: that is what a cluster grows by."""
        n_working = len(self.working)
        wanted = min(n_waiting, self.most - n_working, max(_SPARE, n_working))
        n_more = wanted - len(self.preparing)
        if n_more <= 0:
            return

        kept = _waiting.take(self.kind, n_more)
        self.kept.update(kept)
        new = [
            self.ray.remote(Worker).options(**self.options).remote()
            for _ in range(n_more - len(kept))
        ]
        for actor in [*kept, *new]:
            self.preparing[actor.prepare.remote(self.call, self.work).future()] = actor

    def _begin(self, future: Future[Any], waiting: deque[Task]) -> None:
        """Let a process that has started have its first item."""
        actor = self.preparing.pop(future)
        if self._is_lost(future):
            # One that had waited says nothing of those that start now.
            if actor in self.kept:
                return
            self.n_lost_starts += 1
            limit = TRIES * max(_SPARE, len(self.preparing))
            if self.n_lost_starts > limit and not self._has_lost_nodes():
                raise WorkerLost(
                    "no process stays alive on the cluster, most often for want of memory; its "
                    "logs (/tmp/ray/session_latest/logs on each node) say why. One without tokens "
                    "wants RAY_AUTH_MODE=disabled here, too. The shards that are finished stay"
                )
            return

        self.n_lost_starts = 0
        self.node_of[actor], lacking = future.result()
        if lacking:
            raise ClusterError(
                f"{lacking}, which this machine does; use a folder that all nodes share "
                "under one name, or addresses such as s3://…"
            )
        self._give(actor, waiting)

    def _has_lost_nodes(self) -> bool:
        """Whether nodes went since it last looked, or since the round began: starts that are lost
        with them say nothing, and are counted anew.
        """
        lost = cluster.nodes_of(self.ray, alive=False)
        has_more = not lost <= self.lost_nodes
        self.lost_nodes = lost
        if has_more:
            self.n_lost_starts = 0
        return has_more

    def _what_is_waited_for(self, n_waiting: int) -> str:
        """What to say while no process works."""
        wanted = "a core and a GPU" if self.options["num_gpus"] else "a core"
        n_living = len(cluster.nodes_of(self.ray, alive=True))
        n_lost = len(cluster.nodes_of(self.ray, alive=False) - self.lost_nodes)
        return (
            f"the cluster has no room for a process yet: {n_waiting:,} tasks wait for a node with "
            f"{wanted} to spare (nodes now: {n_living}, lost meanwhile: {n_lost}); ray status "
            "tells who uses them"
        )

    def _give(self, actor: Any, waiting: deque[Task]) -> None:
        """Let a process do the next item, or wait for the next round."""
        if not waiting:
            _waiting.add(self.kind, actor)
            return
        task = waiting.popleft()
        self.working[actor.work.remote(task.item).future()] = (actor, task)

    def _put_back(self, task: Task, waiting: deque[Task]) -> None:
        """Let an item whose process was lost be the next."""
        if task.may_be_hopeless():
            reason = task.why_hopeless(cluster.nodes_of(self.ray, alive=True))
            if reason:
                raise WorkerLost(reason, task.item)
        say("a process was lost, with its node or alone; its shard begins anew")
        waiting.appendleft(task)

    def _is_lost(self, future: Future[Any]) -> bool:
        """Whether the process is gone; raises the exception that the work has raised."""
        error = future.exception()
        exceptions = self.ray.exceptions
        if error is None:
            return False
        if isinstance(error, exceptions.RayTaskError):
            cause: BaseException = error.cause
            # For who looks for a bug; messages do not show it.
            cause.add_note(str(error))
            raise cause from None
        # It tells by many names that a process is gone: of its node, of memory, of an object.
        if isinstance(error, exceptions.RayError):
            return True
        raise error
