"""The model of a step's exchanges beside the calls of real runs."""

import json
import sys
from collections import Counter

import pytest
import torch

from tests import ranks
from tests.benchmarks import comm, comm_count, comm_model, comm_time
from tests.benchmarks.comm_model import Call, Exchange, Work, calls

N_RANKS = 4
TOPOLOGIES = [
    *comm.TOPOLOGIES.values(),
    {"group": 2, "layout": "strided"},
    {"group": 2, "layout": "alternating"},
    {"group": 2, "layout": "alternating", "exchange": "ring"},
]
# objective, dtype, ranks up to which sums stay in half precision
CASES = [("infonce", "bfloat16", 8), ("infonce", "bfloat16", 2), ("siglip", "float32", 8)]
WORK = {
    "bfloat16": Work(rows=6, dim=10, itemsize=2, columns=1),
    "float32": Work(rows=6, dim=10, itemsize=4, columns=0),
}


def counted_everywhere():
    """On a rank: the calls of the losses and of the step, and the values of two topologies."""
    of_losses = []
    for objective, dtype, rounded_up_to in CASES:
        comm_count.dist.ROUNDED_UP_TO = rounded_up_to
        of_losses.append(comm_count.count(topologies(objective), 6, 10, dtype, objective))

    of_steps = [comm_count.count_step(micro_batches) for micro_batches in (1, 3)]
    values = [comm_count.value_and_gradients(t, 5, 4) for t in ("global", {"hierarchical": 2})]
    return of_losses, of_steps, values


def topologies(objective):
    """What exists for the objective: the exchange in two hops is written for InfoNCE."""
    return [t for t in TOPOLOGIES if objective == "infonce" or not comm.is_hierarchical(t)]


@pytest.fixture(scope="module")
def by_rank():
    return ranks.run(N_RANKS, counted_everywhere)


def modelled(topology, work):
    return calls(comm.exchanges_of(topology, N_RANKS, work))


def test_the_model_makes_the_calls_of_a_run(by_rank, monkeypatch):
    n_compared = 0
    for of_losses, _, _ in by_rank:
        for (objective, dtype, rounded_up_to), counts in zip(CASES, of_losses, strict=True):
            monkeypatch.setattr(comm_count.dist, "ROUNDED_UP_TO", rounded_up_to)
            for topology, of_run in zip(topologies(objective), counts, strict=True):
                assert of_run == modelled(topology, WORK[dtype]), (objective, topology)
                n_compared += bool(of_run)
    assert n_compared == N_RANKS * (8 + 8 + 7)  # all but local, which calls nothing


@pytest.mark.parametrize(
    "wrong",
    [
        Work(rows=7, dim=10),
        Work(rows=6, dim=10, columns=0),  # forgets the columns
        Work(rows=6, dim=10, columns=2),
        Work(rows=6, dim=10, itemsize=4),
    ],
)
def test_a_wrong_model_is_found(by_rank, wrong):
    of_run = by_rank[0][0][0]
    differ = [counts != modelled(t, wrong) for t, counts in zip(TOPOLOGIES, of_run, strict=True)]
    assert sum(differ) == len(TOPOLOGIES) - 1


def test_a_step_adds_one_all_reduce_of_scalars_and_the_gradients(by_rank):
    """However many micro-batches there are; the objective is InfoNCE and SigLIP."""
    rows_of_step = [Work(rows=3, dim=16, itemsize=4, columns=columns) for columns in (1, 0)]
    expected: Counter[Call] = Counter()
    for work in rows_of_step:
        expected += modelled("global", work)
    # Both terms read the texts that are gathered once; each has a gradient in them.
    texts, *_ = comm.exchanges_of("global", N_RANKS, rows_of_step[0])
    expected -= calls([texts])
    expected += calls([comm_model.verdict(N_RANKS, n_numbers=2)])

    n_compared = 0
    for _, of_steps, _ in by_rank:
        for n_parameters, of_run in of_steps:
            assert not expected - of_run
            # In as many buckets as DDP makes.
            buckets = of_run - expected
            assert {(call.kind, call.ranks) for call in buckets} == {("all_reduce", N_RANKS)}
            gradients = comm_model.weights(N_RANKS, n_parameters)
            assert comm_model.sent(buckets) == gradients.call.sent
            n_compared += 1
    assert n_compared == 2 * N_RANKS


def test_the_exchange_in_two_hops_is_the_global_loss(by_rank):
    for _, _, (direct, in_two_hops) in by_rank:
        for one, other in zip(direct, in_two_hops, strict=True):
            assert max(map(abs, one)) > 0.01
            torch.testing.assert_close(torch.tensor(other), torch.tensor(one), rtol=0, atol=1e-6)


# Times

MACHINE = comm_time.Machine(
    per_node=8, inside_us=5, inside_gbs=100, between_us=20, between_gbs=10, in_flight=4
)


