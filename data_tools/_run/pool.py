"""Who does a tool's work: processes of this machine, its part where machines share a folder, or a
Ray cluster.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, replace
from functools import wraps
from typing import TypeVar

from vlp.data import stored
from vlp.data.stored import StoredPath
from vlp.data_tools._run import local
from vlp.files import remove_leftovers
from vlp.locks import held

# Of torchrun and accelerate launch; of srun.
RANKS = (("RANK", "WORLD_SIZE"), ("SLURM_PROCID", "SLURM_NTASKS"))

Item = TypeVar("Item")
Done = TypeVar("Done")


@dataclass(frozen=True)
class Pool:
    """Who does the work: the processes of this machine and the part of the jobs that it takes, or
    the processes of a cluster.
    """

    processes: int | None = 1  # at the same time; None, on Ray: as many as the cluster has room for
    part: int = 1
    parts: int = 1
    ray: bool = False  # on the cluster that this process is connected to
    device: str | None = None  # of the model that the work runs, by the option's name; None: none

    def of_model(self, device: str, *, alone: bool = False) -> Pool:
        """The pool for work that runs a model on `device`. `alone`: the model takes all cores of a
        machine, so that here one process works. Raises ValueError for a device that the cluster
        lacks.
        """
        if not self.ray:
            return replace(self, processes=1) if alone else self

        from vlp.data_tools._run import cluster

        cluster.check_device(device)
        return replace(self, device=device)

    def share(self, jobs: Sequence[Item]) -> Sequence[Item]:
        """This machine's jobs: every `parts`-th."""
        return jobs[self.part - 1 :: self.parts]

    def finished(
        self, do: Callable[[Item], Done], items: Sequence[Item]
    ) -> Generator[tuple[Item, Done], None, None]:
        """Each item with what `do` returned for it, as soon as it is there; raises its exception,
        and WorkerLost.
        """
        if not self.ray:
            return local.finished(do, items, self.processes or 1)

        from vlp.data_tools._run import on_ray

        return on_ray.finished(do, items, self.processes, self.device)


def source_argument(parser: argparse.ArgumentParser) -> None:
    """The shards that a tool reads."""
    parser.add_argument(
        "source",
        help="shards: a folder, a tar, or a pattern with braces; several joined by ::",
    )


def shards_arguments(parser: argparse.ArgumentParser, *, required: bool = True) -> None:
    """The shards that a tool reads, and the folder of those that it writes."""
    source_argument(parser)
    parser.add_argument(
        "--to",
        required=required,
        metavar="DIR",
        help="folder for the new shards; the same call goes on where one stopped",
    )


def arguments(parser: argparse.ArgumentParser) -> None:
    """The options of every tool that goes over shards."""
    undivided_arguments(parser)
    parser.add_argument(
        "--part",
        metavar="K/N",
        help="only every N-th shard from the K-th on, for N machines that share the output's "
        "folder (default: the rank in RANK and WORLD_SIZE or SLURM_PROCID and SLURM_NTASKS, "
        "else 1/1)",
    )


def undivided_arguments(parser: argparse.ArgumentParser, things: str = "shards") -> None:
    """The options of every tool whose work is done in pieces, here or on a cluster."""
    parser.add_argument(
        "--processes",
        type=int,
        metavar="N",
        help=f"{things} at the same time (default: 1; with --ray as many as the cluster has room "
        "for)",
    )
    ray_argument(parser)


def ray_argument(parser: argparse.ArgumentParser) -> None:
    """The option of every tool whose work a cluster may do."""
    parser.add_argument(
        "--ray",
        nargs="?",
        const="auto",
        metavar="ADDRESS",
        help="work on a Ray cluster (pip install 'vlp[ray]'): HOST:PORT, or without it that of "
        "RAY_ADDRESS, else the one that runs on this machine, else one that is started for this "
        "call; write it last",
    )


def pool(args: argparse.Namespace) -> Pool:
    """The pool that the options and the launcher's environment name, with --ray connected to its
    cluster; raises ValueError.
    """
    check_processes(args)
    part, parts = _share(args)
    return replace(undivided(args), part=part, parts=parts)


def undivided(args: argparse.Namespace) -> Pool:
    """The pool of a tool whose work machines do not share by parts; raises ValueError."""
    check_processes(args)
    if on_cluster(args):
        return Pool(args.processes, ray=True)
    return Pool(args.processes or 1)


def check_processes(args: argparse.Namespace) -> None:
    """Raise ValueError for a number of processes that does no work."""
    if args.processes is not None and args.processes < 1:
        raise ValueError(f"--processes {args.processes} must be at least 1")


def on_cluster(args: argparse.Namespace) -> bool:
    """Whether --ray names a cluster, which this process has then joined; raises ValueError."""
    if args.ray is None:
        return False

    from vlp.data_tools._run import cluster

    cluster.connect(args.ray)
    return True


def _share(args: argparse.Namespace) -> tuple[int, int]:
    """(K, N): this machine takes every N-th job from the K-th on."""
    # A cluster divides the work by itself, also where a launcher has given this call a rank.
    if args.ray is not None:
        if args.part:
            raise ValueError(
                f"found --part {args.part} and --ray: a cluster divides the work by itself; "
                "leave one of them out"
            )
        return 1, 1

    # What the user says goes before what the launcher says.
    if args.part:
        part, _, parts = args.part.partition("/")
        return _part(args.part, part, parts)

    for rank_name, world_name in RANKS:
        if rank_name in os.environ and world_name in os.environ:
            rank, world = os.environ[rank_name], os.environ[world_name]
            part = str(int(rank) + 1) if rank.isdecimal() else rank
            setting = f"{rank_name}={rank} {world_name}={world}"
            return _part(setting, part, world)
    return 1, 1


def _part(setting: str, part: str, parts: str) -> tuple[int, int]:
    are_numbers = part.isdecimal() and parts.isdecimal()
    if not (are_numbers and 1 <= int(part) <= int(parts)):
        raise ValueError(
            f"{setting!r} names no part of the shards; "
            "expected --part K/N with 1 <= K <= N, or a rank of a larger world"
        )
    return int(part), int(parts)


def alone(run: Callable[[argparse.Namespace], int]) -> Callable[[argparse.Namespace], int]:
    """Decorate a tool's `run`: nobody else works in the folder --to meanwhile, but for the other
    parts of the work.
    """

    @wraps(run)
    def guarded(args: argparse.Namespace) -> int:
        if not args.to:
            return run(args)

        folder = stored.destination(args.to)
        advice = "Wait until it is done, or name another folder with --to"
        part, parts = 1, 1
        if hasattr(args, "part"):
            part, parts = _share(args)
            advice += "; to share the work, give each call its --part K/N"

        if isinstance(folder, StoredPath):
            from vlp.data_tools._run.writers import writing

            with writing(folder, advice=advice, part=(part, parts)):
                return run(args)

        with held(folder, advice=advice, part=(part, parts)):
            # Files that a killed call left half-written are nobody's, unless another part writes.
            if parts == 1:
                remove_leftovers(folder)
            status = run(args)

            # Nor are those of processes that were lost on the way, which others have replaced.
            if args.ray is not None:
                remove_leftovers(folder)
            return status

    return guarded
