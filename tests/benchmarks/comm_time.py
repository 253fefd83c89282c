"""How long a step of many ranks takes: the calls of `comm_model` on a machine of nodes.

Constants are given, not found: a latency α and a bandwidth β of a rank, inside a node and between
nodes.

    all-gather, reduce-scatter   a ring: g − 1 hops of α, and the bytes sent over β
    all-to-all                   g − 1 messages, so many of which are in flight together
    all-reduce                   2·(k − 1) hops inside a node of k ranks, 2·log₂ N between N nodes,
                                 and the bytes of a ring over β
    a hop of a ring topology     α + bytes/β over the slowest link, while a tile is computed
    the gather of the texts      what is left of it after the image tower's forward, beside which it
                                 runs: max(0, gather − tower)

A collective's ring over several nodes is one of k, each of which leaves a node by another rank's
network card; blocks of a ring topology leave it by one card alone. Congestion, stragglers and the
start of kernels are not modelled.
"""

from __future__ import annotations

import argparse
import math
from collections import defaultdict
from dataclasses import dataclass
from typing import Any

from tests.benchmarks import comm_model
from tests.benchmarks.comm_model import Exchange, Work

BUCKET = 25 * 2**20  # bytes of gradients that DDP reduces at a time


@dataclass(frozen=True)
class Machine:
    """Nodes of equal ranks."""

    per_node: int
    inside_us: float
    inside_gbs: float  # 10⁹ bytes/s a rank, one direction
    between_us: float
    between_gbs: float
    in_flight: int  # messages of an all-to-all at a time

    def ms(self, exchange: Exchange) -> float:
        """Milliseconds of an exchange with nothing beside it."""
        call = exchange.call
        if call.kind == "message":
            us = self._direct_us(call.size, exchange.times + 1, (exchange.times + 1) // 2)
        else:
            us = exchange.times * self._collective_us(exchange)
        return us / 1000

    def hop_ms(self, n_bytes: int, n_ranks: int, stride: int) -> float:
        """Milliseconds of one message between neighbours, where the slowest pair sets the pace."""
        crosses = n_ranks > self._together(n_ranks, stride)
        latency_us = self.between_us if crosses else self.inside_us
        rate = self.between_gbs if crosses else self.inside_gbs
        return (latency_us + _us(n_bytes, rate)) / 1000

    def _collective_us(self, exchange: Exchange) -> float:
        call = exchange.call
        together = self._together(call.ranks, exchange.stride)
        n_nodes = math.ceil(call.ranks / together)
        if call.ranks == 1:
            return 0.0
        if call.kind == "all_to_all":
            return self._direct_us(call.size / call.ranks, call.ranks, together)

        transfer_us = self._rings_us(float(call.sent), together, n_nodes)
        if call.kind == "all_reduce":
            n_buckets = math.ceil(call.size / BUCKET)
            return n_buckets * self._tree_us(together, n_nodes) + transfer_us

        # A part crosses every border on its way round.
        n_crossings = 0 if n_nodes == 1 else min(n_nodes, call.ranks - 1)
        n_inside = call.ranks - 1 - n_crossings
        return n_crossings * self.between_us + n_inside * self.inside_us + transfer_us

    def _together(self, n_ranks: int, stride: int) -> int:
        """Ranks of a group that share a node."""
        return max(1, min(n_ranks, self.per_node // stride))

    def _rings_us(self, n_bytes: float, together: int, n_nodes: int) -> float:
        """So many bytes of each rank, over as many rings as it has cards in a node."""
        inside_us = _us(n_bytes, self.inside_gbs) if together > 1 else 0.0
        between_us = _us(n_bytes / together, self.between_gbs) if n_nodes > 1 else 0.0
        return max(inside_us, between_us)

    def _tree_us(self, together: int, n_nodes: int) -> float:
        between = math.ceil(math.log2(n_nodes)) * self.between_us
        return 2 * ((together - 1) * self.inside_us + between)

    def _direct_us(self, piece: float, n_ranks: int, together: int) -> float:
        """A message of each rank to each other."""
        n_inside, n_between = together - 1, n_ranks - together
        latency_us = math.ceil(n_inside / self.in_flight) * self.inside_us
        latency_us += math.ceil(n_between / self.in_flight) * self.between_us

        inside_us = _us(n_inside * piece, self.inside_gbs)
        return latency_us + max(inside_us, _us(n_between * piece, self.between_gbs))


def _us(n_bytes: float, gigabytes_a_second: float) -> float:
    return n_bytes / gigabytes_a_second / 1000


@dataclass(frozen=True)
class Step:
    """What a rank computes in a step, and what it exchanges beside the loss."""

    work: Work
    n_parameters: int
    n_numbers: int  # scale, and bias where there is one
    towers_ms: float  # forward and backward of both
    forward_ms: float  # of the image tower alone
    pairs_tflops: float  # rate of the loss


def simulate(
    machine: Machine, step: Step, exchanges: list[Exchange], n_ranks: int, g: int
) -> dict[str, Any]:
    """One row: a rank's amounts and milliseconds of a step. `exchanges` are those of the loss among
    g ranks.
    """
    by_phase: dict[str, float] = defaultdict(float)
    for exchange in exchanges:
        if not exchange.phase.startswith("ring"):
            by_phase[exchange.phase] += machine.ms(exchange)

    # Scores once forward and once again backward, with two gradients: 8·b·n·D.
    n, work = g * step.work.rows, step.work
    pairs_ms = 8 * work.rows * n * work.dim / step.pairs_tflops / 1e9
    hidden_ms = min(by_phase["texts"], step.forward_ms)
    waited_ms = sum(by_phase.values()) - hidden_ms
    waited_ms += ring_waits_ms(machine, exchanges, pairs_ms, g)

    # DDP reduces beside the towers' backward, about two thirds of their time.
    verdict_ms = machine.ms(comm_model.verdict(n_ranks, step.n_numbers))
    weights_ms = machine.ms(comm_model.weights(n_ranks, step.n_parameters))
    exposed_ms = max(0.0, weights_ms - step.towers_ms * 2 / 3)
    total_ms = step.towers_ms + pairs_ms + waited_ms + verdict_ms + exposed_ms

    counted = comm_model.calls(exchanges)
    return {
        "n": n,
        "MiB a rank": float(comm_model.sent(counted)) / 2**20,
        "messages": comm_model.messages(counted),
        "GiB held": held(work, exchanges, n) / 2**30,
        "pairs ms": pairs_ms,
        "loss waits ms": waited_ms,
        "verdict ms": verdict_ms,
        "weights ms": weights_ms,
        "step ms": total_ms,
        "waits, %": 100 * (waited_ms + verdict_ms + exposed_ms) / total_ms,
        "hidden ms": hidden_ms,
    }


def ring_waits_ms(machine: Machine, exchanges: list[Exchange], pairs_ms: float, g: int) -> float:
    """What the hops of a ring topology take longer than the tiles that are computed meanwhile."""
    hops = {e.phase: e for e in exchanges if e.phase.startswith("ring")}
    if not hops:
        return 0.0
    forward, backward, gradient = (hops[f"ring {p}"] for p in ("forward", "backward", "gradient"))

    # A quarter of the arithmetic is forward's. In backward block and gradient share the link.
    forward_tile, backward_tile = pairs_ms / 4 / g, pairs_ms * 3 / 4 / g
    one_ms = machine.hop_ms(forward.call.size, g, forward.stride)
    two_ms = machine.hop_ms(backward.call.size + gradient.call.size, g, backward.stride)
    last_ms = machine.hop_ms(gradient.call.size, g, gradient.stride)

    waits_ms = forward.times * max(0.0, one_ms - forward_tile)
    waits_ms += backward.times * max(0.0, two_ms - backward_tile)
    return waits_ms + last_ms  # nothing is left to compute while the gradients go home


def held(work: Work, exchanges: list[Exchange], n: int) -> int:
    """Bytes of candidates and their gradients on a rank: gathered, in float32, and as sent; on a
    ring two blocks and two gradients.
    """
    on_ring = any(exchange.phase.startswith("ring") for exchange in exchanges)
    if on_ring:
        return work.rows * work.dim * (2 * work.itemsize + 2 * 4)
    return n * work.dim * (2 * work.itemsize + 4)


# Bandwidths are 80 % of nominal: NVLink 4, 450 GB/s in one direction, and a card of 400 Gb/s.
# Latencies and times of towers are guesses; the rate of the loss is that of an H200 at B = 32,768.
CONSTANTS: list[tuple[str, Any, str]] = [
    ("per-node", 8, "ranks of a node"),
    ("inside-us", 5.0, "latency inside a node"),
    ("inside-gbs", 360.0, "GB/s of a rank inside a node"),
    ("between-us", 10.0, "latency between nodes"),
    ("between-gbs", 40.0, "GB/s of a rank between nodes"),
    ("in-flight", 32, "messages of an all-to-all at a time"),
    ("parameters", 151_277_313, "of the model"),
    ("numbers", 1, "learned numbers of the loss: 1 scale, 2 with a bias"),
    ("towers-ms", 90.0, "forward and backward of both towers"),
    ("forward-ms", 18.0, "forward of the image tower"),
    ("pairs-tflops", 465.0, "TFLOP/s of the loss"),
]
NAMES = [name.replace("-", "_") for name, _, _ in CONSTANTS]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The constants of --simulate."""
    group = parser.add_argument_group("simulated: constants of the machine and of a rank's step")
    for name, default, meaning in CONSTANTS:
        group.add_argument(
            f"--{name}", type=type(default), default=default, help=f"{meaning} [{default}]"
        )


def read(args: argparse.Namespace) -> tuple[Machine, Step]:
    """The machine and a rank's step of the arguments."""
    machine = Machine(
        args.per_node,
        args.inside_us,
        args.inside_gbs,
        args.between_us,
        args.between_gbs,
        args.in_flight,
    )
    work = Work(args.rows, args.dim)
    times = args.towers_ms, args.forward_ms, args.pairs_tflops
    return machine, Step(work, args.parameters, args.numbers, *times)


def notes(machine: Machine, step: Step) -> str:
    """What the numbers rest on."""
    return (
        f"InfoNCE, b = {step.work.rows}, D = {step.work.dim}, bfloat16, DDP, "
        f"{step.n_parameters / 1e6:.0f} M parameters. Computed, not measured; the calls are those "
        f"counted in real runs at W = 2 and 4. Assumed: nodes of {machine.per_node} ranks; "
        f"{machine.inside_us:g} µs and {machine.inside_gbs:g} GB/s a rank inside, "
        f"{machine.between_us:g} µs and {machine.between_gbs:g} GB/s between; "
        f"{machine.in_flight} messages in flight; towers {step.towers_ms:g} ms, of which "
        f"{step.forward_ms:g} ms the image tower's forward; pairs {step.pairs_tflops:g} TFLOP/s. "
        "GiB held: candidates and their gradients. weights: the all-reduce of gradients, hidden by "
        "the towers' backward up to two thirds of the towers' time. hidden: what of the text "
        "gather runs beside the image tower's forward and is not in loss waits."
    )
