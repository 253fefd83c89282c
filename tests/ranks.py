"""Run a function on W real processes that talk gloo: `ranks.run(2, function, *args) -> [result of
rank 0, of rank 1]`.

`function(*args)` runs on every rank with `torch.distributed` initialised; it must be importable by
name (a module's top level) and return plain objects (lists, numbers), not tensors. A forkserver
that has torch and the system preloaded starts the ranks in about a tenth of a second after first
use.
"""

from __future__ import annotations

import multiprocessing
import os
import random
import socket
import traceback
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from multiprocessing.connection import wait
from typing import Any

_RANDOM = random.SystemRandom()  # tests seed the other
# Imported once, in the forkserver; what is missing here every rank would import again, for seconds.
PRELOADED = ["torch", "torch.distributed", "vlp.step", "tests.ranks"]


def run(
    n_ranks: int, function: Callable[..., Any], *args: Any, timeout_s: float = 120
) -> list[Any]:
    """Results in rank order; an exception on any rank is raised here as RuntimeError with that
    rank's traceback.
    """
    context = multiprocessing.get_context("forkserver")
    # Read by the forkserver when torch is first imported there.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    context.set_forkserver_preload(PRELOADED)
    port = _free_port()
    pipes = [context.Pipe(duplex=False) for _ in range(n_ranks)]
    processes = [
        context.Process(
            target=_serve, args=(rank, n_ranks, port, timeout_s, pipes[rank][1], function, args)
        )
        for rank in range(n_ranks)
    ]
    for process in processes:
        process.start()
    for _, send in pipes:
        send.close()
    try:
        return _collect([receive for receive, _ in pipes], timeout_s)
    finally:
        for process in processes:
            process.join(timeout=5)
            if process.is_alive():
                process.kill()


def _collect(pipes: list[Any], timeout_s: float) -> list[Any]:
    results: dict[int, Any] = {}
    while len(results) < len(pipes):
        ready = wait([p for i, p in enumerate(pipes) if i not in results], timeout_s)
        if not ready:
            silent = sorted(set(range(len(pipes))) - set(results))
            raise TimeoutError(f"ranks {silent} gave no answer in {timeout_s} s")
        for pipe in ready:
            rank = pipes.index(pipe)
            try:
                ok, results[rank] = pipe.recv()
            except EOFError:
                ok, results[rank] = False, "the process died without a word"
            if not ok:
                raise RuntimeError(f"rank {rank} of {len(pipes)} failed:\n{results[rank]}")
    return [results[rank] for rank in range(len(pipes))]


def _serve(
    rank: int, n_ranks: int, port: int, timeout_s: float, pipe: Any, function: Any, args: tuple
) -> None:
    import torch
    import torch.distributed as torch_dist

    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(n_ranks)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    try:
        torch.set_num_threads(1)
        torch_dist.init_process_group(
            "gloo",
            rank=rank,
            world_size=n_ranks,
            init_method=f"tcp://127.0.0.1:{port}",
            timeout=timedelta(seconds=timeout_s),
        )
        result = function(*args)
        leave()
        pipe.send((True, result))
    except BaseException:
        pipe.send((False, traceback.format_exc()))
    finally:
        pipe.close()


def leave() -> None:
    """Leave the process group, when no neighbour talks or connects any more: one that still does
    would fail. Collective.
    """
    import torch.distributed as torch_dist

    torch_dist.barrier()
    torch_dist.destroy_process_group()


def _free_port() -> int:
    """A port below those that the system gives away by itself: a connection of another test could
    get one of these before a rank listens there.
    """
    while True:
        port = _RANDOM.randrange(15_000, 32_000)
        with suppress(OSError), socket.socket() as probe:
            probe.bind(("127.0.0.1", port))
            return port
