"""A new order of all samples, in which neighbours stand side by side."""

from __future__ import annotations

import sys
from collections import Counter
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from vlp.data.format import ShardWriter, index_written
from vlp.data_tools._belonging import settle
from vlp.data_tools._run import work
from vlp.data_tools._run.carried import Carried
from vlp.data_tools._run.shards import Changed, put
from vlp.data_tools.mine.decide import read_neighbours
from vlp.data_tools.mine.rules import in_window
from vlp.data_tools.mine.store import Store, identities

if TYPE_CHECKING:
    from vlp.data_tools.mine.rules import Rules

_ORIGIN = "mined"  # with the number of the group


def write_order(
    store: Store, folder: Path, rules: Rules, size: int, pool: work.Pool
) -> tuple[list[work.Result | None], Counter[str]]:
    """Write the samples in groups of `size` neighbours; returns the shards' results, and why
    neighbours were left out.
    """
    known, counts = identities(folder, len(store.paths)), Counter[str]()
    nearest: list[np.ndarray] = []
    for shard in range(len(store.paths)):
        neighbours = read_neighbours(folder, shard)
        window = in_window(neighbours, store.first(shard), rules, known, counts)
        nearest += [numbers[row] for numbers, row in zip(neighbours.numbers, window)]

    order, n_alone = together(nearest, size)
    counts["samples that stand beside no neighbour"] = n_alone

    # Whole groups a shard, and about as many shards as there were.
    n_groups = -(-store.n // size)
    groups_a_shard = -(-n_groups // len(store.paths))
    n_samples = groups_a_shard * size
    parts = np.split(order, range(n_samples, store.n, n_samples))
    jobs = [
        work.Job(folder / f"{i:05d}_order.json", (i, i * groups_a_shard, part), len(part))
        for i, part in enumerate(parts)
    ]
    carried = [Carried(path, shard) for path, shard in zip(store.paths, store.shards)]
    results = work.carry_out("order", jobs, WriteOrder(store, carried, folder, size), pool)
    for of_shard in carried:
        counts.update(of_shard.counts())
    if work.all_done(results):
        index_written(sorted(folder.glob("*.tar")))
    return results, counts


def together(nearest: list[np.ndarray], size: int) -> tuple[np.ndarray, int]:
    """A new order of all samples in groups of `size`, of neighbours as far as there are any left;
    returns (the samples' numbers, how many of them stand beside no neighbour).

    `nearest`: the neighbours of each sample, by falling score. The samples take their turns in
    order: each that is in no group opens one with its nearest that are in none, at first those
    that it is a neighbour of as well. Who finds too few waits, and the last groups are made of
    those in order.
    """
    is_free = np.ones(len(nearest), bool)
    neighbours = [set(numbers.tolist()) for numbers in nearest]
    order: list[int] = []
    waiting: list[int] = []
    for number, candidates in enumerate(nearest):
        if not is_free[number]:
            continue
        free = [other for other in candidates.tolist() if is_free[other]]
        # A stable sort: among mutual neighbours, and among the others, the nearest first.
        free.sort(key=lambda other: number not in neighbours[other])
        group = [number, *free[: size - 1]]
        if len(group) < size:
            waiting.append(number)
            continue
        is_free[group] = False
        order += group

    alone = [number for number in waiting if is_free[number]]
    return np.array(order + alone, np.int64), len(alone)


@dataclass
class WriteOrder:
    """The work on one new shard: the samples of some groups, each of an origin of its own."""

    store: Store
    carried: list[Carried]  # of each shard
    folder: Path
    size: int

    def __call__(self, job: tuple[int, int, np.ndarray]) -> work.Result:
        shard, first_group, numbers = job
        counts: Counter[str] = Counter()
        with ShardWriter(
            self.folder, sys.maxsize, first_shard=shard, overwrite=True, indexed=False
        ) as writer:
            for place, number in enumerate(numbers.tolist()):
                sample = self.store.sample(number)
                counts["samples read"] += 1
                settle(sample, counts)
                carried = self.carried[self.store.shard_of(number)]
                sample.further = partial(carried.of, sample.key)

                meta = sample.meta | {"source_key": sample.key}
                if "origin" in sample.meta:
                    meta["source_origin"] = sample.meta["origin"]
                meta["origin"] = f"{_ORIGIN}-{first_group + place // self.size}"
                put(writer, Changed(sample, list(sample.captions), meta), None)
                counts["samples written"] += 1
        return {"counts": counts}