@pytest.mark.parametrize(
    "exchange, us",
    [
        # 7 hops inside; 7 of 8 MB.
        (Exchange("", Call("all_gather", 8_000_000, 8)), 7 * 5 + 70),
        # 2 borders, 13 hops inside; 15 MB by the 8 cards of a node.
        (Exchange("", Call("all_gather", 16_000_000, 16)), 2 * 20 + 13 * 5 + 15e6 / 8 / 10e3),
        # The ranks of one place: each hop crosses, by a card of its own.
        (Exchange("", Call("all_gather", 2_000_000, 2), stride=8), 20 + 100),
        # Neighbours at half a node: 2 of 4 share one, so 2 borders and 1 hop inside.
        (Exchange("", Call("all_gather", 400_000, 4), stride=4), 2 * 20 + 5 + 15),
        # 7 inside, 8 between, 4 at a time; 8 pieces of 1 MB cross by one card.
        (Exchange("", Call("all_to_all", 16_000_000, 16)), 2 * 5 + 2 * 20 + 800),
        # 2 nodes: up and down a tree of 7 hops and 1; 20 bytes cost next to nothing.
        (Exchange("", Call("all_reduce", 20, 16)), 2 * (7 * 5 + 20)),
        (Exchange("", Call("all_gather", 8_000_000, 1)), 0),
        # 3 messages to the members of an alternating group: a half of 2 here, 2 elsewhere.
        (Exchange("", Call("message", 100_000, 2), times=3), 5 + 20 + 20),
    ],
)
def test_time_of_an_exchange(exchange, us):
    assert 1000 * MACHINE.ms(exchange) == pytest.approx(us, abs=0.01)


def test_a_ring_waits_for_what_its_tiles_do_not_hide():
    exchanges = comm_model.loss(comm.Topology.read("ring"), 16, Work(rows=100, dim=100))
    # Between nodes: 20 + 2 µs forward, 20 + 2 + 4 backward, 20 + 4 home.
    slow = comm_time.ring_waits_ms(MACHINE, exchanges, 0.0, 16)
    assert 1000 * slow == pytest.approx(15 * 22 + 15 * 26 + 24)
    fast = comm_time.ring_waits_ms(MACHINE, exchanges, 100.0, 16)
    assert 1000 * fast == pytest.approx(24)


@pytest.mark.parametrize("forward_ms, exposed_us", [(0.0, 105), (0.1, 5), (9.0, 0)])
def test_a_step_waits_for_what_the_image_tower_does_not_hide_of_the_texts(forward_ms, exposed_us):
    # 7 hops inside and 7 of 8 MB; the texts' gradient, in as many bytes, is not hidden.
    gather = Exchange("texts", Call("all_gather", 8_000_000, 8))
    scatter = Exchange("texts' gradient", Call("reduce_scatter", 8_000_000, 8))
    step = comm_time.Step(Work(rows=6, dim=10), 1000, 1, 50.0, forward_ms, pairs_tflops=1.0)

    row = comm_time.simulate(MACHINE, step, [gather, scatter], n_ranks=8, g=8)
    assert 1000 * row["loss waits ms"] == pytest.approx(exposed_us + 105)
    assert 1000 * row["hidden ms"] == pytest.approx(105 - exposed_us)


# The command


def test_a_simulated_step_of_2048_ranks(tmp_path, monkeypatch):
    file = tmp_path / "comm step.json"
    monkeypatch.setattr(
        sys, "argv", ["comm.py", "--simulate", "--ranks", "8", "2048", "--json", str(file)]
    )
    comm.main()

    rows = {(row["topology"], row["W"]): row for row in json.loads(file.read_text())["rows"]}
    assert len(rows) == 3 + 7  # in one node, three topologies are all there are
    everyone, in_hops = rows["global", 2048], rows["hierarchical (not in vlp)", 2048]
    assert everyone["n"] == in_hops["n"] == 2**20
    # Gather, reduce-scatter, and the columns' statistics there and back.
    assert everyone["messages"] == 4 * 2047 and in_hops["messages"] == 4 * (7 + 255)
    # Sums of more than 8 ranks travel in float32: 1 + 2 GiB, and 16 MiB of statistics.
    assert everyone["MiB a rank"] == pytest.approx((3 * 1024 + 16) * 2047 / 2048)
    assert rows["group: a node", 2048]["loss waits ms"] == rows["global", 8]["loss waits ms"]


@pytest.mark.parametrize(
    "arguments, message",
    [
        ("--ranks 1", "found 1, expected at least 2"),
        ("--simulate --ranks 12", "12 ranks are no whole nodes of 8"),
        ("--simulate --ranks 8 --per-node 0", "--per-node: found 0"),
        ("--simulate --between-gbs -1", "--between-gbs: found -1"),
        ("--rows 0", "--rows: found 0"),
        ("--dtype float99", "--dtype: found float99"),
        ("--dtype nn", "--dtype: found nn"),
    ],
)
def test_what_makes_no_machine_is_refused(arguments, message, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["comm.py", *arguments.split()])
    with pytest.raises(SystemExit):
        comm.main()
    assert message in capsys.readouterr().err
