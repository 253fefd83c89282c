"""Which ranks share candidates: partitions, their rotation, and the errors of a bad topology."""

import itertools
import time

import pytest
import torch

from tests import ranks
from vlp import dist
from vlp.pairwise import Backend, Topology
from vlp.pairwise.topology import Rotation, contiguous, strided


def test_layouts():
    assert contiguous(6, 2) == ((0, 1), (2, 3), (4, 5))
    assert strided(6, 2) == ((0, 3), (1, 4), (2, 5))
    assert Topology(2, "strided").partition(6, step=5) == strided(6, 2)
    assert Topology.read("local").partition(3) == ((0,), (1,), (2,))
    assert (
        Topology.read("global").partition(3) == ((0, 1, 2),) == Topology.read("ring").partition(3)
    )


SIZES = [*range(1, 33), 48, 63, 64, 75, 96, 105]


def test_alternating_groups_let_every_pair_meet():
    """For every group size that divides W: even and odd ones, primes, powers, neither."""
    n_cases = 0
    for n_ranks in SIZES:
        for size in (g for g in range(1, n_ranks + 1) if n_ranks % g == 0):
            cycle = Rotation(n_ranks, size, seed=n_cases)
            partitions = [cycle.partition(step) for step in range(len(cycle))]
            assert partitions[0] == contiguous(n_ranks, size) == cycle.partition(len(cycle))
            assert len(set(partitions)) == len(partitions)

            met = set()
            for partition in partitions:
                assert sorted(itertools.chain(*partition)) == list(range(n_ranks))
                assert {len(group) for group in partition} == {size}
                for group in partition:
                    met.update(itertools.combinations(group, 2))
            assert len(met) == (n_ranks * (n_ranks - 1) // 2 if size > 1 else 0), (n_ranks, size)

            fewest = -(-(n_ranks - 1) // (size - 1)) if size > 1 else 1
            assert len(cycle) <= (2.3 if size % 2 else 2) * fewest
            n_cases += 1

    assert n_cases == 168


def test_a_cycle_of_thousands_of_ranks_costs_milliseconds():
    """The whole of it, in a process that has made none before."""
    started = time.perf_counter()
    cycles = [Rotation(2048, 8), Rotation(2025, 9)]
    groups = [cycle.partition(step)[0] for cycle in cycles for step in (1, 2, 3)]
    assert time.perf_counter() - started < 0.5
    assert [len(cycle) for cycle in cycles] == [511, 508] and len(groups) == 6


def _groups_made(size, layout):
    """The creations of process groups as this rank sees them, by step; −1: before the first."""
    made, step = [], -1
    real = torch.distributed.new_group

    def record(members, *arguments, **options):
        made.append((step, tuple(members), options.get("use_local_synchronization", False)))
        return real(members, *arguments, **options)

    torch.distributed.new_group = record
    backend = Backend(topology=Topology(size, layout), seed=1)
    received = []
    for step in range(2 * len(Rotation(dist.world_size(), size))):
        group = backend.group(step)
        received.append(dist.all_gather(torch.tensor([dist.rank()]), group).tolist())
        assert received[-1] == list(group.ranks)
    torch.distributed.new_group = real
    return made, received


def _all_layouts(size):
    return {layout: _groups_made(size, layout) for layout in LAYOUTS}


LAYOUTS = ("contiguous", "strided", "alternating")


@pytest.mark.parametrize("n_ranks", [6, 8])
def test_groups_are_made_by_all_ranks_in_one_order_before_the_first_step(n_ranks):
    """On NCCL a new group is a collective of all ranks: one that comes alone waits for ever."""
    by_rank = ranks.run(n_ranks, _all_layouts, 2)
    for layout in LAYOUTS:
        made = [results[layout][0] for results in by_rank]
        assert all(of_rank == made[0] for of_rank in made)
        assert {(step, alone) for step, _, alone in made[0]} <= {(-1, False)}

        mates = set(itertools.chain(*(map(tuple, results[layout][1]) for results in by_rank)))
        if layout == "alternating":
            assert len(made[0]) == 0 and len(mates) == n_ranks * (n_ranks - 1) // 2
        else:
            assert len(made[0]) == len(mates) == n_ranks // 2


def test_the_partition_is_a_function_of_seed_and_step():
    topology = Topology(2, "alternating")
    steps = [topology.partition(8, step, seed=5) for step in range(40)]

    assert steps == [topology.partition(8, step, seed=5) for step in range(40)]
    assert steps != [topology.partition(8, step, seed=6) for step in range(40)]
    assert len(set(steps)) == len(Rotation(8, 2)) == 7


@pytest.mark.parametrize(
    "value, message",
    [
        ("globl", r"topology: found 'globl', did you mean 'global'\?"),
        ({"group": 2, "layuot": "strided"}, r"unknown key 'layuot', did you mean 'layout'\?"),
        ({"group": 2, "layout": "strid"}, r"topology.layout: 'strid' is not a choice"),
        ({"group": -1}, "give at least 1"),
        (7, "topology: found 7"),
    ],
)
def test_bad_topologies(value, message):
    with pytest.raises(ValueError, match=message):
        Topology.read(value)


def test_a_group_that_does_not_divide_names_the_divisors():
    with pytest.raises(
        ValueError, match=r"groups of 4 do not divide 6 ranks; choose group from \[1, 2, 3, 6\]"
    ):
        Topology(4).group_size(6)
    with pytest.raises(
        ValueError, match=r"groups of 2 do not divide 1 ranks; choose group from \[1\]"
    ):
        Backend(topology=Topology(2))


def test_unknown_implementation():
    with pytest.raises(
        ValueError, match="impl: found 'fast'; choose from auto, dense, tiled, triton"
    ):
        Backend(impl="fast")
