"""Collectives on real ranks: values, and gradients that sum what every rank asks for."""

import pytest
import torch

from tests import ranks
from vlp import dist

NAMES = ("all_gather", "reduce_scatter", "all_reduce", "all_to_all")


def _values(name, group=None, dtype=torch.float64):
    """Gradient, through one collective, of the SUM over ranks of each rank's weighted output."""
    group, r = group or dist.world(), dist.rank()
    n = group.size
    x = (torch.arange(2.0 * n, dtype=dtype) + 10 * r).requires_grad_()
    y = getattr(dist, name)(x, group)
    weight = torch.arange(1.0, y.numel() + 1, dtype=dtype) * (r + 1)
    (y * weight).sum().backward()
    return y.tolist(), x.grad.tolist()


def _reference(name, n):
    """The same on plain lists, from the definition of each collective."""
    inputs = [[i + 10.0 * r for i in range(2 * n)] for r in range(n)]
    # where[r] lists, for each output of rank r, the (rank, index) pairs that it sums
    everyone = range(n)
    where = {
        "all_gather": [[[(k, i)] for k in everyone for i in range(2 * n)] for _ in everyone],
        "reduce_scatter": [
            [[(k, i) for k in everyone] for i in (2 * r, 2 * r + 1)] for r in everyone
        ],
        "all_reduce": [[[(k, i) for k in everyone] for i in range(2 * n)] for _ in everyone],
        "all_to_all": [[[(k, i)] for k in everyone for i in (2 * r, 2 * r + 1)] for r in everyone],
    }[name]
    outputs = [[sum(inputs[k][i] for k, i in cell) for cell in rank] for rank in where]
    gradients = [[0.0] * (2 * n) for _ in everyone]

    for r, rank in enumerate(where):
        for position, cell in enumerate(rank):
            for k, i in cell:
                gradients[k][i] += (position + 1) * (r + 1)
    return list(zip(outputs, gradients))


@pytest.mark.parametrize("n_ranks", [2, 4])
def test_collectives_and_their_gradients(n_ranks):
    found = ranks.run(n_ranks, _every, NAMES)
    for rank in range(n_ranks):
        for i, name in enumerate(NAMES):
            assert found[rank][i] == _reference(name, n_ranks)[rank], f"{name}, rank {rank}"


def _every(names):
    return [_values(name) for name in names]


def _both_ways():
    """Every collective within pairs of ranks that alternate: by communicators of their own, and by
    the world's. One group exchanges once more, which does not concern the other.
    """
    results = []
    for partition in (((0, 2), (1, 3)), ((0, 3), (1, 2))):
        own = dist.split(partition)
        shared = dist.within(dist.world(), own.ranks)
        assert shared.point_to_point and shared.handle is dist.world().handle
        for name in NAMES:
            for dtype in (torch.float64, torch.bfloat16):
                results.append((_values(name, own, dtype), _values(name, shared, dtype)))
        results.append(tuple(_rows(group) for group in (own, shared)))
        results.append(tuple(_shifted(group) for group in (own, shared)))
        if 0 in own.ranks:
            dist.all_gather(torch.ones(1), shared)
    return results


def _rows(group):
    """Rows that change ranks: the first member sends 2 and gets none."""
    first = group.index == 0
    value = torch.tensor([True, False, True]) if first else torch.zeros(0, dtype=torch.bool)
    send, receive = ([1, 2], [1, 0]) if first else ([0, 0], [2, 0])
    return dist.exchange_rows(value, send, receive, group).tolist()


def _shifted(group):
    return dist.Shift([torch.tensor([dist.rank()])], group).wait()[0].tolist()


def test_a_shared_communicator_gives_what_an_own_one_gives():
    for results in ranks.run(4, _both_ways):
        assert len(results) == 2 * (len(NAMES) * 2 + 2)
        assert all(own == shared for own, shared in results)


def _sums_in_bf16():
    """Sums over four ranks of 256, .5, .5 and 1, which are 258, as few and as many ranks take them.

    The rank that holds the 256 and the receiver change from row to row.
    """
    small = (256.0, 0.5, 0.5, 1.0)
    values = [small[(dist.rank() - row) % 4] for row in range(16)]
    value = torch.tensor(values, dtype=torch.bfloat16)

    few = dist.reduce_scatter(value, dist.world())
    dist.ROUNDED_UP_TO = 3
    many = dist.reduce_scatter(value, dist.world())
    assert many.dtype == torch.bfloat16
    return few.tolist(), many.tolist()


def test_half_precision_is_summed_in_float32_over_many_ranks():
    """256 + .5 is 256 in bf16, so whoever rounds at every hop loses the others."""
    results = ranks.run(4, _sums_in_bf16)
    assert [many for _, many in results] == [[258.0] * 4] * 4
    assert min(min(few) for few, _ in results) < 258


def _odd_and_even():
    group = dist.split(((0, 2), (1, 3)))
    x = torch.tensor([float(dist.rank())])
    received = dist.Shift([x], group).wait()[0]
    return (
        group.ranks,
        dist.all_gather(x, group).tolist(),
        received.tolist(),
        dist.gather_objects(dist.rank(), group),
        dist.all_reduce(x, dist.world()).item(),
        dist.broadcast_object(dist.rank(), group),
    )


def test_subgroups_and_ring():
    for rank, (members, gathered, received, objects, total, first) in enumerate(
        ranks.run(4, _odd_and_even)
    ):
        mates = [rank % 2, rank % 2 + 2]
        assert (
            list(members) == mates and gathered == mates and objects == mates and first == mates[0]
        )
        assert received == [mates[1 - mates.index(rank)]] and total == 6


def test_one_process_needs_no_group():
    x = torch.randn(3, requires_grad=True)
    group = dist.world()
    for name in ("all_gather", "reduce_scatter", "all_reduce", "all_to_all"):
        assert getattr(dist, name)(x, group) is x
    assert (group.size, group.index, dist.world_size(), dist.is_main()) == (1, 0, 1, True)


def _fails_on_one():
    if dist.rank() == 1:
        raise ValueError("told to")


def test_a_failing_rank_is_reported():
    with pytest.raises(RuntimeError, match=r"rank 1 of 2 failed(.|\n)*told to"):
        ranks.run(2, _fails_on_one)
