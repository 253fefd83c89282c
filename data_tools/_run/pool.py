"""Who does a tool's work: processes of this machine, its part where machines share a folder, or a
Ray cluster.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from typing import TypeVar

from vlp.data_tools._run import local
from vlp.files import remove_leftovers
from vlp.locks import held

# Of torchrun and accelerate launch; of srun.
RANKS = (("RANK", "WORLD_SIZE"), ("SLURM_PROCID", "SLURM_NTASKS"))

Item = TypeVar("Item")
Done = TypeVar("Done")


@dataclass(frozen=True)
class Pool:
    """Who does the work: the processes of this machine, and the part of the jobs that this machine
    takes.
    """

    processes: int = 1
    part: int = 1
    parts: int = 1

    def share(self, jobs: Sequence[Item]) -> Sequence[Item]:
        """This machine's jobs: every `parts`-th."""
        return jobs[self.part - 1 :: self.parts]

    def finished(
        self, do: Callable[[Item], Done], items: Sequence[Item]
    ) -> Iterator[tuple[Item, Done]]:
        """Each item with what `do` returned for it, as soon as it is there; raises its exception,
        and WorkerLost.
        """
        return local.finished(do, items, self.processes)


def arguments(parser: argparse.ArgumentParser) -> None:
    """The options of every tool that goes over shards."""
    add = parser.add_argument
    add(
        "--processes",
        type=int,
        default=1,
        metavar="N",
        help="shards at the same time (default: %(default)s)",
    )
    add(
        "--part",
        metavar="K/N",
        help="only every N-th shard from the K-th on, for N machines that share the output's "
        "folder (default: the rank in RANK and WORLD_SIZE or SLURM_PROCID and SLURM_NTASKS, "
        "else 1/1)",
    )


def pool(args: argparse.Namespace) -> Pool:
    """The pool that the options and the launcher's environment name; raises ValueError."""
    n_processes: int = args.processes
    if n_processes < 1:
        raise ValueError(f"--processes {n_processes} must be at least 1")
    return Pool(n_processes, *_share(args))


def _share(args: argparse.Namespace) -> tuple[int, int]:
    """(K, N): this machine takes every N-th job from the K-th on."""
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

        folder = Path(args.to)
        advice = "Wait until it is done, or name another folder with --to"
        part, parts = 1, 1
        if hasattr(args, "part"):
            part, parts = _share(args)
            advice += "; to share the work, give each call its --part K/N"

        with held(folder, advice=advice, part=(part, parts)):
            # Files that a killed call left half-written are nobody's, unless another part writes.
            if parts == 1:
                remove_leftovers(folder)
            return run(args)

    return guarded
