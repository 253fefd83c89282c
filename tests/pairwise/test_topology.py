"""Which ranks share candidates: partitions, their rotation, and the errors of a bad topology."""

import itertools

import pytest

from vlp.pairwise import Backend, Topology
from vlp.pairwise.topology import contiguous, rotation, strided


def test_layouts():
    assert contiguous(6, 2) == ((0, 1), (2, 3), (4, 5))
    assert strided(6, 2) == ((0, 3), (1, 4), (2, 5))
    assert Topology(2, "strided").partition(6, step=5) == strided(6, 2)
    assert Topology.read("local").partition(3) == ((0,), (1,), (2,))
    assert (
        Topology.read("global").partition(3) == ((0, 1, 2),) == Topology.read("ring").partition(3)
    )


def test_alternating_groups_let_every_pair_meet():
    n = 0
    for n_ranks, size, seed in [
        (4, 2, 0),
        (8, 2, 0),
        (8, 4, 1),
        (12, 3, 2),
        (16, 8, 0),
        (64, 8, 0),
        (6, 6, 0),
        (5, 1, 0),
    ]:
        cycle = rotation(n_ranks, size, seed)
        met = set()
        for partition in cycle:
            assert sorted(itertools.chain(*partition)) == list(range(n_ranks))
            assert {len(group) for group in partition} == {size}
            met |= {pair for group in partition for pair in itertools.combinations(group, 2)}
        assert len(met) == (n_ranks * (n_ranks - 1) // 2 if size > 1 else 0)
        fewest = -(-(n_ranks - 1) // (size - 1)) if size > 1 else 1
        assert len(cycle) <= 2.5 * fewest + 1
        n += 1

    assert n == 8


def test_the_partition_is_a_function_of_seed_and_step():
    topology = Topology(2, "alternating")
    steps = [topology.partition(8, step, seed=5) for step in range(40)]

    assert steps == [topology.partition(8, step, seed=5) for step in range(40)]
    assert steps != [topology.partition(8, step, seed=6) for step in range(40)]
    assert len(set(steps)) == len(rotation(8, 2, 5))


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
