"""How the processes of a run first meet: in a store of keys and values, before any of them makes a
communicator.

Here ranks with other versions of packages are refused. Later is too late: NCCL's complaint about
another version names no package and no node, and a run with two versions of torch computes numbers
that no version computes.
"""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Sequence
from datetime import timedelta
from importlib.metadata import version
from typing import Any

import torch
import torch.distributed as torch_dist
from torch.distributed.rendezvous import rendezvous

# Packages whose versions decide numbers; a checkpoint records them, and all ranks have the same.
DECIDING = ("vlp", "torch", "open_clip_torch", "transformers", "accelerate", "numpy")

_REPORT = "vlp/packages/{rank}"  # in the store: what a rank found on its node
_VERDICT = "vlp/packages/verdict"  # the first rank's answer to all reports
_FAREWELL_S = 2.0  # the first rank may hold the store, from which others still read the verdict


class LaunchError(RuntimeError):
    """The processes, device or engine obtained are not the ones asked for."""


def meet(timeout: timedelta) -> dict[str, Any]:
    """Wait for the processes that the launcher announced; the arguments by which
    `init_process_group` makes a group of them. Collective.

    Raises LaunchError where the address does not serve, and where packages differ between ranks.
    """
    try:
        store, rank, n_ranks = next(rendezvous("env://", timeout=timeout))
    except torch_dist.DistError as error:
        raise LaunchError(_unreachable(str(error))) from None
    store.set_timeout(timeout)
    _compare_packages(store, rank, n_ranks)

    # Keys of the group apart from ours, as torch keeps them where it makes the store itself.
    own_keys = torch_dist.PrefixStore("default_pg", store)
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
    if "waiting for clients" in reason:
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


def _compare_packages(store: Any, rank: int, n_ranks: int) -> None:
    """Refuse on every rank what differs between ranks. Collective."""
    report = {"host": socket.gethostname(), **{name: version(name) for name in DECIDING}}
    # With its build: a wheel for another CUDA brings another NCCL, under the same version.
    report["torch"] = str(torch.__version__)
    store.set(_REPORT.format(rank=rank), json.dumps(report))

    # One rank compares: n reads in all, instead of n on each of n ranks.
    if rank == 0:
        reports = [json.loads(store.get(_REPORT.format(rank=other))) for other in range(n_ranks)]
        store.set(_VERDICT, json.dumps(difference(reports)))

    verdict = json.loads(store.get(_VERDICT))
    if verdict is not None:
        if rank == 0:
            time.sleep(_FAREWELL_S)
        raise LaunchError(verdict)


def difference(reports: Sequence[dict[str, str]]) -> str | None:
    """What to say of ranks that report other versions; None where all are the same.

    reports: of each rank its `host`, and the version of each package by name.
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
    for found, holding in holders.items():
        first = holding[0]
        which = f"rank {first} on {reports[first]['host']}"
        if len(holding) > 1:
            which = f"{len(holding)} ranks, the first {which}"
        parts.append(f"{found} ({which})")
    return " and ".join(parts)
