"""How the processes of a run first meet: in a store of keys and values, before any of them makes a
communicator.

Here ranks with other versions of packages are refused. Later is too late: NCCL's complaint about
another version names no package and no node, and a run with two versions of torch computes numbers
that no version computes.
"""

from __future__ import annotations

import json
import os
import secrets
import socket
import time
from collections.abc import Sequence
from datetime import timedelta
from importlib.metadata import version
from typing import Any

import torch
import torch.distributed as torch_dist
from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.rendezvous import rendezvous

# Packages whose versions decide numbers; a checkpoint records them, and all ranks have the same.
DECIDING = ("vlp", "torch", "open_clip_torch", "transformers", "accelerate", "numpy")

_MEETING = "vlp/meeting"  # in the store: the token of the first rank
_FAREWELL_S = 2.0  # the first rank may hold the store, from which others still read the verdict
_LOOK_EVERY_S = (0.01, 0.5)  # at first and at most


class LaunchError(RuntimeError):
    """The processes, device or engine obtained are not the ones asked for."""


def meet(timeout: timedelta) -> dict[str, Any]:
    """Wait for the processes that the launcher announced; the arguments by which
    `init_process_group` makes a group of them. Collective.

    Raises LaunchError where the address does not serve, and where packages differ between ranks.
    """
    try:
        store, rank, n_ranks = next(rendezvous("env://", timeout=timeout))
        store.set_timeout(timeout)
        meeting, verdict = _compare_packages(store, rank, n_ranks, timeout.total_seconds())
    except torch_dist.DistError as error:
        raise LaunchError(_unreachable(str(error))) from None

    if verdict is not None:
        if rank == 0:
            time.sleep(_FAREWELL_S)
        raise LaunchError(verdict)

    # torchrun keeps one store for all its restarts: keys of the ranks that went are still there,
    # and a rank would wait for ever for the addresses that they name.
    own_keys = PrefixStore(meeting, store)
    return {"store": own_keys, "rank": rank, "world_size": n_ranks}


def _unreachable(reason: str) -> str:
    """Why there is no store at the address that the launcher gave, and what to do."""
    address, port = os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"]
    if "EADDRINUSE" in reason:
        return (
            f"port {port} of this machine (MASTER_PORT) is taken, perhaps by another run; set "
            "another: accelerate launch --main_process_port, torchrun --master-port, or torchrun "
            "--standalone, which looks for a free one"
        )
    # The first rank's own wait for the others.
    if os.environ["RANK"] == "0":
        return (
            f"WORLD_SIZE announces {os.environ['WORLD_SIZE']} processes, and not all came: "
            f"{reason.splitlines()[0][:200]}; look whether every node has started, each with the "
            "same number of nodes and of processes"
        )
    return (
        f"rank {os.environ['RANK']} on {socket.gethostname()} does not reach the first rank at "
        f"{address}:{port} (MASTER_ADDR, MASTER_PORT): {reason.splitlines()[0][:200]}; look "
        "whether it runs, whether its name resolves on this node, and whether a firewall closes "
        "the port"
    )


def _compare_packages(
    store: Any, rank: int, n_ranks: int, timeout_s: float
) -> tuple[str, str | None]:
    """The token of this meeting, and what differs between its ranks. Collective.

    What an earlier meeting left in the store is told from this one by tokens: the first rank reads
    reports that were written for its own token, and the others believe a verdict that names theirs.
    """
    token = secrets.token_hex(8)
    report = {name: version(name) for name in DECIDING}
    # With its build: a wheel for another CUDA brings another NCCL, under the same version.
    report["torch"] = str(torch.__version__)
    report |= {"host": socket.gethostname(), "token": token}
    if rank:
        return _reported(store, rank, report, timeout_s)

    # One rank compares: n reads in all, instead of n on each of n ranks.
    store.set(_MEETING, token)
    of_others = [json.loads(store.get(f"{token}/{other}")) for other in range(1, n_ranks)]
    reports = [report, *of_others]
    verdict = difference(reports)
    tokens = [each["token"] for each in reports]
    store.set(f"{token}/verdict", json.dumps({"tokens": tokens, "difference": verdict}))
    return token, verdict


def _reported(
    store: Any, rank: int, report: dict[str, str], timeout_s: float
) -> tuple[str, str | None]:
    """Report to the first rank, and wait for its verdict; the token of the meeting, and that."""
    meeting, pause_s = "", _LOOK_EVERY_S[0]
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        # It may still be that of an earlier meeting.
        newest = store.get(_MEETING).decode()
        if newest != meeting:
            meeting = newest
            store.set(f"{meeting}/{rank}", json.dumps(report))

        if store.check([f"{meeting}/verdict"]):
            verdict = json.loads(store.get(f"{meeting}/verdict"))
            if report["token"] in verdict["tokens"]:
                return meeting, verdict["difference"]
        time.sleep(pause_s)
        pause_s = min(2 * pause_s, _LOOK_EVERY_S[1])
    raise torch_dist.DistStoreError(f"no answer within {timeout_s:.0f} s")


def difference(reports: Sequence[dict[str, str]]) -> str | None:
    """What to say of ranks that report other versions; None where all are the same.

    reports: of each rank, in order, its `host`, and the version of each package by name.
    """
    differing = []
    for name in DECIDING:
        if len({report[name] for report in reports}) > 1:
            differing.append(f"{name} is {_by_version(name, reports)}")
    if not differing:
        return None
    return (
        f"ranks of one run have other packages: {'; '.join(differing)}; install the same on every "
        "node, or start all from one image or environment"
    )


def _by_version(name: str, reports: Sequence[dict[str, str]]) -> str:
    """Each version of a package, how many ranks have it, and the first of them with its host."""
    holders: dict[str, list[int]] = {}
    for rank, report in enumerate(reports):
        holders.setdefault(report[name], []).append(rank)

    parts = []
    for release, holding in holders.items():
        first = holding[0]
        where = f"rank {first} on {reports[first]['host']}"
        if len(holding) > 1:
            where = f"{len(holding)} ranks, the first is {where}"
        parts.append(f"{release} ({where})")
    return " and ".join(parts)
